"""FiniteGuard, against runs without the fault; taking the guard away makes the difference."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_scale.guards import (
    FiniteGuard,
    NonFiniteError,
    SafeCheckpointIO,
    StepSeed,
    load_checkpoint,
)
from tests.support.data import numbers
from tests.support.equality import same
from tests.support.networks import Net
from tests.support.processes import Run
from tests.support.training import left, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Faulty(Net):
    """Goes wrong in one micro-batch, counted from 0."""

    def __init__(self, fault: str, batch: int) -> None:
        super().__init__()
        self.fault, self.batch = fault, batch
        if fault == "gradient":
            self.body[0].get_parameter("weight").register_hook(
                lambda g: g.index_fill(0, torch.tensor(1), math.inf) if self.now else g
            )

    @property
    def now(self) -> bool:
        return self.trainer.fit_loop.total_batch_idx == self.batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.now and self.fault == "nan loss":
            loss = loss * math.nan
        if self.now and self.fault == "infinite constant":  # with gradients as finite as ever
            loss = loss + math.inf
        return loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fault", ["nan loss", "infinite constant", "gradient"])
def test_stops_before_the_update(tmp_path: Path, fault: str, accumulate: int) -> None:
    step = 5  # the window of this step begins with the bad micro-batch
    batch = (step - 1) * accumulate
    clean = trainer_of(tmp_path, StepSeed(), max_steps=step - 1, accumulate_grad_batches=accumulate)
    clean.fit(Net(), numbers())

    guarded = trainer_of(tmp_path, StepSeed(), FiniteGuard(), accumulate_grad_batches=accumulate)
    model = Faulty(fault, batch)
    with pytest.raises(NonFiniteError, match=rf"step {step} \(epoch 0, batch ") as caught:
        guarded.fit(model, numbers())
    assert guarded.global_step == step - 1
    assert same(left(guarded), left(clean))
    text = str(caught.value)
    if fault == "gradient":
        assert "gradient is not finite in body.0.weight," in text
    else:
        assert f"the loss is {'nan' if fault == 'nan loss' else 'inf'}" in text
        assert f"batch {batch})" in text
    assert "learning rate" in text


@pytest.mark.parametrize("fault", ["nan loss", "gradient"])
def test_without_the_guard_the_weights_are_lost(tmp_path: Path, fault: str) -> None:
    plain = trainer_of(tmp_path, StepSeed(), max_epochs=1)
    plain.fit(Faulty(fault, 4), numbers())
    assert not all(value.isfinite().all() for value in left(plain)["weights"].values())


def test_finite_runs_are_left_alone(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([StepSeed()], [FiniteGuard(), StepSeed()]):
        runs.append(trainer_of(tmp_path, *callbacks))
        runs[-1].fit(Net(), numbers())
    assert same(left(runs[0]), left(runs[1]))


class Lookup(pl.LightningModule):
    """Sparse gradients."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4, sparse=True)
        self.scale = scale

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.table(torch.tensor([batch_idx, batch_idx + 1, batch_idx])).sum() * self.scale

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(self.parameters())


def test_sparse_and_very_large_gradients(tmp_path: Path) -> None:
    trainer_of(tmp_path, FiniteGuard(), max_steps=2).fit(Lookup(1.0), numbers())
    trainer_of(tmp_path, FiniteGuard(), max_steps=2).fit(
        Lookup(1e30), numbers()
    )  # finite, though their squares are not
    bad = Lookup(1.0)
    bad.table.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(NonFiniteError, match=r"table\.weight"):
        trainer_of(tmp_path, FiniteGuard(), max_steps=2).fit(bad, numbers())


def test_a_grad_scaler_may_meet_infinite_gradients(tmp_path: Path) -> None:
    def run(model: Net) -> pl.Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        fitted = trainer_of(tmp_path, FiniteGuard(), max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        fitted.fit(model, numbers())
        assert scaler.get_scale() < 2.0**126, "no infinite gradient was met, so nothing was tested"
        return fitted

    assert run(Net()).global_step == 16
    with pytest.raises(NonFiniteError, match="the loss is"):
        run(Faulty("nan loss", 12))


class CountSyncs(TorchDispatchMode):
    """Counts reads of a value by the host, which is what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_one_sync_per_step(tmp_path: Path) -> None:
    counts = []

    class Counted(FiniteGuard):
        def on_before_backward(self, *args: Any) -> None:
            with CountSyncs() as mode:
                super().on_before_backward(*args)
            assert mode.syncs == 0

        def on_before_optimizer_step(self, *args: Any) -> None:
            with CountSyncs() as mode:
                super().on_before_optimizer_step(*args)
            counts.append(mode.syncs)

    trainer_of(tmp_path, Counted(), max_steps=4, accumulate_grad_batches=2).fit(Net(), numbers())
    assert counts == [1] * 4


def test_the_last_checkpoint_stays_good(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_last=True, save_on_exception=True)
    guarded = trainer_of(tmp_path, FiniteGuard(), keep, enable_checkpointing=True, plugins=[SafeCheckpointIO()])
    with pytest.raises(NonFiniteError):
        guarded.fit(Faulty("nan loss", 5), numbers())
    saved = load_checkpoint(tmp_path / "c" / "last.ckpt")
    assert saved["global_step"] == 5
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.slow
def test_all_ranks_stop_when_one_loss_is_not_finite(start: Callable[..., Run]) -> None:
    """An infinite constant leaves all gradients finite, so only the guard can tell the other rank."""
    run = start(ranks=2, fault=True)
    assert run.process.wait(timeout=120)
    text = run.log.read_text()
    assert re.search(
        r"rank 0 raised NonFiniteError: another rank met a non-finite loss, before optimizer step 3 ", text
    )
    assert re.search(
        r"rank 1 raised NonFiniteError: the loss is inf, before optimizer step 3 \(epoch 0, batch 5\)", text
    )
