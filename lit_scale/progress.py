"""The run's progress in [0, 1], whatever limits it.

Where the micro-batches of an optimizer step change over the run, a callback says so by an attribute ``windows``: pairs
(first optimizer step, micro-batches of each step from there on), ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from lit_scale.trainers import callbacks_of

__all__ = ["Windows", "batches_after", "progress", "progress_after", "steps_after", "total_steps", "windows_of"]

Windows = Sequence[tuple[int, int]]


def progress(trainer: Trainer) -> float:
    """How much of the run is done, in [0, 1], whichever limit of the Trainer it is nearest to.

    In steps that is ``global_step / max_steps``; in epochs, optimizer steps over those of all epochs, or batches over
    those of all epochs where the batches of a step change over the run; in seconds, elapsed over allowed time, as rank
    0 sees it, so that all ranks agree. It stays the same between two optimizer steps, but for the seconds.

    Args:
        trainer: A Trainer with ``max_steps``, ``max_epochs`` or ``max_time``. Before its loaders exist the epochs
            count as not begun.
    """
    return _fraction(trainer, trainer.global_step)


def progress_after(trainer: Trainer, batches: int) -> float:
    """How much of the run is done after this many batches of it, counted from its beginning.

    What prepares batches ahead needs this: by the time a batch is at work, :func:`progress` says the same. Of a run
    limited by time nothing can be said ahead.

    Args:
        trainer: A Trainer whose loaders exist.
        batches: Of one rank, over all epochs.
    """
    if windows := windows_of(trainer):
        return _fraction(trainer, steps_after(windows, batches))
    window, each = trainer.accumulate_grad_batches, trainer.num_training_batches
    if each == float("inf"):
        return _fraction(trainer, batches // window)
    epochs, rest = divmod(batches, max(1, int(each)))
    return _fraction(trainer, epochs * -(-int(each) // window) + rest // window)


def _fraction(trainer: Trainer, step: int) -> float:
    done = [0.0]
    if trainer.max_steps > 0:
        done.append(step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        if batches == float("inf"):  # a stream without a length: only whole epochs can be told
            done.append(trainer.current_epoch / trainer.max_epochs)
        elif batches and (windows := windows_of(trainer)):
            done.append(batches_after(windows, step) / (int(batches) * trainer.max_epochs))
        elif batches:
            steps = -(-int(batches) // trainer.accumulate_grad_batches)
            done.append(step / (steps * trainer.max_epochs))
    for timer in callbacks_of(trainer, Timer):
        if (left := timer.time_remaining()) is not None:
            spent = timer.time_elapsed()
            fraction = spent / max(spent + left, 1e-9)
            done.append(trainer.strategy.broadcast(fraction) if trainer.world_size > 1 else fraction)
    return min(1.0, max(done))


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, as far as ``max_steps`` and ``max_epochs`` tell; None where neither does.

    Args:
        trainer: A Trainer whose loaders exist.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and batches != float("inf"):
        limits.append(-(-int(batches) // trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(limits, default=None)


def windows_of(trainer: Trainer) -> Windows:
    """How the batches of an optimizer step change over the run; empty where they do not."""
    found = [getattr(callback, "windows", ()) for callback in callbacks_of(trainer, Callback)]
    return next((windows for windows in found if windows), ())


def batches_after(windows: Windows, step: int) -> int:
    """Micro-batches that so many optimizer steps have taken.

    Example:
        >>> [batches_after([(0, 1), (8, 4)], step) for step in (0, 8, 10)]
        [0, 8, 16]
    """
    ends = [first for first, _ in windows[1:]] + [step]
    return sum(each * max(0, min(end, step) - first) for (first, each), end in zip(windows, ends, strict=True))


def steps_after(windows: Windows, batches: int) -> int:
    """Optimizer steps that so many micro-batches have completed.

    Example:
        >>> [steps_after([(0, 1), (8, 4)], batches) for batches in (0, 8, 11, 12, 16)]
        [0, 8, 8, 9, 10]
    """
    for (first, each), (following, _) in pairwise(windows):
        if batches < (following - first) * each:
            return first + batches // each
        batches -= (following - first) * each
    first, each = windows[-1]
    return first + batches // each
