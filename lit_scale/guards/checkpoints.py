"""Safe checkpoint files: written completely or not at all, and verified before they are loaded."""

import contextlib
import errno
import io
import os
import pickle
import pickletools
import re
import shutil
import socket
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.serialization import config as serialization

__all__ = ["CheckpointError", "CheckpointWriteError", "SafeCheckpointIO", "check_writable", "load_checkpoint"]


class CheckpointError(ValueError):
    """A file must not be loaded as a checkpoint: it is damaged, of another kind, or unsafe."""


class CheckpointWriteError(OSError):
    """A checkpoint or its folder cannot be written; an earlier file of that name is unchanged."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files completely or not at all, and verifies them before they are loaded.

    Saving writes a temporary file in the same folder, syncs it, and renames it. If the process is killed or the disk is
    full, an earlier file of that name is unchanged; a later run removes the temporary file at its first save. Loading
    uses :func:`load_checkpoint`. Remote targets (``s3://...``) are saved by Lightning. ``load_from_checkpoint`` does
    not use plugins: call :func:`load_checkpoint` on its file first.

    Raises:
        CheckpointWriteError: When saving fails, with path and cause.
        CheckpointError: When a file must not be loaded, with path, cause and the newest intact checkpoint.

    Example:
        >>> trainer = Trainer(plugins=[SafeCheckpointIO()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._swept: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = _local(path)
        if target is None or storage_options is not None:
            return super().save_checkpoint(checkpoint, os.fspath(path), storage_options)
        folder = target.parent
        temporary = folder / f".saving-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder not in self._swept:
                _sweep(folder)
                self._swept.add(folder)
            with open(temporary, "wb") as file, serialization.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            with contextlib.suppress(OSError):  # some systems do not sync folders
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__  # torch raises its own error from that of the system
            if cause is None:
                raise
            raise _write_error(target, cause) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(path, map_location)  # weights_only is always True


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Load a Lightning checkpoint: verify the checksum of every record, and run no code from the file.

    Args:
        path: A local file, or a URL that fsspec can read.
        map_location: As in ``torch.load``.

    Raises:
        CheckpointError: If the file must not be loaded; the message has the path, the cause, and the newest intact
            checkpoint in the same folder.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> weights = load_checkpoint(folder / "last.ckpt")["state_dict"]
    """
    target = _local(path)
    if target is not None and target.is_dir():
        raise CheckpointError(f"{path}: a folder, so a sharded checkpoint; only the strategy that wrote it can load it")
    filesystem, name = url_to_fs(str(path))
    try:
        with open(target, "rb") if target is not None else io.BytesIO(filesystem.cat_file(name)) as file:
            return _read(file, map_location)
    except CheckpointError as error:
        good = None if target is None else _newest_intact(target)
        advice = f"The newest intact checkpoint beside it: {good}" if good else "No intact checkpoint is beside it"
        raise CheckpointError(f"{path}: {error}. {advice}.") from error


def _read(file: IO[bytes], map_location: Any) -> dict[str, Any]:
    head = file.read(2**20)
    if not head:
        raise CheckpointError("the file is empty")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    except Exception as error:  # arbitrary bytes can raise exceptions of many types
        if head.startswith(b"PK"):
            raise CheckpointError(f"truncated, or damaged in its index ({error})") from error
        called = ", ".join(_globals(head)[:3])
        raise CheckpointError(
            f"a bare pickle that calls {called}; refused" if called else "not a checkpoint"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"damaged: the record {damaged} does not match its checksum")
    if not pickles:
        raise CheckpointError("a zip archive, but not a checkpoint")
    file.seek(0)
    try:
        # an explicit weights_only takes precedence over TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names the first global that it refuses, but not if it is stored by a newer pickle protocol
        usual = ("torch.", "collections.")
        names = re.findall(r"GLOBAL (\S+)", str(error)) or [n for n in _globals(pickles[0]) if not n.startswith(usual)]
        raise CheckpointError(
            f"unsafe: loading would call {', '.join(names[:3]) or 'code'}; refused, nothing was run. If the file is "
            "yours, keep only numbers, strings, tensors and plain containers in callback state and hyperparameters"
        ) from error
    except Exception as error:
        raise CheckpointError(f"torch cannot read it ({error})") from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise CheckpointError("not a Lightning checkpoint; load a bare state_dict with load_state_dict")
    return checkpoint


def _globals(data: bytes) -> list[str]:
    """Names of the globals that a pickle would import, found without running it."""
    found, strings = [], ["", ""]
    with contextlib.suppress(Exception):  # it may be truncated, or not a pickle
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return found


def _newest_intact(bad: Path) -> Path | None:
    others = [path for path in bad.parent.glob(f"*{bad.suffix}") if path != bad and path.is_file()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(CheckpointError, OSError), open(path, "rb") as file:
            _read(file, "meta")
            return path
    return None


def _sweep(folder: Path) -> None:
    """Remove temporary files whose process has ended (on this machine) or that are older than an hour (on others)."""
    for path in folder.glob(".saving-*-*-*.tmp"):
        with contextlib.suppress(OSError, ValueError):
            host, pid, _ = path.stem.removeprefix(".saving-").rsplit("-", 2)
            dead = time.time() - path.stat().st_mtime > 3600
            if host == socket.gethostname():
                try:
                    os.kill(int(pid), 0)
                    dead |= int(pid) == os.getpid()  # an earlier process: ids repeat in restarted containers
                except ProcessLookupError:
                    dead = True
            if dead:
                path.unlink()


def _local(path: str | os.PathLike[str]) -> Path | None:
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None


def _write_error(path: Path, cause: OSError) -> CheckpointWriteError:
    text = f"cannot write {path}: {cause.strerror or cause}; free space or choose another folder. Nothing was replaced"
    return CheckpointWriteError(cause.errno, text)


def check_writable(folder: str | os.PathLike[str], need: int = 2**20) -> None:
    """Create a folder and check that files can be written to it, before a long run depends on it.

    Args:
        folder: A local folder; a remote address is not checked.
        need: Bytes that must be free (default 1 MiB). At most 1 MiB is written as a test.

    Raises:
        CheckpointWriteError: If writing fails or space is missing; the message has the folder and the cause.

    Example:
        >>> check_writable(folder, need=10 * 2**20)
    """
    path = _local(folder)
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(min(need, 2**20)))
            file.flush()
            os.fsync(file.fileno())
        if (free := shutil.disk_usage(path).free) < need:
            raise OSError(errno.ENOSPC, f"{free / 2**20:.0f} MiB are free, {need / 2**20:.0f} MiB needed")
    except OSError as error:
        raise _write_error(path, error) from error
