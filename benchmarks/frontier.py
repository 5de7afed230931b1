"""Saving at equal loss: a technique's cost against the cost at which the baseline's frontier reaches the same loss.

The frontier joins the mean losses of baseline runs of several lengths, each with a schedule of its own that ends at
zero, linearly in the logarithm of cost. A loss that no baseline run brackets has no saving: nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Runs = Mapping[int, Sequence[tuple[float, float]]]  # (cost, loss) of every seed, by length of the run


@dataclass
class Saving:
    """A saving with its bootstrap interval, or the reason why there is none."""

    estimate: float | None
    low: float | None
    high: float | None
    reason: str = ""


def frontier_cost(baseline: Runs, loss: float) -> float | None:
    """Cost at which the baseline reaches ``loss``; None beyond either end of the frontier.

    >>> frontier_cost({1: [(10.0, 3.0)], 2: [(100.0, 2.0)]}, 2.5)
    31.622776601683793
    >>> frontier_cost({1: [(10.0, 3.0)], 2: [(100.0, 2.0)]}, 1.9) is None
    True
    """
    points: list[tuple[float, float]] = []
    for cost, reached in sorted(tuple(np.mean(runs, axis=0)) for runs in baseline.values()):
        if not points or reached < points[-1][1]:  # a longer run that did worse is not on the frontier
            points.append((cost, reached))
    costs, losses = np.array(points).T
    if not losses[-1] <= loss <= losses[0]:
        return None
    return float(np.exp(np.interp(-loss, -losses, np.log(costs))))


def saving(baseline: Runs, technique: Sequence[tuple[float, float]], *, draws: int = 2_000, seed: int = 0) -> Saving:
    """1 - cost(technique) / frontier cost(its loss), with a 95% interval from resampling the seeds of every point.

    Args:
        baseline: Runs of the baseline by length.
        technique: (cost, loss) of the technique's runs, one per seed.
        draws: Bootstrap draws.
        seed: Of the bootstrap.

    Returns:
        The saving. Without an estimate if the technique's loss lies beyond the frontier, and without an interval if
        more than 5% of the draws do.
    """
    rng = np.random.default_rng(seed)

    def resample(runs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [runs[i] for i in rng.integers(len(runs), size=len(runs))]

    def estimate(baseline: Runs, technique: Sequence[tuple[float, float]]) -> float | None:
        cost, loss = np.mean(technique, axis=0)
        full = frontier_cost(baseline, loss)
        return None if full is None else float(1 - cost / full)

    value = estimate(baseline, technique)
    if value is None:
        loss = float(np.mean([loss for _, loss in technique]))
        ends = [float(np.mean([loss for _, loss in runs])) for _, runs in sorted(baseline.items())]
        return Saving(None, None, None, f"loss {loss:.3f} lies beyond the frontier's {ends[0]:.3f} to {ends[-1]:.3f}")
    sampled = [estimate({k: resample(runs) for k, runs in baseline.items()}, resample(technique)) for _ in range(draws)]
    inside = [one for one in sampled if one is not None]
    if len(inside) < 0.95 * draws:
        share = 1 - len(inside) / draws
        return Saving(value, None, None, f"{share:.0%} of the bootstrap draws lie beyond the frontier")
    low, high = np.percentile(inside, [2.5, 97.5])
    return Saving(value, float(low), float(high))
