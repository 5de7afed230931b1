"""Guards for any Trainer and any LightningModule: finite updates, exact randomness, preemption, checkpoint files.

    Trainer(callbacks=[StepSeed(seed=1), FiniteGuard(), PreemptionGuard()], plugins=[SafeCheckpointIO()])

Each works without the others and without the rest of the package, and none adds anything to a checkpoint.
"""

import atexit
import contextlib
import errno
import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
import torch.distributed as dist
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.serialization import config as serialization


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the update that would have used it was not made."""


class CheckpointError(ValueError):
    """A file that must not be loaded as a checkpoint: damaged, foreign or unsafe."""


class CheckpointWriteError(OSError):
    """A checkpoint or its folder cannot be written; what was there before is untouched."""


class FiniteGuard(Callback):
    """Stops before an optimizer step whose losses or gradients are NaN or infinite, on all ranks together.

    It looks at every loss of the accumulation window and at all gradients, for one device sync a step and, between
    ranks, one scalar. Under a GradScaler only losses count: infinite gradients are how it finds its scale. Weights
    and optimizer state stay those of the step before. Buffers (BatchNorm) have seen the bad batch: resume from a
    checkpoint of an earlier step, not from one that was saved on the exception.

    Raises:
        NonFiniteError: With step, epoch, batch, the loss or the first parameters, and what to try.

    Example:
        >>> trainer = Trainer(callbacks=[FiniteGuard()], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    _losses: list[tuple[int, Tensor]]  # batch index and loss of each micro-batch since the last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((trainer.fit_loop.batch_idx, loss.detach().sum()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        probes = [torch.zeros((), device=pl_module.device), *(loss for _, loss in losses)]
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            parameters = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            gradients = [g for g in map(_local_gradient, parameters) if g.numel()]
            # the largest magnitude: the usual 2-norm of large but finite gradients can overflow
            probes.append(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf))
        finite = torch.stack([probe.isfinite().to(pl_module.device) for probe in probes]).all().int()
        if trainer.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item():
            return
        bad = [(index, loss.item()) for index, loss in losses if not loss.isfinite()]
        batch, value = bad[0] if bad else (trainer.fit_loop.batch_idx, 0.0)
        parts = {name: _local_gradient(p) for name, p in pl_module.named_parameters() if p.grad is not None}
        names = [name for name, gradient in parts.items() if not gradient.isfinite().all()]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        what = f"the gradient is not finite in {shown}" if names else "another rank met a non-finite loss"
        raise NonFiniteError(
            f"{f'the loss is {value}' if bad else what}, before optimizer step {trainer.global_step + 1} (epoch "
            f"{trainer.current_epoch}, batch {batch}). That step was not made. Look at this batch; try a lower "
            "learning rate, a longer warm-up, gradient_clip_val=1.0, or precision 'bf16-mixed' or '32-true' instead of "
            "'16-mixed'; Trainer(detect_anomaly=True) finds the operation. Then resume from the last checkpoint."
        )


def _local_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The numbers of a gradient that this rank holds: of a DTensor its shard, of a sparse tensor its entries."""
    gradient = parameter.grad
    assert gradient is not None
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return gradient._values() if gradient.is_sparse else gradient


class StepSeed(Callback):
    """Makes dropout, and all else that draws from torch's generators, a function of (seed, rank, batch counter).

    A run resumed on as many ranks draws what the uninterrupted one would have drawn, with nothing saved: the counter
    is Lightning's own over all epochs, restored from every checkpoint. A validation batch is seeded by its place, so
    each pass draws the same and none shifts training. It costs microseconds a batch.

    Only the CPU generator and that of the current CUDA device are set. Python's and numpy's are not: what draws from
    them belongs to the data, keyed by (seed, epoch, index). The order of the data is the loader's.

    Args:
        seed: Runs with the same seed draw the same numbers.

    Example:
        >>> trainer = Trainer(callbacks=[StepSeed(seed=1)], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._set(trainer, str(trainer.fit_loop.total_batch_idx))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *place: Any) -> None:
        self._set(trainer, f"validation/{place[1:]}")  # batch_idx and dataloader_idx

    def _before_transfer(self, trainer: Trainer, *_: Any) -> None:
        # on_after_batch_transfer, where augmentation on the device is done, comes before on_train_batch_start
        self._set(trainer, f"transfer/{trainer.fit_loop.total_batch_idx + 1}")

    on_train_start = on_train_epoch_start = _before_transfer  # type: ignore[assignment]
    on_train_batch_end = on_validation_end = _before_transfer  # type: ignore[assignment]

    def _set(self, trainer: Trainer, place: str) -> None:
        digest = hashlib.blake2b(f"{self.seed}/{trainer.global_rank}/{place}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") >> 1
        torch.default_generator.manual_seed(number)  # torch.manual_seed asks every backend: a hundred times slower
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)


