"""PreemptionGuard, with real signals: to this process, to processes of their own, and to groups of them."""

import os
import runpy
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_scale.guards import (
    PreemptionGuard,
    StepSeed,
    load_checkpoint,
)
from tests.support.data import Numbers, numbers
from tests.support.equality import same
from tests.support.networks import Net
from tests.support.processes import Run, assert_same_end
from tests.support.training import SaveAt, left, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")


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
    whole = trainer_of(tmp_path, StepSeed(), straight := Signal(), **options)
    whole.fit(Net(after_batch=True), numbers(), validation)

    first = Signal(hook, at)
    stopped = trainer_of(tmp_path, PreemptionGuard(tmp_path / "p"), StepSeed(), first, **options)
    with pytest.raises(SystemExit) as ended:
        stopped.fit(Net(after_batch=True), numbers(), validation)
    assert ended.value.code == 143
    (path,) = (tmp_path / "p").iterdir()  # one file, and nothing provisional or temporary

    second = Signal()
    resumed = trainer_of(tmp_path, PreemptionGuard(tmp_path / "q"), StepSeed(), second, **options)
    torch.manual_seed(999)
    resumed.fit(Net(after_batch=True), numbers(), validation, ckpt_path=path)
    assert resumed.global_step == whole.global_step
    step = stopped.global_step
    return step, path, straight.events, first.events + second.events, same(left(resumed), left(whole))


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
        trainer_of(tmp_path, SaveAt(16, tmp_path / "a.ckpt")).fit(Net(), numbers())
    trainer_of(tmp_path, log).fit(Net(), numbers(), ckpt_path=tmp_path / "a.ckpt")
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
    ending = trainer_of(tmp_path, guard, sent, accumulate_grad_batches=2, **options)
    ending.fit(Net(), numbers(), torch.utils.data.DataLoader(Numbers(), batch_size=16))
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
        trainer_of(tmp_path, PreemptionGuard()).fit(Fails(), numbers())
    assert inside[0] != before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before


def test_it_works_again_in_the_same_process(tmp_path: Path) -> None:
    guard = PreemptionGuard(tmp_path)
    for _ in range(2):
        with pytest.raises(SystemExit):
            trainer_of(tmp_path, guard, Signal("batch", 3)).fit(Net(), numbers())
    trainer_of(tmp_path, guard).fit(Net(), numbers())


def test_a_repeated_signal_does_not_cut_the_teardown_short(tmp_path: Path) -> None:
    guard = PreemptionGuard(tmp_path)
    stopped: Any = trainer_of(tmp_path, guard, Signal("batch", 3))
    seen: list[Any] = []
    teardown = stopped.strategy.teardown

    def noted() -> None:
        seen.append(signal.getsignal(signal.SIGTERM))
        teardown()

    stopped.strategy.teardown = noted
    with pytest.raises(SystemExit):
        stopped.fit(Net(), numbers())
    assert seen == [guard._note]


def test_a_second_sigint_interrupts_at_once(tmp_path: Path) -> None:
    class Twice(Signal):
        def _maybe(self, hook: str, step: int) -> None:
            if (hook, step) == ("batch", 3):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    stopped = trainer_of(tmp_path, PreemptionGuard(tmp_path / "p"), Twice(), accumulate_grad_batches=2)
    previous = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            stopped.fit(Net(), numbers())
    finally:
        signal.signal(signal.SIGINT, previous)
    assert ended.value.code == 1  # Lightning's answer to an interrupt
    assert not (tmp_path / "p").exists()


def test_where_it_saves_and_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = ModelCheckpoint(tmp_path / "kept here", every_n_train_steps=100)
    guard = PreemptionGuard(resume_command="again --from {path} --set {a}")
    with pytest.raises(SystemExit):
        trainer_of(tmp_path, guard, keep, Signal("batch", 3), enable_checkpointing=True).fit(Net(), numbers())
    path = tmp_path / "kept here" / "preempted-step=4.ckpt"
    assert f"SIGTERM: saved {path}; resume with: again --from '{path}' --set {{a}}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        trainer_of(tmp_path / "root", PreemptionGuard(), Signal("batch", 3)).fit(Net(), numbers())
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
            trainer_of(tmp_path, PreemptionGuard()).fit(Net(), numbers())
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_process(start: Callable[..., Run], tmp_path: Path, number: int, code: int) -> None:
    run = start(pause=0.05)
    os.kill(run.ranks(1)[0], number)
    ended, seconds = run.ended()
    assert ended == code
    assert seconds < 30  # of which a quiet machine needs 2

    fit = runpy.run_path(str(run.root / "train.py"))["fit"]
    fit(tmp_path / "whole").save_checkpoint(tmp_path / "whole.ckpt")
    torch.manual_seed(999)
    fit(tmp_path / "resumed", path=run.saved).save_checkpoint(tmp_path / "resumed.ckpt")
    assert_same_end(tmp_path / "resumed.ckpt", tmp_path / "whole.ckpt")


def signalled(start: Callable[..., Run], targets: list[int], **options: Any) -> Run:
    run = start(pause=0.05, ranks=2, **options)
    pids = run.ranks(2)
    for target in targets:
        os.kill(pids[target], signal.SIGTERM)
    code, seconds = run.ended()
    text = run.log.read_text()
    assert code == 143
    assert seconds < 30  # of which a quiet machine needs 3
    assert all(f"rank {rank} raised SystemExit: 143" in text for rank in range(2))
    assert text.count("resume with") == 1, "rank 0 speaks for all"
    assert load_checkpoint(run.saved)["global_step"] >= 3
    return run


@pytest.mark.slow
def test_two_ranks_of_which_the_second_is_signalled(start: Callable[..., Run]) -> None:
    signalled(start, [1])


@pytest.mark.slow
def test_two_ranks_of_which_the_first_is_signalled(start: Callable[..., Run]) -> None:
    # Lightning looks every 5 seconds whether another rank has ended, and would kill this one for it
    signalled(start, [0], linger=7)


@pytest.mark.slow
def test_two_ranks_both_signalled_resume_exactly(start: Callable[..., Run]) -> None:
    path = signalled(start, [0, 1]).saved
    ends = []
    for name, options in {"whole": {}, "resumed": {"path": str(path)}}.items():
        run = start(name, ranks=2, **options)
        assert run.process.wait(timeout=90) == 0, run.log.read_text()
        ends.append(run.root / "end.ckpt")
    assert_same_end(*ends)


@pytest.mark.slow
def test_lightning_alone_does_not_get_there(start: Callable[..., Run]) -> None:
    """The fault that the guard is for: training stops and nothing is saved."""
    run = start(pause=0.05, guard=False)
    os.kill(run.ranks(1)[0], signal.SIGTERM)
    run.process.wait(timeout=120)
    assert not list(run.root.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_the_whole_process_group(start: Callable[..., Run], ranks: int, number: int) -> None:
    """Ctrl-C and scancel reach the workers of the loader too."""
    run = start(pause=0.05, ranks=ranks, workers=2)
    run.ranks(ranks)
    os.killpg(run.process.pid, number)
    assert run.ended()[0] == 128 + number
    assert load_checkpoint(run.saved)["global_step"] >= 3
