"""Large batches against accumulation and optimizers made by hand, and 8-bit optimizers in a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from timm.optim import Lamb, Lars
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LRScheduler, OneCycleLR, SequentialLR

from lit_scale.callbacks import EightBitOptimizer, LargeBatch, ProgressiveStacking
from lit_scale.guards import SafeCheckpointIO
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import OPTIMIZERS, PlainTorch, build
from tests.support.training import fit, left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]


def trained(
    root: Path, *callbacks: Callback, name: str = "plain_torch", resume: Path | None = None, **options: Any
) -> tuple[Any, Trainer]:
    module = build(name, seed=1 if resume else 0, **options.pop("build", {}))
    defaults: dict[str, Any] = {"max_epochs": 2, "plugins": [SafeCheckpointIO()]}
    return module, fit(module, loader(name), root, *callbacks, resume=resume, **(defaults | options))


@pytest.mark.parametrize("kind", ["lamb", "lars", "own"])
@pytest.mark.parametrize("rate", [{"lr": 0.02}, {}, {"scaling": "linear"}], ids=str)
def test_it_is_accumulation_with_the_other_optimizer_and_rate(kind: Any, rate: dict[str, Any], tmp_path: Path) -> None:
    module, trainer = trained(tmp_path, LargeBatch(4, optimizer=kind, **rate), build={"dropout": 0.0})
    assert trainer.global_step == 4  # of 16 batches
    assert trainer.accumulate_grad_batches == 1
    peak = {"{'lr': 0.02}": 0.02, "{}": 3e-3 * 2, "{'scaling': 'linear'}": 3e-3 * 4}[str(rate)]

    expected = build("plain_torch", dropout=0.0)
    options: dict[str, Any] = {"lr": peak, "weight_decay": 0.1}
    optimizer: Any = {
        "lamb": lambda p: Lamb(p, **options),
        "lars": lambda p: Lars(p, momentum=0.9, **options),
        "own": lambda p: torch.optim.AdamW(p, **options),
    }[kind](expected.parameters())
    schedule = CosineAnnealingLR(optimizer, T_max=100)
    data = loader("plain_torch")
    batches = [batch for _ in range(2) for batch in data]
    for step in range(4):
        optimizer.zero_grad()
        for batch in batches[4 * step : 4 * step + 4]:
            (expected.per_sample_loss(batch).mean() / 4).backward()
        optimizer.step()
        schedule.step()
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert type(trainer.optimizers[0]) is type(optimizer)


SCHEDULES: dict[str, Any] = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=1e-3, total_steps=10),
    "cyclic": lambda optimizer: CyclicLR(optimizer, 1e-4, 1e-3, step_size_up=4, cycle_momentum=False),
    "in sequence": lambda optimizer: SequentialLR(
        optimizer,
        [CosineAnnealingLR(optimizer, 9), CyclicLR(optimizer, 1e-4, 5e-3, step_size_up=2, cycle_momentum=False)],
        [2],
    ),
    "falling": lambda optimizer: CosineAnnealingLR(optimizer, T_max=9),
}


@pytest.mark.parametrize("kind", ["lamb", "own"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_asked_for_is_the_largest_that_is_used(kind: Any, schedule: str, tmp_path: Path) -> None:
    rates: list[float] = []

    class Notes(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # behind the scaling
            trainer.optimizers[0].register_step_pre_hook(lambda its, *_: rates.append(its.param_groups[0]["lr"]))

    class Scheduled(PlainTorch):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
            scheduler: LRScheduler = SCHEDULES[schedule](optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    batches = LargeBatch(2, optimizer=kind, lr=0.02)
    fit(Scheduled(), loader("plain_torch"), tmp_path, batches, Notes(), max_steps=8)
    assert len(rates) == 8
    assert max(rates) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "techniques",
    [
        lambda: [LargeBatch(2, lr=0.02)],
        lambda: [EightBitOptimizer()],
        lambda: [LargeBatch(2, lr=0.02), EightBitOptimizer(embeddings=True)],
        lambda: [
            LargeBatch(2, lr=0.02),
            ProgressiveStacking([(0.0, 0.5), (0.3, 1.0)], rewarmup=0.3),
            EightBitOptimizer(),
        ],
    ],
    ids=["LAMB", "8-bit AdamW", "8-bit LAMB", "all, growing"],
)
def test_a_resumed_run_is_the_uninterrupted_one(techniques: Any, tmp_path: Path) -> None:
    def run(*also: Callback, **options: Any) -> Any:
        _, trainer = trained(tmp_path, *techniques(), *also, name="bert", build={"width": 64}, **options)
        return left(trainer)

    whole = run(save_every_step(tmp_path / "saved"))
    for stop in (1, 3, 6):
        rest = run(resume=tmp_path / "saved" / f"step={stop}.ckpt")
        assert_same(whole, rest, f"resumed at step {stop}")


def test_one_optimizer_does_not_go_on_with_another_s_state(tmp_path: Path) -> None:
    saver = save_every_step(tmp_path / "saved")
    trained(tmp_path, saver, name="bert", build={"optimizer": "adamw8bit"}, max_steps=2)
    with pytest.raises(ValueError, match="optimizer='adamw' cannot go on with the state of .*'adamw8bit'; resume with"):
        trained(tmp_path, name="bert", max_steps=4, resume=tmp_path / "saved" / "step=2.ckpt")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: [LargeBatch(0)], {}, "times=0 must be at least 1"),
        (lambda: [LargeBatch(optimizer="sgd")], {}, "optimizer='sgd': choose 'lamb', 'lars' or 'own'"),  # type: ignore[arg-type]
        (lambda: [LargeBatch(lr=0.0)], {}, "lr=0.0 must be above 0"),
        (
            lambda: [LargeBatch(3)],
            {},
            r"8 batches ends inside an optimizer step of 3; pass Trainer\(limit_train_batches=6",
        ),
        (
            lambda: [LargeBatch(2)],
            {"build": {"optimizer": OPTIMIZERS["Adam"]}},
            "optimizer='lamb' adapts the parameters that decay, and the module's optimizer has none",
        ),
        (lambda: [EightBitOptimizer(), LargeBatch(2)], {}, "put LargeBatch in front of EightBitOptimizer"),
        (
            lambda: [EightBitOptimizer()],
            {"build": {"optimizer": OPTIMIZERS["Adafactor"]}},
            "no 8-bit form of timm.optim",
        ),
    ],
)
def test_what_cannot_work_is_one_clear_error(make: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, *make(), **options)


def test_the_trainer_is_itself_again_after_an_exception(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            assert trainer.accumulate_grad_batches == 4
            raise RuntimeError("here")

    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[LargeBatch(2), Stops()])
    with pytest.raises(RuntimeError, match="here"):
        trainer.fit(build("plain_torch"), loader("plain_torch"))
    assert trainer.accumulate_grad_batches == 2
