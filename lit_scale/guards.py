"""Guards for any Trainer and any LightningModule: stop before a bad update, survive preemption, keep checkpoints whole.

    Trainer(callbacks=[StepSeed(seed=1), FiniteGuard(), PreemptionGuard()], plugins=[SafeCheckpointIO()])

Each is independent of the others and of the rest of the package. None of them saves state of its own.
"""

import atexit
import contextlib
import hashlib
import io
import itertools
import math
import os
import pickle
import pickletools
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
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

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "FiniteGuard",
    "NonFiniteError",
    "PreemptionGuard",
    "SafeCheckpointIO",
    "StepSeed",
    "check_writable",
    "load_checkpoint",
]


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the update that would have used it was not made."""


class CheckpointError(ValueError):
    """A file that must not be loaded as a checkpoint: damaged, foreign or unsafe."""


class CheckpointWriteError(OSError):
    """A checkpoint or its folder that cannot be written; what was there before is untouched."""


class FiniteGuard(Callback):
    """Stops training before an optimizer step whose loss or gradients are NaN or infinite.

    Lightning by itself makes the update, ends as "finished" and overwrites the checkpoints. This guard looks at every
    loss of the accumulation window and at all gradients, with one device sync (and one scalar all-reduce, so that all
    ranks stop together) per step. Under a GradScaler only the loss counts: infinite gradients are how it finds its
    scale. Weights and optimizer state stay those of the previous step; running statistics (BatchNorm) have already
    seen the bad batch, so resume from the last checkpoint.

    Raises:
        NonFiniteError: In ``on_before_optimizer_step``, with step, epoch, batch, source and what to try.

    Example:
        >>> trainer = Trainer(callbacks=[FiniteGuard()], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []  # batch index and loss of each micro-batch since the last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((trainer.fit_loop.batch_idx, loss.detach().sum()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        probes = [loss for _, loss in losses]
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            parameters = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            gradients = [g for g in (_local_values(p.grad) for p in parameters) if g.numel()]
            # the largest magnitude, since the usual 2-norm of large but finite gradients can overflow
            probes.append(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf))
        finite = torch.stack([probe.isfinite().to(pl_module.device) for probe in probes]).all().int()
        if trainer.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            raise NonFiniteError(self._explain(trainer, pl_module, losses))

    def _explain(self, trainer: Trainer, pl_module: LightningModule, losses: list[tuple[int, Tensor]]) -> str:
        batch = trainer.fit_loop.batch_idx
        gradients = [(name, _local_values(p.grad)) for name, p in pl_module.named_parameters() if p.grad is not None]
        names = [name for name, gradient in gradients if not gradient.isfinite().all()]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        bad_losses = [(index, loss.item()) for index, loss in losses if not loss.isfinite()]
        if bad_losses:
            batch = bad_losses[0][0]
            what = f"the loss is {bad_losses[0][1]}" + (f" (gradients too: {shown})" if names else "")
        else:
            what = f"the gradient is not finite in {shown}" if names else "another rank met a non-finite loss"
        return (
            f"{what}, before optimizer step {trainer.global_step + 1} (epoch {trainer.current_epoch}, batch {batch}). "
            "The step was not made and the last checkpoint is good. Try a lower learning rate or a longer warm-up, "
            "Trainer(gradient_clip_val=1.0), precision 'bf16-mixed' or '32-true' in place of '16-mixed', and a look "
            "at that batch; Trainer(detect_anomaly=True) finds the operation."
        )


