"""Schedules: pure functions of the run's progress, a number in [0, 1].

The same schedule therefore works for a run limited by steps, by epochs or by time. The caller passes the progress
(:func:`lit_scale.progress.progress`).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

__all__ = ["RateScaling", "check_starts", "number_or_share", "rate_factor", "rewarmup", "stage_at", "warmup_cosine"]

RateScaling = Literal["linear", "sqrt", "none"]


def warmup_cosine(progress: float, warmup: float = 0.05) -> float:
    """Factor on the peak learning rate: linear warm-up from 0 to 1, then cosine decay to exactly 0.

    The decay always ends with the run: against a baseline whose learning rate has not fully decayed, every technique
    looks good (Kaddour et al. 2023, "No Train No Gain", section 3).

    Args:
        progress: Fraction of the run that is done.
        warmup: Fraction of the run spent warming up, in [0, 1).

    Example:
        >>> [round(warmup_cosine(p, warmup=0.1), 3) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


def stage_at(progress: float, starts: Sequence[float]) -> int:
    """Index of the current stage; a stage includes its start.

    Args:
        progress: Fraction of the run that is done.
        starts: Ascending fractions at which the stages begin; the first is 0.

    Example:
        >>> [stage_at(p, [0.0, 0.3, 0.6]) for p in (0.0, 0.29, 0.3, 1.0)]
        [0, 0, 1, 2]
    """
    return bisect_right(starts, progress) - 1


def number_or_share(amount: int | float) -> int | float:
    """Convert a float that is a whole number of at least 1 to an int; return any other value unchanged.

    An int is a number of items, a float below 1 a share of them. Command lines need the conversion: a parser may try
    the types of ``int | float`` in either order, because Python treats both orders as equal.

    Example:
        >>> [number_or_share(amount) for amount in (4, 4.0, 1.0, 0.5, 1.5)]
        [4, 4, 1, 0.5, 1.5]
    """
    return int(amount) if isinstance(amount, float) and amount >= 1 and amount.is_integer() else amount


def check_starts(stages: Sequence[tuple[float, int | float]], what: str) -> list[tuple[float, int | float]]:
    """Check stages, and return them as a list of (start, amount).

    Args:
        stages: Pairs (start, amount). Starts ascend from 0 and are below 1. Amounts are positive: an int, or a float of
            at most 1.0.
        what: Name of the amount, for messages.

    Raises:
        ValueError: If ``stages`` has another form.

    Example:
        >>> check_starts([(0, 0.5), (0.25, 8)], "depth")
        [(0.0, 0.5), (0.25, 8)]
    """
    try:
        found = [(float(start), amount) for start, amount in stages]
    except (TypeError, ValueError):
        raise ValueError(f"stages={stages!r}: write pairs (start, {what}), as in [(0.0, 0.5), (0.5, 1.0)]") from None
    starts = [start for start, _ in found]
    if starts[:1] != [0.0] or not all(a < b < 1.0 for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"stages={found}: starts must ascend from 0.0 and stay below 1.0 (the end of the run)")
    for _, amount in found:
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount > 0:
            raise ValueError(f"stages={found}: {what} {amount!r} is neither a positive number nor a fraction")
        if isinstance(amount, float) and amount > 1.0:
            raise ValueError(f"stages={found}: {what} {amount} is a fraction above 1.0; write a number as an int")
    return found


def rewarmup(progress: float, since: float, duration: float) -> float:
    """Factor on the learning rate that rises linearly from 0 to 1 over ``duration`` after the event at ``since``.

    Before the event, and if ``duration`` is not positive, it is 1. All three arguments are fractions of the run.

    Example:
        >>> [rewarmup(p, since=0.5, duration=0.1) for p in (0.4, 0.55, 0.7)]
        [1.0, 0.5000000000000004, 1.0]
    """
    if duration <= 0.0 or progress < since:
        return 1.0
    return min(1.0, (progress - since) / duration)


def rate_factor(times: float, scaling: RateScaling = "sqrt") -> float:
    """Factor on the learning rate for a batch that is ``times`` as large.

    ``"linear"`` is for SGD with momentum (Goyal et al. 2017, section 2.1), ``"sqrt"`` for optimizers that normalise the
    gradient (Hoffer et al. 2017; You et al. 2020, for untuned LAMB). Both assume a warm-up, and a batch below the
    critical batch size: above it no learning rate compensates for the smaller number of steps.

    Args:
        times: Batch size, divided by the batch size that the learning rate was tuned for.
        scaling: ``"linear"``, ``"sqrt"`` or ``"none"``.

    Raises:
        ValueError: If ``scaling`` is unknown, or ``times`` is not above 0.

    Example:
        >>> [rate_factor(16, scaling) for scaling in ("linear", "sqrt", "none")]
        [16.0, 4.0, 1.0]
    """
    powers = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
    if scaling not in powers:
        raise ValueError(f"scaling={scaling!r}: choose {', '.join(map(repr, powers))}")
    if not times > 0:
        raise ValueError(f"a batch cannot be {times} times as large")
    return float(times ** powers[scaling])
