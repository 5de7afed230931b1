"""Estimates from runs of several seeds: savings at equal loss and loss at equal cost, with intervals.

A *curve* connects plain runs of several lengths, each with a schedule that ends at zero, linearly in the logarithm of
cost. The curve of one network answers the papers' question: how much sooner does the same network reach a loss? The
*envelope* is the lower envelope over all sizes: the best plain network for each cost.

All estimates are based on differences between runs of the same seed: the technique's loss minus the loss of plain runs
of that seed, interpolated to the same cost. Runs of one seed share their data and the seed of their initial weights, so
effects of the seed that are common to all lengths cancel. Intervals are Student's over the seeds; the error of prices,
which all seeds share, is added in quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import t as student

__all__ = ["Curve", "Estimate", "interval", "loss_difference", "lower_envelope", "saving"]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, or the reason why there is none."""

    estimate: float | None
    low: float | None
    high: float | None
    reason: str = ""

    def as_dict(self) -> dict[str, float | str | None]:
        """As a dict for a result file, with rounded values."""
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


def interval(values: Sequence[float], shared: float = 0.0) -> tuple[float, float, float]:
    """Mean over seeds, with Student's 95% interval.

    Args:
        values: A value for each seed, at least two.
        shared: Standard deviation of an error that is the same for all seeds.

    >>> mean, low, high = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(low, 3), round(high, 3)
    (2.0, -0.484, 4.484)
    """
    own = np.asarray(values, dtype=float)
    quantile = float(student.ppf(0.975, len(own) - 1))
    half = quantile * math.hypot(float(own.std(ddof=1)) / math.sqrt(len(own)), shared)
    return float(own.mean()), float(own.mean()) - half, float(own.mean()) + half


