"""Checkpoint files, against damage, foreign code, kills while saving, full disks and hostile environments."""

import contextlib
import errno
import io
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_scale.guards import (
    CheckpointError,
    CheckpointWriteError,
    SafeCheckpointIO,
    StepSeed,
    check_writable,
    load_checkpoint,
)
from tests.support.data import numbers
from tests.support.equality import same
from tests.support.networks import Net
from tests.support.training import trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint, saved through the plugin."""
    root = tmp_path_factory.mktemp("good")
    fitted = trainer_of(root, StepSeed(), max_steps=3, plugins=[SafeCheckpointIO()])
    fitted.fit(Net(), numbers())
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
    fitted = trainer_of(tmp_path, StepSeed(), max_steps=3, plugins=[SafeCheckpointIO()])
    fitted.fit(Net(), numbers())
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
    resumed = trainer_of(folder, plugins=[SafeCheckpointIO()])
    with pytest.raises(CheckpointError, match="posix"):
        resumed.fit(Net(), numbers(), ckpt_path=bad, weights_only=False)
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

    def noted(*args: Any) -> None:
        calls.append(args)
        parent(*args)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", noted)
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
    content: dict[str, Any] = {"pytorch-lightning_version": "2.6.6", "weights": torch.ones(100)}
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
