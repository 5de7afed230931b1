"""Preemption: on a signal, save a checkpoint at the next optimizer step and exit."""

import atexit
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["PreemptionGuard", "shield_worker"]


class PreemptionGuard(Callback):
    """On SIGTERM or SIGINT, saves a checkpoint at the next optimizer step and exits with code 128 + signal.

    The handlers only record the signal. At each step the ranks exchange one scalar. If any of them has received a
    signal, all save together and raise SystemExit (143 for SIGTERM, 130 for SIGINT), after which Lightning tears down.
    A second SIGINT interrupts at once. A run that ends before the next step ends normally.

    The saved state is that after the complete step: this callback runs last, and calls the module's own
    ``on_train_batch_end`` before it saves. When Lightning resumes from a step that is followed by a validation or by
    the end of an epoch, it skips these. At such a step the guard saves a checkpoint in case time runs out, continues,
    and exits at the following step.

    Any rank may get the signal under ``ddp``, torchrun and SLURM; spawn and fork launchers lose the exit code. If the
    whole process group gets the signal (Ctrl-C, scancel), give loaders with workers ``worker_init_fn=shield_worker``.

    Args:
        dirpath: Folder for ``preempted-step=N.ckpt``; by default ModelCheckpoint's, else ``default_root_dir``.
        signals: Signals to handle.
        resume_command: Command that resumes the run, with ``{path}`` for the checkpoint; printed by rank 0.

    Raises:
        ValueError: If a signal cannot be caught, or ``resume_command`` has no ``{path}``.
        RuntimeError: If training starts outside the main thread, where Python handles no signals.

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
                f"signals={tuple(signals)}: {unfit} cannot be caught; use SIGTERM, SIGINT, SIGUSR1 or similar"
            )
        if resume_command is not None and "{path}" not in resume_command:
            raise ValueError(f"resume_command={resume_command!r} needs {{path}} where the checkpoint's path goes")
        self.dirpath = dirpath
        self.signals = tuple(signals)
        self.resume_command = resume_command or "trainer.fit(..., ckpt_path={path})"
        self._received = 0  # number of the signal; 0 for none
        self._steps = 0  # optimizer steps that were already checked
        self._spare: str | None = None  # checkpoint of a step from which Lightning does not resume exactly
        self._handlers: dict[int, Any] = {}  # the previous handlers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # a new list: Lightning is iterating over the present one
        lightning: Any = trainer  # which does not declare its callbacks
        lightning.callbacks = [*(callback for callback in lightning.callbacks if callback is not self), self]

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
        if not self._received and getattr(rank_zero_only, "rank", 0) == 0:
            # not print(), which the signal may have interrupted and which is not reentrant
            os.write(1, f"\n{signal.Signals(number).name}: saving a checkpoint at the next step\n".encode())
        self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # a checkpoint does not hold the gradients of an unfinished accumulation window
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
            # Lightning would call this next, and does not call it when it resumes
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
            out = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # a progress bar would break the command's line
            print(f"{signal.Signals(received).name}: saved {path}; resume with: {command}", file=out, flush=True)
        children = [p for p in getattr(trainer.strategy.launcher, "procs", ()) if isinstance(p, subprocess.Popen)]
        if children:
            # Lightning watches this list: if one of them exits with a nonzero code, it kills all, itself first
            trainer.strategy.launcher.procs.clear()  # type: ignore[union-attr]
            atexit.register(_await_ranks, children, self.signals)
        raise SystemExit(128 + received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._spare is not None:
            trainer.strategy.remove_checkpoint(self._spare)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (SystemExit, KeyboardInterrupt)):
            self._handlers = {}  # keep ours: a repeated signal must not interrupt the teardown
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def shield_worker(worker_id: int) -> None:
    """Let a DataLoader worker survive one SIGTERM and one SIGINT; pass it to the loader as ``worker_init_fn``.

    Otherwise a signal to the whole process group would end the workers, and the main process would get no more batches
    to reach the step at which it saves. A second signal ends the worker, because the loader may need to stop it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _await_ranks(children: "list[subprocess.Popen[bytes]]", signals: Sequence[int], patience: float = 30.0) -> None:
    """Wait until the other ranks of this node have ended, so that none outlives the process that the user started."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    if dist.is_initialized():
        dist.destroy_process_group()  # the other ranks may wait for this in theirs
    deadline = time.monotonic() + patience
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
