"""The guards inside one process, against runs without the fault; taking the guard away makes the difference."""

import contextlib
import io
import math
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.guards import (
    CheckpointError,
    CheckpointWriteError,
    FiniteGuard,
    NonFiniteError,
    PreemptionGuard,
    SafeCheckpointIO,
    StepSeed,
    check_writable,
    load_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore")


class Numbers(torch.utils.data.Dataset):
    """Sample i is a function of i."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Net(pl.LightningModule):
    """Dropout in training; a hook that changes weights after each batch; what it drew and lost, for the record."""

    def __init__(self, after_batch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.register_buffer("average", torch.zeros(2, 8))
        self.after_batch = after_batch
        self.losses: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.body(batch) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.after_batch and (self.trainer.global_step % 2):
            self.average.lerp_(self.body[2].weight.detach(), 0.1)
            self.body[2].weight.data.lerp_(self.average, 0.01)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(torch.rand(()).item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data(workers: int = 0) -> ResumableLoader:
    return ResumableLoader(Numbers(), batch_size=2, shuffle=True, seed=3, num_workers=workers)


def trainer(root: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=list(callbacks),
        **(defaults | options),
    )


def snapshot(fitted: pl.Trainer) -> dict[str, Tensor]:
    """Weights and optimizer state, all tensors by name."""
    tensors = {name: value.clone() for name, value in fitted.lightning_module.state_dict().items()}
    for index, state in fitted.optimizers[0].state_dict()["state"].items():
        tensors |= {f"{index}/{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return tensors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class SaveAt(pl.Callback):
    """Saves where ModelCheckpoint does, and stops there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop")


# --- FiniteGuard ------------------------------------------------------------------------------------------------------


class Faulty(Net):
    """Goes wrong in one micro-batch, counted from 0."""

    def __init__(self, fault: str, batch: int) -> None:
        super().__init__()
        self.fault, self.batch = fault, batch
        if fault == "gradient":
            self.body[0].weight.register_hook(lambda g: g.index_fill(0, torch.tensor(1), math.inf) if self.now else g)

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
    clean = trainer(tmp_path, StepSeed(), max_steps=step - 1, accumulate_grad_batches=accumulate)
    clean.fit(Net(), data())

    guarded = trainer(tmp_path, StepSeed(), FiniteGuard(), accumulate_grad_batches=accumulate)
    model = Faulty(fault, batch)
    with pytest.raises(NonFiniteError, match=rf"step {step} \(epoch 0, batch ") as caught:
        guarded.fit(model, data())
    assert guarded.global_step == step - 1
    assert same(snapshot(guarded), snapshot(clean))
    text = str(caught.value)
    if fault == "gradient":
        assert "gradient is not finite in body.0.weight," in text
    else:
        assert f"the loss is {'nan' if fault == 'nan loss' else 'inf'}" in text
        assert f"batch {batch})" in text
    assert "learning rate" in text


@pytest.mark.parametrize("fault", ["nan loss", "gradient"])
def test_without_the_guard_the_weights_are_lost(tmp_path: Path, fault: str) -> None:
    plain = trainer(tmp_path, StepSeed(), max_epochs=1)
    plain.fit(Faulty(fault, 4), data())
    assert not all(value.isfinite().all() for value in snapshot(plain).values())


def test_finite_runs_are_left_alone(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([StepSeed()], [FiniteGuard(), StepSeed()]):
        runs.append(trainer(tmp_path, *callbacks))
        runs[-1].fit(Net(), data())
    assert same(snapshot(runs[0]), snapshot(runs[1]))


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
    trainer(tmp_path, FiniteGuard(), max_steps=2).fit(Lookup(1.0), data())
    trainer(tmp_path, FiniteGuard(), max_steps=2).fit(Lookup(1e30), data())  # finite, though their squares are not
    bad = Lookup(1.0)
    bad.table.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(NonFiniteError, match=r"table\.weight"):
        trainer(tmp_path, FiniteGuard(), max_steps=2).fit(bad, data())


def test_a_grad_scaler_may_meet_infinite_gradients(tmp_path: Path) -> None:
    def run(model: Net) -> pl.Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        fitted = trainer(tmp_path, FiniteGuard(), max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        fitted.fit(model, data())
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

    trainer(tmp_path, Counted(), max_steps=4, accumulate_grad_batches=2).fit(Net(), data())
    assert counts == [1] * 4


def test_the_last_checkpoint_stays_good(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_last=True, save_on_exception=True)
    guarded = trainer(tmp_path, FiniteGuard(), keep, enable_checkpointing=True, plugins=[SafeCheckpointIO()])
    with pytest.raises(NonFiniteError):
        guarded.fit(Faulty("nan loss", 5), data())
    saved = load_checkpoint(tmp_path / "c" / "last.ckpt")
    assert saved["global_step"] == 5
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


# --- StepSeed ---------------------------------------------------------------------------------------------------------


class Augmented(Net):
    """Also draws where augmentation on the device does, before the batch's start."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + torch.randn_like(batch) if self.trainer.training else batch


def resume_differs(
    tmp_path: Path, model: type[Net], stop: int, callbacks: Callable[[], list[pl.Callback]], **options: Any
) -> bool:
    """Whether a run stopped at a step and resumed in a dirty process state ends other than the uninterrupted one."""
    validation = torch.utils.data.DataLoader(Numbers(), batch_size=16) if options.pop("validate", False) else None
    whole = trainer(tmp_path, *callbacks(), **options)
    torch.manual_seed(1)
    whole.fit(model(), data(), validation)
    path = tmp_path / "stop.ckpt"
    with pytest.raises(KeyError, match="stop"):
        trainer(tmp_path, *callbacks(), SaveAt(stop, path), **options).fit(model(), data(), validation)
    second = trainer(tmp_path, *callbacks(), **options)
    fresh = model()
    torch.manual_seed(999)
    second.fit(fresh, data(), validation, ckpt_path=path)
    assert second.global_step == whole.global_step
    return not same(snapshot(second), snapshot(whole))


@pytest.mark.parametrize("stop", [1, 7, 15, 16, 17])  # 16 batches an epoch
def test_resume_is_exact_with_dropout(tmp_path: Path, stop: int) -> None:
    assert not resume_differs(tmp_path, Augmented, stop, lambda: [StepSeed(5)])


def test_resume_is_exact_with_accumulation_and_validation(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4, "validate": True}
    assert not resume_differs(tmp_path, Augmented, 5, lambda: [StepSeed(5)], **options)


def test_without_step_seed_resume_differs(tmp_path: Path) -> None:
    assert resume_differs(tmp_path, Net, 7, list)


class Seeds(pl.Callback):
    """The seed in force in each training batch."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seeds.append(torch.initial_seed())


@pytest.mark.parametrize("stop", [7, 16])
def test_the_counter_goes_on_where_it_stopped(tmp_path: Path, stop: int) -> None:
    logs = [Seeds(), Seeds(), Seeds()]
    trainer(tmp_path, StepSeed(), logs[0]).fit(Net(), data())
    with pytest.raises(KeyError):
        trainer(tmp_path, StepSeed(), logs[1], SaveAt(stop, tmp_path / "a.ckpt")).fit(Net(), data())
    trainer(tmp_path, StepSeed(), logs[2]).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert logs[1].seeds + logs[2].seeds == logs[0].seeds
    assert len(set(logs[0].seeds)) == 32, "no batch shares its seed"


def test_validation_draws_the_same_and_shifts_nothing(tmp_path: Path) -> None:
    validation = torch.utils.data.DataLoader(Numbers(), batch_size=16)
    with_validation, without = Net(), Net()
    trainer(tmp_path, StepSeed()).fit(with_validation, data(), validation)
    trainer(tmp_path, StepSeed()).fit(without, data())
    assert with_validation.losses == without.losses
    first, second = with_validation.validated[:2], with_validation.validated[2:]
    assert first == second
    assert first[0] != first[1]


def test_ranks_and_seeds_draw_differently_and_cheaply() -> None:
    def drawn(seed: int, rank: int, batch: int) -> float:
        device = SimpleNamespace(root_device=torch.device("cpu"))
        loop = SimpleNamespace(total_batch_idx=batch)
        fake: Any = SimpleNamespace(global_rank=rank, strategy=device, fit_loop=loop)
        StepSeed(seed).on_train_batch_start(fake, fake, None, 0)
        return torch.rand((), dtype=torch.float64).item()

    places = [(seed, rank, batch) for seed in range(3) for rank in range(3) for batch in range(3)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(1, 1, 1) == drawn(1, 1, 1)
    fastest = math.inf
    for _ in range(20):
        start = time.perf_counter()
        drawn(0, 0, 0)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 1e-4


def test_the_current_cuda_device_is_seeded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = (torch.Generator().manual_seed(7), torch.Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    loop, device = SimpleNamespace(total_batch_idx=0), SimpleNamespace(root_device=torch.device("cuda", 1))
    fake: Any = SimpleNamespace(global_rank=1, strategy=device, fit_loop=loop)
    StepSeed().on_train_batch_start(fake, fake, None, 0)
    assert generators[1].initial_seed() == torch.initial_seed()
    assert generators[0].initial_seed() == 7


# --- PreemptionGuard, with real signals to this process; more in test_guards_processes.py -----------------------------


class Signal(pl.Callback):
    """Sends this process a signal in a given hook, and keeps a log of hooks."""

    def __init__(self, hook: str = "", at: int = -1, number: int = signal.SIGTERM) -> None:
        self.hook, self.at, self.number = hook, at, number
        self.events: list[str] = []

    def _maybe(self, hook: str, step: int) -> None:
        if (hook, step) == (self.hook, self.at):
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._maybe("batch", trainer.fit_loop.total_batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.events.append(f"batch {trainer.fit_loop.total_batch_idx}")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._maybe("validation", trainer.global_step)
        self.events.append("validation")

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.events.append(f"start {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.events.append(f"end {trainer.current_epoch}")


def preempt(tmp_path: Path, hook: str, at: int, **options: Any) -> tuple[int, Path, list[str], list[str], bool]:
    """Signal, leave, resume: the step left at, the file, both logs of hooks, and whether the end is the same."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 8} | options
    validation = torch.utils.data.DataLoader(Numbers(), batch_size=16)
    whole = trainer(tmp_path, StepSeed(), straight := Signal(), **options)
    whole.fit(Net(after_batch=True), data(), validation)

    first = Signal(hook, at)
    stopped = trainer(tmp_path, PreemptionGuard(tmp_path / "p"), StepSeed(), first, **options)
    with pytest.raises(SystemExit) as left:
        stopped.fit(Net(after_batch=True), data(), validation)
    assert left.value.code == 143
    (path,) = (tmp_path / "p").iterdir()  # one file, and nothing provisional or temporary

    second = Signal()
    resumed = trainer(tmp_path, PreemptionGuard(tmp_path / "q"), StepSeed(), second, **options)
    torch.manual_seed(999)
    resumed.fit(Net(after_batch=True), data(), validation, ckpt_path=path)
    assert resumed.global_step == whole.global_step
    step = stopped.global_step
    return step, path, straight.events, first.events + second.events, same(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize(
    ("hook", "at", "step", "options"),
    [
        ("batch", 4, 3, {}),  # in the first half of a window: leaves at its end
        ("batch", 5, 3, {}),
        ("batch", 7, 5, {}),  # validation follows step 4
        ("batch", 15, 9, {}),  # validation and the epoch's end follow step 8
        ("batch", 16, 9, {}),
        ("validation", 4, 5, {}),
        ("batch", 15, 9, {"check_val_every_n_epoch": None, "val_check_interval": 10}),  # the epoch's end alone
        (
            "batch",
            19,
            11,
            {"check_val_every_n_epoch": None, "val_check_interval": 10},
        ),  # validation counted over epochs
    ],
)
def test_preempted_and_resumed_is_uninterrupted(
    tmp_path: Path, hook: str, at: int, step: int, options: dict[str, Any]
) -> None:
    left_at, path, straight, logged, exact = preempt(tmp_path, hook, at, **options)
    assert left_at == step
    assert path.name == f"preempted-step={step}.ckpt"
    assert logged == straight, "no batch, validation or end of an epoch is left out or done twice"
    assert exact


def test_epochs_of_one_step_leave_too(tmp_path: Path) -> None:
    """Each step is followed by the end of an epoch, so there is none to wait for; weights are exact all the same."""
    step, _, _, _, exact = preempt(
        tmp_path, "batch", 2, max_epochs=6, limit_train_batches=2, val_check_interval=1.0, check_val_every_n_epoch=2
    )
    assert step == 3
    assert exact


def test_lightning_leaves_out_what_follows_a_step_it_resumes_from(tmp_path: Path) -> None:
    """The reason for the spare file: should Lightning mend this, the guard can leave at once."""
    log = Signal()
    with pytest.raises(KeyError):
        trainer(tmp_path, SaveAt(16, tmp_path / "a.ckpt")).fit(Net(), data())
    trainer(tmp_path, log).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert "end 0" not in log.events
    assert "start 1" not in log.events


@pytest.mark.parametrize(
    ("at", "steps", "options"),
    [
        (15, 8, {"max_epochs": 1}),
        (9, 5, {"max_steps": 5}),
        (13, 8, {"max_epochs": 1, "val_check_interval": 14}),  # waits for the next step, which is the last
    ],
)
def test_a_run_that_ends_first_ends_normally(tmp_path: Path, at: int, steps: int, options: dict[str, int]) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    guard, sent = PreemptionGuard(tmp_path / "p"), Signal("batch", at)
    ending = trainer(tmp_path, guard, sent, accumulate_grad_batches=2, **options)
    ending.fit(Net(), data(), torch.utils.data.DataLoader(Numbers(), batch_size=16))
    assert ending.global_step == steps
    assert not list((tmp_path / "p").iterdir())
    assert {number: signal.getsignal(number) for number in before} == before


def test_handlers_are_restored_after_an_error(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    inside: list[Any] = []

    class Fails(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            inside.append(signal.getsignal(signal.SIGINT))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        trainer(tmp_path, PreemptionGuard()).fit(Fails(), data())
    assert inside[0] != before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before


def test_it_works_again_in_the_same_process(tmp_path: Path) -> None:
    guard = PreemptionGuard(tmp_path)
    for _ in range(2):
        with pytest.raises(SystemExit):
            trainer(tmp_path, guard, Signal("batch", 3)).fit(Net(), data())
    trainer(tmp_path, guard).fit(Net(), data())


def test_a_repeated_signal_does_not_cut_the_teardown_short(tmp_path: Path) -> None:
    guard = PreemptionGuard(tmp_path)
    stopped, seen = trainer(tmp_path, guard, Signal("batch", 3)), []
    teardown = stopped.strategy.teardown
    stopped.strategy.teardown = lambda: seen.append(signal.getsignal(signal.SIGTERM)) or teardown()
    with pytest.raises(SystemExit):
        stopped.fit(Net(), data())
    assert seen == [guard._note]


def test_a_second_sigint_interrupts_at_once(tmp_path: Path) -> None:
    class Twice(Signal):
        def _maybe(self, hook: str, step: int) -> None:
            if (hook, step) == ("batch", 3):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    stopped = trainer(tmp_path, PreemptionGuard(tmp_path / "p"), Twice(), accumulate_grad_batches=2)
    previous = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as left:
            stopped.fit(Net(), data())
    finally:
        signal.signal(signal.SIGINT, previous)
    assert left.value.code == 1  # Lightning's answer to an interrupt
    assert not (tmp_path / "p").exists()


def test_where_it_saves_and_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = ModelCheckpoint(tmp_path / "kept here", every_n_train_steps=100)
    guard = PreemptionGuard(resume_command="again --from {path} --set {a}")
    with pytest.raises(SystemExit):
        trainer(tmp_path, guard, keep, Signal("batch", 3), enable_checkpointing=True).fit(Net(), data())
    path = tmp_path / "kept here" / "preempted-step=4.ckpt"
    assert f"SIGTERM: saved {path}; resume with: again --from '{path}' --set {{a}}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        trainer(tmp_path / "root", PreemptionGuard(), Signal("batch", 3)).fit(Net(), data())
    path = tmp_path / "root" / "preempted-step=4.ckpt"
    assert f"resume with: trainer.fit(..., ckpt_path={path})\n" in capsys.readouterr().out
    assert load_checkpoint(path)["global_step"] == 4


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be caught"):
        PreemptionGuard(signals=(signal.SIGKILL,))
    with pytest.raises(ValueError, match=r"\{path\}"):
        PreemptionGuard(resume_command="python train.py")
    caught: list[BaseException] = []

    def fit() -> None:
        try:
            trainer(tmp_path, PreemptionGuard()).fit(Net(), data())
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


# --- Checkpoint files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint, saved through the plugin."""
    root = tmp_path_factory.mktemp("good")
    fitted = trainer(root, StepSeed(), max_steps=3, plugins=[SafeCheckpointIO()])
    fitted.fit(Net(), data())
    fitted.save_checkpoint(root / "good.ckpt")
    return root / "good.ckpt"


@pytest.fixture
def folder(tmp_path: Path, good: Path) -> Path:
    """Where good.ckpt is what a damaged file should be answered with."""
    (tmp_path / "good.ckpt").write_bytes(good.read_bytes())
    return tmp_path


def refuse(path: Path, cause: str) -> None:
    """The file is refused by plugin and function, with its name, the cause, and good.ckpt beside it."""
    for load in (SafeCheckpointIO().load_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=cause) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert f"newest intact checkpoint beside it: {path.parent / 'good.ckpt'}" in str(caught.value)


def test_round_trip_is_exact_and_leaves_nothing_else(tmp_path: Path, good: Path) -> None:
    fitted = trainer(tmp_path, StepSeed(), max_steps=3, plugins=[SafeCheckpointIO()])
    fitted.fit(Net(), data())
    saved = load_checkpoint(good)
    assert same(saved["state_dict"], dict(fitted.lightning_module.state_dict()))
    assert [path.name for path in good.parent.iterdir()] == ["good.ckpt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert good.stat().st_mode == plain.stat().st_mode, "others can read it as they can read other new files"


@pytest.mark.parametrize("fraction", [0.0, 1e-4, 0.01, 0.2, 0.5, 0.9, 0.98, 0.999, 1.0])
def test_truncated(folder: Path, good: Path, fraction: float) -> None:
    content = good.read_bytes()
    (folder / "bad.ckpt").write_bytes(content[: min(int(len(content) * fraction), len(content) - 1)])
    refuse(folder / "bad.ckpt", "empty" if fraction == 0 else "truncated" if fraction > 1e-4 else "truncated|not a che")


def tensor_bytes(content: bytes) -> list[tuple[str, range]]:
    """Name and place of each tensor's bytes, from the zip format itself."""
    places = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                start = record.header_offset
                name, extra = (int.from_bytes(content[start + at : start + at + 2], "little") for at in (26, 28))
                start += 30 + name + extra
                places.append((record.filename, range(start, start + record.file_size)))
    return places


def test_one_flipped_bit_anywhere_in_the_tensors(folder: Path, good: Path) -> None:
    draw, content = random.Random(0), good.read_bytes()
    silent = 0
    for _ in range(20):
        name, place = draw.choice(tensor_bytes(content))
        flipped = bytearray(content)
        flipped[draw.choice(place)] ^= 1 << draw.randrange(8)
        (folder / "bad.ckpt").write_bytes(flipped)
        refuse(folder / "bad.ckpt", f"the record {name} does not match its checksum")
        with contextlib.suppress(Exception):
            TorchCheckpointIO().load_checkpoint(folder / "bad.ckpt")
            silent += 1
    assert silent == 20, "Lightning by itself loads every one of them"


def test_one_flipped_bit_anywhere_in_the_file(folder: Path, good: Path) -> None:
    """Refused, or harmless because it hit padding: never loaded as something else."""
    draw, content, truth = random.Random(1), good.read_bytes(), load_checkpoint(good)["state_dict"]
    refused = 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / "bad.ckpt").write_bytes(flipped)
        try:
            assert same(load_checkpoint(folder / "bad.ckpt")["state_dict"], truth)
        except CheckpointError:
            refused += 1
    assert refused > 75


def test_other_files(folder: Path) -> None:
    bad = folder / "bad.ckpt"
    bad.write_bytes(random.Random(0).randbytes(10_000))
    refuse(bad, "not a checkpoint")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("notes.txt", "hello")
    refuse(bad, "a zip archive, but not a checkpoint")
    torch.save({"weight": torch.zeros(3)}, bad)
    refuse(bad, "not a Lightning checkpoint")
    torch.save(torch.zeros(3), bad)
    refuse(bad, "not a Lightning checkpoint")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(folder / "none.ckpt")
    (folder / "sharded.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="a sharded checkpoint"):
        load_checkpoint(folder / "sharded.ckpt")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


def poison(path: Path, good: Path, flag: Path, protocol: int) -> None:
    content = torch.load(good, weights_only=True)
    content["callbacks"]["Innocent"] = {"state": Payload(flag)}
    torch.save(content, path, pickle_protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_checkpoint_is_not_run(folder: Path, good: Path, protocol: int) -> None:
    bad, flag = folder / "bad.ckpt", folder / "executed"
    poison(bad, good, flag, protocol)
    refuse(bad, r"unsafe: loading would call posix\.mkdir")
    with pytest.raises(CheckpointError, match="posix"):
        SafeCheckpointIO().load_checkpoint(bad, weights_only=False)
    resumed = trainer(folder, plugins=[SafeCheckpointIO()])
    with pytest.raises(CheckpointError, match="posix"):
        resumed.fit(Net(), data(), ckpt_path=bad, weights_only=False)
    bad.write_bytes(pickle.dumps({"pytorch-lightning_version": "2.6.6", "x": Payload(flag)}, protocol=protocol))
    refuse(bad, r"a bare pickle that calls posix\.mkdir")
    assert not flag.exists()

    poison(bad, good, flag, protocol)
    TorchCheckpointIO().load_checkpoint(bad, weights_only=False)
    assert flag.exists(), "the payload works where it is let"


def test_the_fallback_is_the_newest_intact_one(folder: Path, good: Path) -> None:
    for age, name in enumerate(["bad", "newer-but-bad", "newest-good", "older-good"]):
        path = folder / f"{name}.ckpt"
        path.write_bytes(good.read_bytes()[: None if "good" in name else -100])
        os.utime(path, (2e9 - age, 2e9 - age))
    with pytest.raises(CheckpointError, match="newest-good"):
        load_checkpoint(folder / "bad.ckpt")
    (folder / "alone").mkdir()
    (folder / "alone" / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match="No intact checkpoint"):
        load_checkpoint(folder / "alone" / "a.ckpt")


def test_failed_saves_change_nothing(folder: Path, good: Path) -> None:
    plugin = SafeCheckpointIO()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        plugin.save_checkpoint({"hook": lambda: None, "weights": torch.zeros(1000)}, folder / "good.ckpt")
    assert (folder / "good.ckpt").read_bytes() == good.read_bytes()
    with pytest.raises(CheckpointWriteError, match="good.ckpt/new.ckpt") as caught:
        plugin.save_checkpoint({}, folder / "good.ckpt" / "new.ckpt")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno
    (folder / "taken.ckpt").mkdir()
    with pytest.raises(CheckpointWriteError, match="taken.ckpt"):
        plugin.save_checkpoint({}, folder / "taken.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == ["good.ckpt", "taken.ckpt"]


def test_checksums_are_written_even_when_switched_off(folder: Path, good: Path) -> None:
    content = load_checkpoint(good)
    torch.serialization.set_crc32_options(False)
    try:
        SafeCheckpointIO().save_checkpoint(content, folder / "new.ckpt")
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_checkpoint(folder / "new.ckpt")["state_dict"], content["state_dict"])


def test_remote_targets_go_lightnings_way(monkeypatch: pytest.MonkeyPatch, good: Path) -> None:
    plugin, content, calls = SafeCheckpointIO(), load_checkpoint(good), []
    parent = TorchCheckpointIO.save_checkpoint
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda *args: calls.append(args) or parent(*args))
    plugin.save_checkpoint(content, "memory://here/a.ckpt")
    assert len(calls) == 1
    assert same(plugin.load_checkpoint("memory://here/a.ckpt")["state_dict"], content["state_dict"])
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint(content, good, storage_options={})


def test_sweeping_leaves_the_living_alone(tmp_path: Path) -> None:
    here = socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    files = {
        f".saving-{here}-{ended.pid}-0.tmp": False,
        f".saving-{here}-{os.getpid()}-0.tmp": False,
        f".saving-{here}-{os.getppid()}-0.tmp": True,
        ".saving-else-where-1-0.tmp": True,
        ".saving-else-where-2-0.tmp": False,
        ".saving-not-one-of-ours.tmp": True,
        "notes.tmp": True,
    }
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    os.utime(tmp_path / ".saving-else-where-2-0.tmp", (0, 0))
    SafeCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {name for name, stays in files.items() if stays} | {"a.ckpt"}


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"], "the folder is made and left empty"
    (tmp_path / "file").touch()
    for below in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(CheckpointWriteError, match=str(below)):
            check_writable(below)
    with pytest.raises(CheckpointWriteError, match=r"a: \d+ MiB are free, 1125899906842624 MiB needed"):
        check_writable(tmp_path / "a", need=2**70)
    check_writable("memory://anywhere")
