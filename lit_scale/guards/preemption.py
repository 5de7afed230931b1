"""Preemption: signals are answered with a checkpoint at the next optimizer step."""

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
            # not print(), which the signal may have interrupted and which cannot be called inside of itself
            os.write(1, f"\n{signal.Signals(number).name}: a checkpoint follows at the next step\n".encode())
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
            out = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # a progress bar would break the command's line
            print(f"{signal.Signals(received).name}: saved {path}; resume with: {command}", file=out, flush=True)
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
