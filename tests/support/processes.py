"""Scripts and recipes run in processes of their own, and the two ranks of a distributed run.

`run_python` runs a script to its end. `run_file` runs one in this process, as its command line would. A test of two
ranks runs its own file by `run_ranks`: Lightning starts the second process, `run_phases` trains there from the start
and from saved steps, and `of_ranks` is what both left in a folder. `Run` is a training script that can be signalled.
"""

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lit_scale.guards import load_checkpoint
from tests.support.equality import assert_same

ROOT = Path(__file__).resolve().parents[2]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

# What a distributed launcher leaves in the environment; a script of its own must not take itself for a rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """Variables for a process that is no rank, can import the repository, and has one thread."""
    variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    path = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    return variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)} | more


def end_group(process: "subprocess.Popen[Any]") -> None:
    """Kill a process that leads its own group, and with it the ranks and workers that it started."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)


def run_python(
    script: str | Path,
    *args: str | Path,
    folder: Path,
    timeout: float = 120,
    env: dict[str, str] | None = None,
    cwd: str | Path | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a script, a path or a text that is left in the folder, in a process of its own; see the fixture."""
    if isinstance(script, str):
        text, script = script, folder / "script.py"
        script.write_text(textwrap.dedent(text))
    command = [sys.executable, str(script), *map(str, args)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**(env or {})),
        cwd=cwd or folder,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end_group(process)
            stdout, stderr = process.communicate()
            print(stdout, stderr, sep="\n")
            raise
        finally:
            end_group(process)  # nothing that a script started outlives its test
    if process.returncode:
        print(stdout, stderr, sep="\n")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def run_file(path: Path, *flags: str) -> int:
    """Run a recipe's own file in this process, as its command line would; the exit code."""
    given, sys.argv = sys.argv, [str(path), *flags]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = given
    return 0


# ---- two ranks


def run_ranks(script: str, cases: Sequence[str], folder: Path, timeout: float = 280) -> str:
    """Run the cases of a test's own file in two processes; what they printed."""
    done = run_python(Path(script), ",".join(cases), folder, folder=folder, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


def run_phases(case: str, folder: Path, stops: Sequence[int], fit: Callable[[Path, str, Path | None], Any]) -> None:
    """Train as `fit(folder, phase, resume)` does, whole and from each stop; every rank leaves what it holds."""
    torch.set_num_threads(1)
    place = folder / case
    place.mkdir(exist_ok=True)
    for stop in (None, *stops):
        phase = "whole" if stop is None else f"from {stop}"
        resume = None if stop is None else place / "whole" / f"step={stop}.ckpt"
        found = fit(place, phase, resume)
        torch.save(found, place / f"{phase}-{dist.get_rank()}.pt")


def cases_asked_for() -> tuple[list[str], Path]:
    """In the processes that `run_ranks` started: the cases, and the folder."""
    return sys.argv[1].split(","), Path(sys.argv[2])


def of_ranks(folder: Path, phase: str = "whole") -> list[dict[str, Any]]:
    """What the two ranks left of a phase."""
    return [torch.load(folder / f"{phase}-{rank}.pt", weights_only=True) for rank in (0, 1)]


# ---- runs that are signalled

# Training with dropout, shuffled data and accumulation over two batches. Slow where it is to be signalled: from step 3.
TRAINING = """
import os, sys, time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.guards import FiniteGuard, PreemptionGuard, SafeCheckpointIO, StepSeed, shield_worker

torch.set_num_threads(1)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Net(pl.LightningModule):
    def __init__(self, pause=0.0, fault=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
        self.pause, self.fault = pause, fault

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 3:
            time.sleep(self.pause)
        loss = (self.body(batch) - 1).square().mean()
        if self.fault and batch_idx == 5 and self.trainer.global_rank == 1:
            loss = loss + float("inf")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Tell(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            print(f"rank {trainer.global_rank} is {os.getpid()}", flush=True)

    def on_exception(self, trainer, module, exception):
        print(f"rank {trainer.global_rank} raised {type(exception).__name__}: {exception}", flush=True)


def fit(root, path=None, pause=0.0, ranks=1, workers=0, guard=True, fault=False):
    root = Path(root)
    callbacks = [StepSeed(), Tell(), FiniteGuard()] + ([PreemptionGuard(root / "saved")] if guard else [])
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=2, default_root_dir=root,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, accumulate_grad_batches=2, callbacks=callbacks, plugins=[SafeCheckpointIO()],
    )
    shield = {"worker_init_fn": shield_worker, "num_workers": workers} if workers else {}
    loader = ResumableLoader(Numbers(), batch_size=2, shuffle=True, seed=3, **shield)
    trainer.fit(Net(pause, fault), loader, ckpt_path=path)
    return trainer


if __name__ == "__main__":
    options = eval(sys.argv[2])
    linger = options.pop("linger", 0)
    try:
        trainer = fit(sys.argv[1], **options)
    finally:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            time.sleep(linger)  # as if it had logs to bring away
    trainer.save_checkpoint(Path(sys.argv[1]) / "end.ckpt")
"""


class Run:
    """A training script in a process group of its own, what it says, and how it ends."""

    def __init__(self, root: Path, **options: Any) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        script = root / "train.py"
        script.write_text(TRAINING)
        self.log = root / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(root), repr(options)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )

    def ranks(self, count: int) -> list[int]:
        """Process ids by rank, once all are in the middle of training."""
        deadline = time.monotonic() + 150  # of which a quiet machine needs 10
        while time.monotonic() < deadline and self.process.poll() is None:
            found = dict(re.findall(r"rank (\d) is (\d+)\n", self.log.read_text()))
            if len(found) == count:
                return [int(found[str(rank)]) for rank in range(count)]
            time.sleep(0.05)
        raise AssertionError(f"training did not get under way:\n{self.log.read_text()}")

    def ended(self) -> tuple[int, float]:
        """Exit code, and the seconds it took from now; no process is left behind."""
        start = time.monotonic()
        code = self.process.wait(timeout=120)
        seconds = time.monotonic() - start
        print(self.log.read_text())  # shown if the test fails
        with pytest.raises(ProcessLookupError):  # the group is empty
            os.killpg(self.process.pid, 0)
        return code, seconds

    @property
    def saved(self) -> Path:
        (path,) = (self.root / "saved").iterdir()
        assert f"saved {path}; resume with" in self.log.read_text()
        return path


def assert_same_end(path: Path, other: Path) -> None:
    a, b = load_checkpoint(path), load_checkpoint(other)
    for part in ("global_step", "state_dict", "optimizer_states"):
        assert_same(a[part], b[part], part)
