"""Steps: how many micro-batches an optimizer step has, and at which steps that number changes.

A plan is an ascending list of *windows* (first optimizer step, micro-batches of each step from there on). Lightning
counts micro-batches from the beginning of each epoch and makes a step when the count is a multiple of the current
number. So a window can begin only when the count is a multiple of its own number. Every number is a multiple of the
one before, so this always happens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from lit_scale.progress import Windows, batches_after

__all__ = [
    "accumulate",
    "check_epoch",
    "micro_batches",
    "plan_windows",
    "restore_accumulation",
]

_OWN = "_lit_scale_accumulation"  # attribute that keeps the Trainer's original accumulation while it is changed


def micro_batches(batch: int, each: int, what: str = "batch") -> int:
    """Number of micro-batches of a global batch.

    Args:
        batch: Samples of an optimizer step, over all ranks.
        each: Samples of a micro-batch, over all ranks.
        what: The argument's name, for the error message.

    Raises:
        ValueError: If ``batch`` is not a multiple of ``each``; the message names the nearest multiples.

    Example:
        >>> micro_batches(512, 64)
        8
        >>> micro_batches(100, 64)
        Traceback (most recent call last):
        ValueError: batch=100 is no multiple of the 64 samples that all ranks take at once; use 64 or 128
    """
    if batch < 1 or batch % each:
        below, above = batch // each * each, -(-batch // each) * each
        near = f"{below} or {above}" if below > 0 else f"{max(above, each)}"
        raise ValueError(f"{what}={batch} is no multiple of the {each} samples that all ranks take at once; use {near}")
    return batch // each


def plan_windows(
    starts: Sequence[float], sizes: Sequence[int], *, max_steps: int = -1, batches: float = math.inf
) -> list[tuple[int, int]]:
    """The windows of a ramp: at which optimizer step each stage begins.

    A stage is due when the run's progress reaches its start: the larger of the fractions of ``max_steps`` and of
    ``batches`` that are done. It begins at the next step that its size allows.

    Args:
        starts: Fractions of the run, ascending from 0.
        sizes: Micro-batches of a step in each stage, each a multiple of the one before.
        max_steps: Optimizer steps of the run; -1 for no such limit.
        batches: Micro-batches of the run, over all epochs.

    Example:
        >>> plan_windows([0.0, 0.5], [1, 4], max_steps=10)  # due at step 5, which 5 micro-batches do not allow
        [(0, 1), (8, 4)]
        >>> plan_windows([0.0, 0.5], [1, 4], batches=80)  # half of the data, in 40 steps, the rest in 10
        [(0, 1), (40, 4)]
    """
    windows = [(0, sizes[0])]
    taken = 0  # micro-batches before the window
    for start, size in zip(starts[1:], sizes[1:], strict=True):
        first, each = windows[-1]

        def done(step: int, first: int = first, each: int = each, taken: int = taken) -> float:
            spent = taken + (step - first) * each
            return max(step / max_steps if max_steps > 0 else 0.0, spent / batches)

        last = max_steps if max_steps > 0 else first + math.ceil((batches - taken) / each)
        due = bisect_left(range(last + 1), start, lo=first, key=done)
        while (taken + (due - first) * each) % size:
            due += 1
        taken += (due - first) * each
        windows.append((due, size))
    return windows


def accumulate(trainer: Any, number: int) -> None:
    """Set the micro-batches of an optimizer step, until :func:`restore_accumulation`."""
    trainer.__dict__.setdefault(_OWN, trainer.accumulate_grad_batches)
    trainer.accumulate_grad_batches = number


def restore_accumulation(trainer: Any) -> None:
    """Restore the Trainer's original accumulation, after any number of changes."""
    trainer.accumulate_grad_batches = trainer.__dict__.pop(_OWN, trainer.accumulate_grad_batches)


def check_epoch(trainer: Any, windows: Windows) -> None:
    """Refuse a run in which an epoch ends inside an optimizer step.

    Lightning would make that step with fewer micro-batches, and its gradient would be too small by the missing share.

    Args:
        trainer: A Trainer whose loaders exist.
        windows: Micro-batches of its steps.

    Raises:
        ValueError: If the run reaches the end of an epoch whose number of batches is not a multiple of a step's.
    """
    epoch, largest = trainer.num_training_batches, windows[-1][1]
    limited = trainer.max_steps > 0 and batches_after(windows, trainer.max_steps) < epoch
    if epoch == math.inf or epoch % largest == 0 or limited:
        return
    if epoch < largest:
        raise ValueError(
            f"an optimizer step takes {largest} batches, but an epoch has only {epoch}; accumulate fewer, or make them "
            "larger in the loader"
        )
    raise ValueError(
        f"an epoch of {epoch} batches ends inside an optimizer step of {largest}; pass "
        f"Trainer(limit_train_batches={epoch // largest * largest})"
    )