def _local_values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient held by this rank: a DTensor's shard, a sparse tensor's entries."""
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return gradient._values() if gradient.is_sparse else gradient


class PreemptionGuard(Callback):
    """Turns SIGTERM and SIGINT into a checkpoint at the next optimizer step, then ends with exit code 128 + signal.

    The handler only notes the signal. At each optimizer step the ranks agree by one scalar all-reduce (a single
    process pays nothing), save together, and leave through ``SystemExit`` after Lightning's teardown: 143 for
    SIGTERM, 130 for SIGINT, whichever ranks got the signal. A second SIGINT interrupts at once, without a checkpoint.
    If the run ends before that step it ends normally.

    Lightning, resuming from a step that is followed by validation or by the end of an epoch, leaves these out. So a
    signal at such a step saves at once, goes on, and replaces the file at the next step. The saved step is complete:
    this callback moves itself to the end of the list, and calls the module's ``on_train_batch_end`` before it saves.

    With ``ddp`` and external launchers (torchrun, SLURM) any rank may get the signal. The spawn and fork launchers
    hide the exit code of their workers, and their parent must not be the one that is signalled.

    Args:
        dirpath: Where ``preempted-step=N.ckpt`` goes; by default ModelCheckpoint's folder, else ``default_root_dir``.
        signals: What to act on.
        resume_command: How to go on, with ``{path}`` for the file; printed on rank 0 with the path.

    Raises:
        ValueError: For a signal that cannot be caught, or a resume command without ``{path}``.
        RuntimeError: When ``fit`` starts outside the main thread, where Python cannot handle signals.

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
        for number in signals:
            if number not in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                raise ValueError(
                    f"signals={tuple(signals)}: {number} cannot be caught; use SIGTERM, SIGINT, SIGUSR1, ..."
                )
        if resume_command is not None and "{path}" not in resume_command:
            raise ValueError(f"resume_command={resume_command!r} needs '{{path}}' where the checkpoint goes")
        self.dirpath = dirpath
        self.signals = tuple(signals)
        self.resume_command = resume_command
        self._received = 0  # the signal, or 0
        self._steps = 0  # optimizer steps already looked at
        self._provisional: str | None = None  # saved at a step that does not resume exactly
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # a new list: Lightning is iterating over the present one
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()
        self._steps, self._provisional = trainer.global_step, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # in the middle of an accumulation window: gradients are not in a checkpoint
        self._steps = trainer.global_step
        received = self._received
        if trainer.world_size > 1:
            shared = torch.tensor(received, device=trainer.strategy.root_device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            received = int(shared)
        if not received:
            return
        exact, last = self._judge(trainer, batch_idx)
        leave = not last and (exact or self._provisional is not None)
        if leave:  # the hook that Lightning would call next; resuming does not call it either
            pl_module.on_train_batch_end(outputs, batch, batch_idx)
        path = self._save(trainer)
        if not leave:
            self._provisional = path
            return
        command = self.resume_command or "trainer.fit(..., ckpt_path={path})"
        if trainer.is_global_zero:
            name = signal.Signals(received).name
            print(f"{name}: saved {path}; resume with: {command.replace('{path}', shlex.quote(path))}", flush=True)
        children = [p for p in getattr(trainer.strategy.launcher, "procs", ()) if isinstance(p, subprocess.Popen)]
        if children:
            # Lightning kills everything, this process first, when it sees a child exit non-zero. It watches this list.
            trainer.strategy.launcher.procs.clear()  # type: ignore[union-attr]
            atexit.register(_await_children, children, self.signals)
        raise SystemExit(128 + received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._provisional is not None:
            trainer.strategy.remove_checkpoint(self._provisional)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, (SystemExit, KeyboardInterrupt)):  # those are on the way out
            self._restore()

    def _judge(self, trainer: Trainer, batch_idx: int) -> tuple[bool, bool]:
        """Whether this step resumes exactly, and whether it is the last of the run."""
        interval = trainer.val_check_batch or math.inf
        validates = any((i + 1) % interval == 0 for i in (batch_idx, trainer.fit_loop.total_batch_idx))
        last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        last = trainer.global_step == trainer.max_steps or (trainer.is_last_batch and last_epoch)
        return not (validates or trainer.is_last_batch), last

    def _save(self, trainer: Trainer) -> str:
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        path = os.path.join(str(folder), f"preempted-step={trainer.global_step}.ckpt")
        path = trainer.strategy.broadcast(path)
        trainer.save_checkpoint(path)
        if self._provisional is not None:
            trainer.strategy.remove_checkpoint(self._provisional)
        return path

    def _install(self) -> None:
        if self._previous:
            return
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "PreemptionGuard: Python handles signals in the main thread only. Call trainer.fit there, or leave "
                "the guard out of this Trainer."
            )
        self._received = 0
        self._previous = {number: signal.signal(number, self._note) for number in self.signals}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if hasattr(signal, "SIGCHLD"):
            # A signal to the whole process group also ends DataLoader workers; torch would raise here, in mid-step.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _await_children(children: list["subprocess.Popen[bytes]"], signals: Sequence[int], patience: float = 30.0) -> None:
    """Let the other ranks of this node go first, so that none of them outlives this process."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    if dist.is_initialized():
        dist.destroy_process_group()  # first, because theirs may wait for ours
    deadline = time.monotonic() + patience
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


class StepSeed(Callback):
    """Makes dropout and all else that draws from torch's default generators a function of (seed, rank, batch).

    A resumed run then draws what the uninterrupted run would have drawn, on every rank, with nothing saved. Batches
    are counted over all epochs by Lightning's own counter, which is in every checkpoint. Validation batches are
    seeded by their place alone: each pass draws the same, and none shifts training. It costs microseconds.

    Only torch's CPU generator and the CUDA generator of the current device are set. Python's and numpy's are not:
    what draws from them belongs into the data, keyed by (seed, epoch, index). Data order is the loader's.

    Args:
        seed: Runs with the same seed draw the same numbers.

    Example:
        >>> trainer = Trainer(callbacks=[StepSeed(seed=1)], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # first, so that what other callbacks draw at a batch's start is covered; a new list, as this one is iterated
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def _set(self, trainer: Trainer, place: str) -> None:
        digest = hashlib.blake2b(f"{self.seed}/{trainer.global_rank}/{place}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") >> 1
        torch.default_generator.manual_seed(number)  # torch.manual_seed visits every backend: a hundred times slower
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._set(trainer, str(trainer.fit_loop.total_batch_idx))

    def _set_transfer(self, trainer: Trainer, *_: Any) -> None:
        # the next batch goes through on_after_batch_transfer (augmentation on the device) before on_train_batch_start
        self._set(trainer, f"transfer/{trainer.fit_loop.total_batch_idx + 1}")

    on_train_start = on_train_epoch_start = on_train_batch_end = on_validation_end = _set_transfer  # type: ignore[assignment]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._set(trainer, f"validation/{dataloader_idx}/{batch_idx}")


_LIFE = secrets.token_hex(4)  # tells this process from an earlier one with the same id, as in restarted containers
_COUNT = itertools.count()
_TEMPORARY = re.compile(r"\.saving-(.+)-(\d+)-([0-9a-f]{8})-\d+\.tmp")


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are whole or absent, and that are checked before they are believed.

    Saving writes beside the target, syncs, and renames, so that a kill or a full disk leaves the previous file as it
    was. What killed processes left behind is swept at the first save. Loading is :func:`load_checkpoint`. Remote
    targets (``s3://`` ...) are saved as Lightning saves them. ``LightningModule.load_from_checkpoint`` does not ask
    plugins; check such a file with :func:`load_checkpoint` first.

    Raises:
        CheckpointWriteError: When saving fails for lack of space or rights, with path and cause.
        CheckpointError: When a file is damaged, foreign or unsafe.

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
            super().save_checkpoint(checkpoint, os.fspath(path), storage_options)
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent not in self._swept:
                _sweep(target.parent)
                self._swept.add(target.parent)
            with _replacing(target) as file, serialization.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise  # not the disk's doing, such as something that cannot be pickled
            raise CheckpointWriteError(
                cause.errno, f"cannot write the checkpoint: {cause.strerror}; what was there is untouched", str(target)
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(path, map_location)  # whatever the caller says about weights_only


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Load a Lightning checkpoint after checking every byte, without ever running code from it.

    Each record's checksum is verified, and the pickle may hold tensors and plain containers only (``weights_only=True``
    said outright, which TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD cannot override).

    Args:
        path: A local file or an fsspec URL.
        map_location: As in ``torch.load``.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointError: With the file, the cause, and the newest intact checkpoint in the same folder.

    Example:
        >>> weights = load_checkpoint("runs/a/last.ckpt")["state_dict"]  # doctest: +SKIP
    """
    target = _local(path)
    if target is None:
        filesystem, name = url_to_fs(str(path))
        source: IO[bytes] = io.BytesIO(filesystem.cat_file(name))
    elif target.is_dir():
        raise CheckpointError(f"{target} is a folder: a sharded checkpoint, for the strategy that wrote it to load")
    else:
        source = open(target, "rb")
    try:
        with source:
            return _read(source, map_location)
    except CheckpointError as error:
        good = _newest_intact(target) if target is not None else None
        advice = f"The newest intact checkpoint beside it is {good}" if good else "No intact checkpoint is beside it"
        raise CheckpointError(f"{path}: {error}. {advice}.") from error.__cause__


def _read(file: IO[bytes], map_location: Any) -> dict[str, Any]:
    head = file.read(2**20)
    if not head:
        raise CheckpointError("the file is empty")
    try:
        with zipfile.ZipFile(file) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:  # whatever a zip reader may meet in arbitrary bytes
        if head.startswith(b"PK"):
            raise CheckpointError(f"the file is truncated or its index is damaged ({error})") from error
        found = _globals(head)
        kind = f"a bare pickle that would call {', '.join(found)}; refused" if found else "no checkpoint but other data"
        raise CheckpointError(f"the file is {kind}") from error
    if damaged is not None:
        raise CheckpointError(
            f"the record {damaged!r} does not match its checksum: bits have changed since it was saved"
        )
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if not pickles:
        raise CheckpointError("the file is a zip archive, but not one of torch.save's")
    file.seek(0)
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.findall(r"GLOBAL (\S+)", str(error))
        if not found:  # newer pickle protocols spell it differently, which torch refuses before it sees the name
            with zipfile.ZipFile(file) as archive:
                found = [name for name in _globals(archive.read(pickles[0])) if not name.startswith("torch.")]
        raise CheckpointError(
            f"loading it would call {', '.join(found[:3]) or 'code'}, which is neither a tensor nor a plain container; "
            "refused, nothing was run. If it is your own class, keep it out of callback state and hyperparameters"
        ) from error
    except Exception as error:
        raise CheckpointError(f"torch cannot read it ({error})") from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise CheckpointError("not a Lightning checkpoint; for a bare state_dict use torch.load and load_state_dict")
    return checkpoint


def _globals(data: bytes) -> list[str]:
    """What a pickle would import, read without running it."""
    found, strings = [], ["", ""]
    with contextlib.suppress(Exception):  # cut off, or no pickle at all
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return found


def _newest_intact(damaged: Path) -> Path | None:
    others = [path for path in damaged.parent.glob(f"*{damaged.suffix}") if path != damaged and path.is_file()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(CheckpointError, OSError), open(path, "rb") as file:
            _read(file, "meta")
            return path
    return None


def _local(path: str | os.PathLike[str]) -> Path | None:
    """The path on this machine, or None for a remote address."""
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the target's place once it is complete on disk, and leaves no trace otherwise."""
    temporary = target.parent / f".saving-{socket.gethostname()}-{os.getpid()}-{_LIFE}-{next(_COUNT)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some systems cannot sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(folder: Path) -> None:
    """Remove what dead processes left: of this machine by process id, of others (a shared disk) after an idle hour."""
    for path in folder.glob(".saving-*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or match[3] == _LIFE:
            continue
        with contextlib.suppress(OSError):
            here = match[1] == socket.gethostname()
            dead = here and (int(match[2]) == os.getpid() or not _alive(int(match[2])))
            if dead or time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's own error beneath torch's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def check_writable(folder: str | os.PathLike[str], need: int = 2**20) -> None:
    """Make a folder and prove, before hours of work depend on it, that it takes files.

    Args:
        folder: Created with its parents; a remote address is not checked.
        need: Bytes that must be free. Up to 1 MiB of them are really written.

    Raises:
        CheckpointWriteError: Naming the folder and the cause.

    Example:
        >>> check_writable("runs/a", need=10 * 2**30)  # doctest: +SKIP
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
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise CheckpointWriteError(error.errno, f"cannot write into the folder: {error.strerror}", str(path)) from error
    if free < need:
        raise CheckpointWriteError(
            28, f"the folder's disk has {free / 2**20:.0f} MiB free, {need / 2**20:.0f} MiB are needed", str(path)
        )
