"""Schedules: pure functions of the run's progress, a number in [0, 1].

The same schedule therefore serves a run limited by steps, by epochs or by seconds; who calls it says how far the
run is (:func:`lit_scale.progress.progress`).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

__all__ = ["RateScaling", "check_starts", "number_or_share", "rate_factor", "rewarmup", "stage_at", "warmup_cosine"]

RateScaling = Literal["linear", "sqrt", "none"]


def warmup_cosine(progress: float, warmup: float = 0.05) -> float:
    """Factor on the peak learning rate: linear warm-up from 0 to 1, then half a cosine down to exactly 0.

    A baseline whose rate has not decayed by the end of its own run makes every technique look good (Kaddour et al.
    2023, "No Train No Gain", section 3), so the decay always spans the whole run.

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
    """Index of the last stage that has begun; a stage begins at its start, not after it.

    Args:
        progress: Fraction of the run that is done.
        starts: Ascending fractions at which the stages begin, the first one 0.

    Example:
        >>> [stage_at(p, [0.0, 0.3, 0.6]) for p in (0.0, 0.29, 0.3, 1.0)]
        [0, 0, 1, 2]
    """
    return bisect_right(starts, progress) - 1


def number_or_share(amount: int | float) -> int | float:
    """A number of things (int) or a share of them (float below 1): a whole float from 1 on is a number as well.

    Command lines need this: of ``int | float`` a parser may try either first, since Python holds both orders for equal.

    Example:
        >>> [number_or_share(amount) for amount in (4, 4.0, 1.0, 0.5, 1.5)]
        [4, 4, 1, 0.5, 1.5]
    """
    return int(amount) if isinstance(amount, float) and amount >= 1 and amount.is_integer() else amount


def check_starts(stages: Sequence[tuple[float, int | float]], what: str) -> list[tuple[float, int | float]]:
    """Stages as a list of (start, amount), if they are well formed.

    Args:
        stages: Pairs; starts ascend from 0 and stay below 1, amounts are positive: an int, or a fraction up to 1.0.
        what: The amount's name, for messages.

    Raises:
        ValueError: They are not.

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
    """Factor on the learning rate that climbs linearly from 0 to 1 over ``duration`` after the event at ``since``.

    Example:
        >>> [rewarmup(p, since=0.5, duration=0.1) for p in (0.4, 0.55, 0.7)]
        [1.0, 0.5000000000000004, 1.0]
    """
    if duration <= 0.0 or progress < since:
        return 1.0
    return min(1.0, (progress - since) / duration)


def rate_factor(times: float, scaling: RateScaling = "sqrt") -> float:
    """Factor on the learning rate of a batch that is so many times as large.

    ``"linear"`` is for SGD with momentum (Goyal et al. 2017, section 2.1), ``"sqrt"`` for optimizers that divide by the
    size of the gradient (Hoffer et al. 2017; You et al. 2020, for untuned LAMB). Both presume a warm-up, and a batch
    below the critical one: beyond it no rate makes up for the steps that are missing.

    Args:
        times: The batch over the one that the rate was tuned for.
        scaling: The rule.

    Raises:
        ValueError: The rule is unknown, or ``times`` is not above 0.

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
