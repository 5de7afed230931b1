"""What is done inside of each context leaves no trace; what it does not promise to put back stays."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

import lit_scale.restoring
from lit_scale.restoring import undone, unnoticed, unseen
from tests.support.data import loader
from tests.support.equality import assert_same, same
from tests.support.networks import PlainTorch
from tests.support.training import left, quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Measured(PlainTorch):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        return loss


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """Of a network that has been trained for two steps."""
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, max_steps=2, logger=CSVLogger(tmp_path))
    trainer.fit(Measured(), loader("plain_torch"))
    return trainer


def state(trainer: Any) -> dict[str, Any]:
    module = trainer.lightning_module
    return {
        "left": left(trainer),
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "metric": [module.mean.metric_state["mean_value"].clone(), module.mean._update_count],
        "modes": [part.training for part in module.modules()],
        "random": torch.get_rng_state(),
        "loggers": list(map(id, trainer.loggers)),
        "methods": sorted(vars(module).keys() & {"log", "log_dict"}),
    }


def look(trainer: Any) -> None:
    """Run the network: its metric, a buffer, modes and the random state change."""
    module = trainer.lightning_module
    module.train()
    batch = next(iter(loader("plain_torch")))
    module.training_step(batch, 0)
    module.net.eval()


def learn(trainer: Any) -> None:
    look(trainer)
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    module.per_sample_loss(next(iter(loader("plain_torch")))).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.state[module.net.head.weight]["more"] = 1


def changed(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {part for part in one if not same(one[part], other[part])}


def test_without_a_context_everything_changes(trainer: Any) -> None:
    before = state(trainer)
    trainer.lightning_module.log = lambda *_: None
    learn(trainer)
    trainer.loggers = []
    assert changed(before, state(trainer)) == set(before)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(
    ("context", "act", "kept"),
    [
        (lambda trainer: unnoticed(trainer.lightning_module), look, {"left"}),  # a buffer, which is among the weights
        (lambda trainer: unseen(trainer, trainer.lightning_module), look, set()),
        (lambda trainer: unseen(trainer, trainer.lightning_module), learn, {"left", "gradients"}),
        (lambda trainer: undone(trainer, trainer.lightning_module), learn, set()),
    ],
    ids=["unnoticed", "unseen", "unseen cannot learn", "undone"],
)
def test_what_was_done_leaves_no_trace(
    context: Callable[[Any], Any], act: Callable[[Any], None], kept: set[str], raises: bool, trainer: Any
) -> None:
    before = state(trainer)
    with pytest.raises(KeyError) if raises else nullcontext(), context(trainer):
        act(trainer)
        if raises:
            raise KeyError("inside")
    assert changed(before, state(trainer)) == kept


def test_nothing_is_logged_meanwhile(trainer: Any) -> None:
    metrics = dict(trainer.callback_metrics)
    with unseen(trainer, trainer.lightning_module):
        trainer.lightning_module.log("train/loss", torch.tensor(-1.0))
        trainer.logger.log_metrics({"a": 1.0})
    assert_same(metrics, dict(trainer.callback_metrics))
    with pytest.raises(MisconfigurationException, match="self.log"):
        trainer.lightning_module.log("train/loss", 0.0)  # Lightning's own again


def test_copies_that_do_not_fit_are_refused_before_anything_is_done(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lit_scale.restoring, "_free_memory", lambda: 10.0)
    with pytest.raises(MemoryError, match="copies of weights and optimizer"), undone(trainer, trainer.lightning_module):
        raise AssertionError("something was done")