class PreemptionGuard(Callback):
    """Answers SIGTERM and SIGINT with a checkpoint at the next optimizer step and exit code 128 + signal.

    The handlers only take note. At each step the ranks agree, by one scalar, save together, and leave by SystemExit
    after Lightning's teardown, whichever of them got the signal (143 for SIGTERM, 130 for SIGINT). A second SIGINT
    interrupts at once. A run that ends before that step ends as it would have.

    The step is saved complete: this callback goes last, and calls the module's own ``on_train_batch_end`` first. But
    Lightning skips the validation and the epoch's end that should follow a step it resumes from. So at such a step
    the guard saves in case time runs out, goes on, and leaves from the next.

    Any rank may get the signal under ``ddp``, torchrun and SLURM; spawn and fork launchers lose the exit code. Where
    the whole process group gets it (Ctrl-C, scancel), give loaders with workers ``worker_init_fn=shield_worker``.

    Args:
        dirpath: Folder for ``preempted-step=N.ckpt``; by default ModelCheckpoint's, else ``default_root_dir``.
        signals: What to answer.
        resume_command: How to go on, with ``{path}`` for the file; printed by rank 0.

    Raises:
        ValueError: A signal that cannot be caught, or a resume command without ``{path}``.
        RuntimeError: Training starts outside the main thread, where Python handles no signals.

    Example:
        >>> guard = PreemptionGuard("runs/a", resume_command="python train.py --ckpt_path {path}")
        >>> trainer = Trainer(callbacks=[guard], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
        resume_command: str | None = None,
    ) -> None:
        if unfit := set(signals) - (signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}):
            raise ValueError(
                f"signals={tuple(signals)}: {unfit} cannot be caught; use SIGTERM, SIGINT, SIGUSR1 or such"
            )
        if resume_command is not None and "{path}" not in resume_command:
            raise ValueError(f"resume_command={resume_command!r} needs {{path}} where the checkpoint's path goes")
        self.dirpath = dirpath
        self.signals = tuple(signals)
        self.resume_command = resume_command or "trainer.fit(..., ckpt_path={path})"
        self._received = 0  # the signal
        self._steps = 0  # optimizer steps already looked at
        self._spare: str | None = None  # saved where Lightning does not resume exactly
        self._handlers: dict[int, Any] = {}  # those before ours

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # a new list: Lightning is going through the present one
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps, self._spare = trainer.global_step, None
        if self._handlers:
            return
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("PreemptionGuard needs trainer.fit in the main thread; call it there or drop the guard")
        self._received = 0
        self._handlers = {number: signal.signal(number, self._note) for number in self.signals}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # gradients of an unfinished accumulation window are in no checkpoint
        self._steps, received = trainer.global_step, self._received
        if trainer.world_size > 1:
            shared = torch.tensor(received, device=trainer.strategy.root_device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            received = int(shared)
        if not received:
            return
        every = trainer.val_check_batch or math.inf
        validates = any((index + 1) % every == 0 for index in (batch_idx, trainer.fit_loop.total_batch_idx))
        ends_epoch = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        ends_run = self._steps == trainer.max_steps or (ends_epoch and trainer.current_epoch + 1 == trainer.max_epochs)
        leaving = not ends_run and (self._spare is not None or not (validates or ends_epoch))
        if leaving:
            # Lightning would call this next, and does not make up for it at resume
            pl_module.on_train_batch_end(outputs, batch, batch_idx)
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        path = trainer.strategy.broadcast(os.path.join(str(folder), f"preempted-step={self._steps}.ckpt"))
        trainer.save_checkpoint(path, weights_only=False)
        if self._spare is not None:
            trainer.strategy.remove_checkpoint(self._spare)
        self._spare = path
        if not leaving:
            return
        if trainer.is_global_zero:
            command = self.resume_command.replace("{path}", shlex.quote(path))
            print(f"{signal.Signals(received).name}: saved {path}; resume with: {command}", flush=True)
        children = [p for p in getattr(trainer.strategy.launcher, "procs", ()) if isinstance(p, subprocess.Popen)]
        if children:
            # Lightning watches this list, and kills everything, itself first, when one of them exits with a code
            trainer.strategy.launcher.procs.clear()  # type: ignore[union-attr]
            atexit.register(_await_ranks, children, self.signals)
        raise SystemExit(128 + received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._spare is not None:
            trainer.strategy.remove_checkpoint(self._spare)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (SystemExit, KeyboardInterrupt)):
            self._handlers = {}  # on the way out: a repeated signal must not cut the teardown short
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def shield_worker(worker_id: int) -> None:
    """Let a DataLoader worker survive one SIGTERM and one SIGINT; give it to the loader as ``worker_init_fn``.

    A signal to the whole process group would otherwise end the workers, whose batches the main process needs to reach
    the step at which it saves. The next signal ends the worker, as the loader itself may have to.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _await_ranks(children: "list[subprocess.Popen[bytes]]", signals: Sequence[int], patience: float = 30.0) -> None:
    """Let the other ranks of this node end first, so that none outlives the process the user waits for."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    if dist.is_initialized():
        dist.destroy_process_group()  # theirs may wait for ours
    deadline = time.monotonic() + patience
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are whole or absent, and are checked before they are believed.

    Saving writes beside the target, syncs and renames: a kill or a full disk leaves the file before as it was, and
    what a kill left behind is swept at the next run's first save. Loading is :func:`load_checkpoint`. Remote targets
    (``s3://...``) are saved by Lightning's own means. ``load_from_checkpoint`` asks no plugin: check its file first.

    Raises:
        CheckpointWriteError: In saving, with path and cause.
        CheckpointError: In loading, with path, cause and what to load instead.

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
                cause = cause.__cause__ or cause.__context__  # torch covers the system's error with its own
            if cause is None:
                raise
            raise _write_error(target, cause) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(path, map_location)  # whatever was said about weights_only


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Load a Lightning checkpoint, every record checked by its checksum and no code in it run.

    Args:
        path: A local file, or an address that fsspec can read.
        map_location: As in ``torch.load``.

    Raises:
        CheckpointError: With the file, the cause, and the newest intact checkpoint in the same folder.
        FileNotFoundError: There is no such file.

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
    except Exception as error:  # whatever a reader may stumble over in arbitrary bytes
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
        # said outright, weights_only wins over TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names the first one it refuses, but not in the spelling of newer pickle protocols
        usual = ("torch.", "collections.")
        names = re.findall(r"GLOBAL (\S+)", str(error)) or [n for n in _globals(pickles[0]) if not n.startswith(usual)]
        raise CheckpointError(
            f"unsafe: loading would call {', '.join(names[:3]) or 'code'}; refused, nothing was run. If it is your "
            "own, keep in callback state and hyperparameters only numbers, strings, tensors and plain containers"
        ) from error
    except Exception as error:
        raise CheckpointError(f"torch cannot read it ({error})") from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise CheckpointError("not a Lightning checkpoint; a bare state_dict goes to load_state_dict")
    return checkpoint


def _globals(data: bytes) -> list[str]:
    """What a pickle would import, found without running it."""
    found, strings = [], ["", ""]
    with contextlib.suppress(Exception):  # it may be cut off, or no pickle at all
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
    """Remove what dead processes left: on this machine known by their ids, on others by an hour of silence."""
    for path in folder.glob(".saving-*-*-*.tmp"):
        with contextlib.suppress(OSError, ValueError):
            host, pid, _ = path.stem.removeprefix(".saving-").rsplit("-", 2)
            dead = time.time() - path.stat().st_mtime > 3600
            if host == socket.gethostname():
                try:
                    os.kill(int(pid), 0)
                    dead |= int(pid) == os.getpid()  # an earlier life: ids repeat in restarted containers
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
    """Create a folder and prove that it takes files, before hours of work depend on it.

    Args:
        folder: A local folder; a remote address is left unchecked.
        need: Bytes that must be free. Of them at most 1 MiB are written.

    Raises:
        CheckpointWriteError: With the folder and the cause.

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
