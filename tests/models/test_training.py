"""What the models share: the schedule by hand, which optimizers take what, and what a checkpoint may go on with."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lit_scale.models.training import Scheduled, check_warmup
from tests.support.data import numbers
from tests.support.equality import assert_same
from tests.support.training import quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Line(Scheduled):
    def __init__(
        self,
        optimizer: str = "adamw",
        lr: float = 0.1,
        weight_decay: float = 0.3,
        beta2: float = 0.9,
        warmup: float = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - 1).square().mean()


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("limit", [{"max_steps": 10}, {"max_epochs": 1, "limit_train_batches": 10}], ids=str)
def test_the_rate_climbs_over_the_warm_up_and_falls_on_a_half_cosine(limit: dict[str, int], tmp_path: Path) -> None:
    rates = Rates()
    quiet_trainer(tmp_path, callbacks=[rates], **limit).fit(Line(), numbers())
    up = [0.1 * step / 2 for step in range(2)]
    down = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates.seen == pytest.approx(up + down)


@pytest.mark.parametrize(("name", "betas"), [("adamw", (0.9, 0.8)), ("adam", (0.9, 0.8)), ("lamb", (0.9, 0.8))])
def test_the_second_momentum_reaches_optimizers_of_adams_kind(name: str, betas: Any, tmp_path: Path) -> None:
    line = Line(name, beta2=0.8)
    quiet_trainer(tmp_path, max_steps=1).fit(line, numbers())
    groups = line.trainer.optimizers[0].param_groups
    assert [tuple(group["betas"]) for group in groups] == [betas] * len(groups)


def test_only_matrices_decay(tmp_path: Path) -> None:
    line = Line()
    quiet_trainer(tmp_path, max_steps=1).fit(line, numbers())
    decay = {id(p): group["weight_decay"] for group in line.trainer.optimizers[0].param_groups for p in group["params"]}
    assert decay == {id(line.net.weight): 0.3, id(line.net.bias): 0.0}


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", False)])
def test_the_optimizer_is_fused_where_lightning_can_clip_it(precision: str, fused: bool, tmp_path: Path) -> None:
    line = Line()
    quiet_trainer(tmp_path, max_steps=1, precision=precision, gradient_clip_val=0.1).fit(line, numbers())
    assert line.trainer.optimizers[0].param_groups[0]["fused"] is fused


def test_another_optimizer_cannot_go_on_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(Line(), numbers())
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="optimizer='sgd' cannot go on with the state of the checkpoint's 'adamw'"):
        quiet_trainer(tmp_path, max_steps=4).fit(Line("sgd"), numbers(), ckpt_path=path)
    again = quiet_trainer(tmp_path, max_steps=4)
    again.fit(Line(), numbers(), ckpt_path=path)
    assert again.global_step == 4
    loaded = Line.load_from_checkpoint(path, optimizer="sgd")
    assert_same(loaded.state_dict(), trainer.lightning_module.state_dict())


@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan])
def test_a_warm_up_is_a_fraction_of_the_run(warmup: float) -> None:
    check_warmup(0.0)
    with pytest.raises(ValueError, match=f"warmup={warmup} is not a fraction of the run"):
        check_warmup(warmup)


def test_a_model_has_to_say_how_it_is_evaluated() -> None:
    with pytest.raises(TypeError, match="Line does not say how it is evaluated"):
        Line().validation_step(torch.zeros(1, 4), 0)
