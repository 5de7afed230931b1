"""The guards against what happens to processes: signals, kills, full disks, hostile environments."""

import contextlib
import errno
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_scale.guards import CheckpointWriteError, SafeCheckpointIO, check_writable, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

pytestmark = pytest.mark.filterwarnings("ignore")

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
        variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        self.log = root / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(root), repr(options)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(name: str = "first", **options: Any) -> Run:
        runs.append(Run(tmp_path / name, **options))
        return runs[-1]

    yield begin
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()


def assert_same_end(path: Path, other: Path) -> None:
    a, b = load_checkpoint(path), load_checkpoint(other)
    assert a["global_step"] == b["global_step"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    moments, others = (x["optimizer_states"][0]["state"] for x in (a, b))
    for index, state in moments.items():
        assert all(torch.equal(value, others[index][key]) for key, value in state.items())


# --- PreemptionGuard --------------------------------------------------------------------------------------------------


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


# --- FiniteGuard ------------------------------------------------------------------------------------------------------


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


# --- Checkpoint files -------------------------------------------------------------------------------------------------


def kill_while_saving(folder: Path, seed: int, save: Callable[[dict[str, Any], Path], None]) -> None:
    """Let a child save one checkpoint after another, and kill it at some moment after the first."""
    weights = torch.arange(2_000_000, dtype=torch.float32)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            for step in range(10_000):
                content = {"pytorch-lightning_version": "2.6.6", "global_step": step, "weights": weights + step}
                save(content, folder / f"{step % 2}.ckpt")
                (folder / "begun").touch()
        os._exit(1)
    while not (folder / "begun").exists():
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_killed_while_saving(tmp_path: Path) -> None:
    plugin, leftovers = SafeCheckpointIO(), 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        kill_while_saving(folder, seed, plugin.save_checkpoint)
        leftovers += len(list(folder.glob(".saving-*.tmp")))
        for path in folder.glob("*.ckpt"):
            content = load_checkpoint(path)
            assert torch.equal(content["weights"][:3] - content["global_step"], torch.arange(3.0))
        SafeCheckpointIO().save_checkpoint({}, folder / "next")
        assert not list(folder.glob(".saving-*.tmp"))
    assert leftovers >= 10, "the kills came between saves, so nothing was tested"


def test_killed_while_saving_in_place(tmp_path: Path) -> None:
    """The control: files written where they are read are broken by the same kills."""
    broken = 0
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        kill_while_saving(folder, seed, torch.save)
        for path in folder.glob("*.ckpt"):
            try:
                load_checkpoint(path)
            except ValueError:
                broken += 1
    assert broken


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


@pytest.mark.parametrize("size", [0, 1, 5_000, 300_000])
@pytest.mark.parametrize("name", ["old.ckpt", "new.ckpt"])
def test_full_disk(tmp_path: Path, size: int, name: str) -> None:
    plugin = SafeCheckpointIO()
    content = {"pytorch-lightning_version": "2.6.6", "weights": torch.ones(100)}
    plugin.save_checkpoint(content, tmp_path / "old.ckpt")
    larger = content | {"weights": torch.ones(200_000)}
    with largest_file(size), pytest.raises(CheckpointWriteError, match=f"{tmp_path / name}: File too large") as caught:
        plugin.save_checkpoint(larger, tmp_path / name)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]
    assert torch.equal(load_checkpoint(tmp_path / "old.ckpt")["weights"], content["weights"])
    with largest_file(size), pytest.raises(CheckpointWriteError, match=str(tmp_path)):
        check_writable(tmp_path)
    plugin.save_checkpoint(larger, tmp_path / name)


HOSTILE = """
import os, sys
from pathlib import Path

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

before = {name.split(".")[0] for name in sys.modules}
from lit_scale.guards import CheckpointError, SafeCheckpointIO

loaded = {name.split(".")[0] for name in sys.modules} - before
assert loaded <= {"lit_scale", *sys.stdlib_module_names}, f"the guards should need Lightning alone, not {loaded}"


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
torch.save({"pytorch-lightning_version": "2.6.6", "callbacks": {"A": {"b": Payload()}}}, "bad.ckpt")
for weights_only in (None, False, True):
    try:
        SafeCheckpointIO().load_checkpoint("bad.ckpt", weights_only=weights_only)
    except CheckpointError as error:
        assert "posix.mkdir" in str(error)
    else:
        raise AssertionError("loaded")
assert not Path("executed").exists()
TorchCheckpointIO().load_checkpoint("bad.ckpt")
assert Path("executed").exists(), "by itself Lightning runs it in this environment"
"""


def test_an_environment_that_asks_for_unsafe_loading(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert run_python(HOSTILE, env={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}).returncode == 0
