"""Saving at equal loss: a technique's cost against the cost at which the baseline's frontier reaches the same loss.

The frontier joins the mean losses of baseline runs of several lengths, each with a schedule of its own that ends at
zero, linearly in the logarithm of cost. A loss that no baseline run brackets has no saving: nothing is extrapolated.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp, ttest_ind

Runs = Mapping[int, Sequence[tuple[float, float]]]  # (cost, loss) of every seed, by length of the run


@dataclass
class Saving:
    """A saving with its bootstrap interval, or the reason why there is none."""

    estimate: float | None
    low: float | None
    high: float | None
    reason: str = ""


def best_runs(points: Sequence[dict[str, Any]], baseline: bool, steps: int) -> list[dict[str, Any]]:
    """The runs of one side and length; where it was run at several learning rates, those of the best one."""
    own = [p for p in points if p["baseline"] == baseline and p["steps"] == steps]
    at = {p["lr"]: [other for other in own if other["lr"] == p["lr"]] for p in own}
    return min(at.values(), key=lambda runs: float(np.mean([p["loss"] for p in runs])))


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
    """1 - cost(technique) / frontier cost(its loss), with a 95% interval by a residual bootstrap over seeds.

    Few seeds per point say little about their own spread, so each side's deviations from its points' means are pooled
    over its points (costs as ratios, losses as differences, widened by sqrt(k / (k - 1)) for k seeds), and every draw
    gives every run a deviation from its side's pool.

    Args:
        baseline: Runs of the baseline by length.
        technique: (cost, loss) of the technique's runs, one per seed.
        draws: Bootstrap draws.
        seed: Of the bootstrap.

    Returns:
        The saving. Without an estimate if the technique's loss lies beyond the frontier; without an interval for fewer
        than three seeds or if the draws leave the frontier too often. A draw with a better loss than the frontier's
        best counts with the frontier's end, which understates it; one with a worse loss counts as the worst of all.
    """
    points = [np.asarray(runs, dtype=float) for _, runs in sorted(baseline.items())]
    own = np.asarray(technique, dtype=float)
    means = {n: [tuple(point.mean(0))] for n, point in enumerate(points)}
    cost, loss = own.mean(0)
    full = frontier_cost(means, loss)
    if full is None:
        ends = f"{points[0].mean(0)[1]:.3f} to {points[-1].mean(0)[1]:.3f}"
        return Saving(None, None, None, f"loss {loss:.3f} lies beyond the frontier's {ends}")
    value = float(1 - cost / full)
    if min(map(len, [*points, own])) < 3:
        return Saving(value, None, None, "an interval needs three seeds of every point")

    rng = np.random.default_rng(seed)
    pools = [np.concatenate([_deviations(point) for point in points]), _deviations(own)]

    def drawn(point: np.ndarray, pool: np.ndarray) -> tuple[float, float]:
        shift = pool[rng.integers(len(pool), size=len(point))].mean(0)
        center = point.mean(0)
        return float(center[0] * (1 + shift[0])), float(center[1] + shift[1])

    savings = np.empty(draws)
    outside = 0
    for draw in range(draws):
        frontier = {n: [drawn(point, pools[0])] for n, point in enumerate(points)}
        cost, loss = drawn(own, pools[1])
        full = frontier_cost(frontier, loss)
        outside += full is None
        if full is None:
            best = min(reached for [(_, reached)] in frontier.values())
            full = max(spent for [(spent, _)] in frontier.values()) if loss < best else 0.0
        savings[draw] = 1 - cost / full if full else -np.inf
    low, high = np.quantile(savings, [0.025, 0.975], method="lower")
    if outside > 0.05 * draws or not np.isfinite(low):
        return Saving(value, None, None, f"{outside / draws:.0%} of the bootstrap draws lie beyond the frontier")
    return Saving(value, float(low), float(high))


def above(own: Sequence[float], other: Sequence[float], *, paired: bool = False) -> dict[str, float | None]:
    """How far the mean of ``own`` lies above that of ``other``, as a share of it, with a 95% interval over seeds.

    The interval is Student's of the difference: Welch's, or of the differences seed by seed if ``paired``. Below three
    seeds there is none.

    >>> above([1.1, 1.1, 1.1], [1.0, 1.0, 1.0])
    {'estimate': 0.1, 'low': 0.1, 'high': 0.1}
    """
    mean = float(np.mean(other))
    found: dict[str, float | None] = {"estimate": float(np.mean(own)) / mean - 1, "low": None, "high": None}
    if min(len(own), len(other)) >= 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of values that do not differ
            test = ttest_1samp(np.subtract(own, other), 0.0) if paired else ttest_ind(own, other, equal_var=False)
            ends = np.array(test.confidence_interval(0.95)) / mean
        low, high = ends if np.isfinite(ends).all() else [found["estimate"]] * 2
        found |= {"low": float(low), "high": float(high)}
    return {name: None if value is None else round(value, 6) for name, value in found.items()}


def _deviations(runs: np.ndarray) -> np.ndarray:
    """Each run's cost as a ratio to the mean, minus 1, and its loss minus the mean, widened for the few runs."""
    mean = runs.mean(0)
    deviations = np.stack([runs[:, 0] / mean[0] - 1, runs[:, 1] - mean[1]], axis=1)
    return deviations * np.sqrt(len(runs) / (len(runs) - 1))