@dataclass(frozen=True)
class Curve:
    """Losses of plain runs over cost.

    Attributes:
        costs: Costs of the points, ascending, in steps of the task's unit or in FLOPs.
        losses: A loss for each point, by seed.
        sizes: Name of the network of each point.
    """

    costs: tuple[float, ...]
    losses: Mapping[int, tuple[float, ...]]
    sizes: tuple[str, ...]

    def mean(self) -> np.ndarray:
        """Mean loss of each point over the seeds."""
        return np.mean([self.losses[seed] for seed in sorted(self.losses)], axis=0)

    def at(self, cost: float, seed: int) -> float:
        """The loss of a seed at a cost, interpolated; beyond the ends it is that of the end."""
        return float(np.interp(math.log(cost), np.log(self.costs), self.losses[seed]))

    def slope_at(self, cost: float) -> float:
        """Slope of the mean at a cost, in loss per unit of log cost; it needs two points."""
        assert len(self.costs) > 1
        left = min(max(int(np.searchsorted(self.costs, cost)) - 1, 0), len(self.costs) - 2)
        mean, logs = self.mean(), np.log(self.costs)
        return float((mean[left + 1] - mean[left]) / (logs[left + 1] - logs[left]))

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Cost at which the mean loss first falls to ``loss``, and the slope there, in loss per unit of log cost.

        It is None if the curve does not reach the loss, or starts below it.

        >>> Curve((10.0, 100.0), {1: (3.0, 2.0)}, ("a", "a")).reaches(2.5)
        (31.62277660168379, -0.43429448190325176)
        >>> Curve((10.0, 100.0), {1: (3.0, 2.0)}, ("a", "a")).reaches(1.9) is None
        True
        """
        mean, logs = self.mean(), np.log(self.costs)
        if loss > mean[0]:
            return None
        for left in range(len(mean) - 1):
            if mean[left + 1] <= loss <= mean[left] and mean[left + 1] < mean[left]:
                slope = (mean[left + 1] - mean[left]) / (logs[left + 1] - logs[left])
                return float(math.exp(logs[left] + (loss - mean[left]) / slope)), float(slope)
        return None


def lower_envelope(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """The points for which no cheaper or equally cheap point has a lower loss, as (size, cost), by ascending cost.

    Args:
        points: Size, cost and validation loss of each point; the reported losses are those of the test split.

    >>> lower_envelope([("a", 1.0, 3.0), ("b", 1.0, 2.9), ("a", 2.0, 2.95), ("b", 2.1, 2.5)])
    [('b', 1.0), ('b', 2.1)]
    """
    found: list[tuple[str, float]] = []
    best = math.inf
    for size, cost, loss in sorted(points, key=lambda point: (point[1], point[2])):
        if loss < best:
            best = loss
            found.append((size, cost))
    return found


def loss_difference(
    technique: Mapping[int, tuple[float, float]], plain: Curve, *, price_error: float = 0.0
) -> Estimate:
    """The technique's loss minus that of plain runs at equal cost, in the units of the loss.

    Args:
        technique: (cost, loss) by seed.
        plain: The curve or the envelope, with the same seeds.
        price_error: Standard deviation of the logarithm of the price between the two, shared by all seeds.
    """
    seeds = sorted(technique.keys() & plain.losses.keys())
    if len(seeds) < 2:
        return Estimate(None, None, None, "an interval needs runs of at least two seeds on both sides")
    costs = [technique[seed][0] for seed in seeds]
    low, high = plain.costs[0] * 0.97, plain.costs[-1] * 1.03  # prices are known to a few percent
    if min(costs) < low or max(costs) > high:
        ends = f"{plain.costs[0]:,.0f} to {plain.costs[-1]:,.0f}"
        return Estimate(None, None, None, f"its cost, {np.mean(costs):,.0f}, lies beyond the plain runs' {ends}")
    differences = [technique[seed][1] - plain.at(technique[seed][0], seed) for seed in seeds]
    if len(plain.costs) > 1:
        return Estimate(*interval(differences, price_error * abs(plain.slope_at(float(np.mean(costs))))))
    if price_error:  # without a slope its effect on the loss is unknown, and an interval without it too narrow
        reason = "no interval: plain runs of one length only do not tell what the error of prices does to the loss"
        return Estimate(float(np.mean(differences)), None, None, reason)
    return Estimate(*interval(differences))


def saving(technique: Mapping[int, tuple[float, float]], plain: Curve, *, price_error: float = 0.0) -> Estimate:
    """The share of the plain runs' cost that a technique saves at equal loss; negative if it costs more.

    Let c be the cost at which the mean plain loss equals the technique's mean loss, and s the slope there. The plain
    runs of a seed reach that seed's loss at log c + d / s, where d is the deviation of the technique's loss from its
    mean minus the deviation of the plain loss at c from its mean. The saving is 1 - cost / exp(log c + d / s), where
    the logarithm of the ratio is averaged over seeds.

    Args:
        technique: (cost, loss) by seed.
        plain: The curve or the envelope, with the same seeds.
        price_error: Standard deviation of the logarithm of the price ratio of the two, shared by all seeds.

    Returns:
        The estimate. Nothing is extrapolated: if the plain runs do not enclose the loss, the reason says on which side
        of them it is.
    """
    seeds = sorted(technique.keys() & plain.losses.keys())
    if len(seeds) < 2:
        return Estimate(None, None, None, "an interval needs runs of at least two seeds on both sides")
    curve = Curve(plain.costs, {seed: plain.losses[seed] for seed in seeds}, plain.sizes)
    losses = {seed: technique[seed][1] for seed in seeds}
    mean = float(np.mean(list(losses.values())))
    if len(curve.costs) < 2:
        return Estimate(None, None, None, "plain runs of one length only")
    found = curve.reaches(mean)
    if found is None:
        ends, logs = curve.mean(), [math.log(technique[seed][0]) for seed in seeds]
        if mean < ends.min():
            least = 1 - math.exp(float(np.mean(logs))) / curve.costs[-1]
            return Estimate(None, None, None, f"better than the longest plain run: at least {least:.0%} saved")
        return Estimate(None, None, None, f"its loss, {mean:.3f}, is worse than the shortest plain run's {ends[0]:.3f}")
    cost, slope = found
    reached = {seed: curve.at(cost, seed) for seed in seeds}
    center = float(np.mean(list(reached.values())))
    ratios = [
        math.log(technique[seed][0]) - math.log(cost) - ((losses[seed] - mean) - (reached[seed] - center)) / slope
        for seed in seeds
    ]
    ratio, low, high = interval(ratios, price_error)
    return Estimate(1 - math.exp(ratio), 1 - math.exp(high), 1 - math.exp(low))
