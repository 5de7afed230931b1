"""The progress of a run in [0, 1], under any limit: steps, epochs or time.

If the number of micro-batches per optimizer step changes during the run, a callback declares this in an attribute
``windows``: ascending pairs (first optimizer step, micro-batches per step from that step on).
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
    """The fraction of the run that is done, in [0, 1]: the largest over the limits that the Trainer has.

    - ``max_steps``: ``global_step / max_steps``.
    - ``max_epochs``: optimizer steps over those of all epochs; batches over those of all epochs if the batches of a
      step change during the run; completed epochs over all if the loader has no length.
    - ``max_time``: elapsed over allowed time, measured on rank 0 so that all ranks agree.

    Except for ``max_time``, the value is constant between two optimizer steps.

    Args:
        trainer: A Trainer with ``max_steps``, ``max_epochs`` or ``max_time``. Before its loaders exist, only
            completed epochs count.
    """
    return _fraction(trainer, trainer.global_step)


def progress_after(trainer: Trainer, batches: int) -> float:
    """The fraction of the run that is done after this many batches, counted from its beginning.

    Code that prepares batches ahead of time needs this. When the batch is processed, :func:`progress` returns the same
    value. Time cannot be predicted: ``max_time`` counts with the fraction that has elapsed now.

    Args:
        trainer: A Trainer whose loaders exist.
        batches: Batches of one rank, over all epochs.
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
        if batches == float("inf"):  # a stream without a length: only whole epochs are known
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
    """Optimizer steps of the whole run, from ``max_steps`` and ``max_epochs``; None where neither limits it.

    Args:
        trainer: A Trainer whose loaders exist.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and batches != float("inf"):
        limits.append(-(-int(batches) // trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(limits, default=None)


def windows_of(trainer: Trainer) -> Windows:
    """How the number of batches per optimizer step changes during the run; empty if it is constant."""
    found = [getattr(callback, "windows", ()) for callback in callbacks_of(trainer, Callback)]
    return next((windows for windows in found if windows), ())


def batches_after(windows: Windows, step: int) -> int:
    """Number of micro-batches in the first ``step`` optimizer steps.

    Example:
        >>> [batches_after([(0, 1), (8, 4)], step) for step in (0, 8, 10)]
        [0, 8, 16]
    """
    ends = [first for first, _ in windows[1:]] + [step]
    return sum(each * max(0, min(end, step) - first) for (first, each), end in zip(windows, ends, strict=True))


def steps_after(windows: Windows, batches: int) -> int:
    """Number of optimizer steps that the first ``batches`` micro-batches complete.

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
