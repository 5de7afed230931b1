"""Intervals that cover, curves that interpolate, and an envelope that is chosen on one split and read on another."""

import math

import numpy as np
import pytest
from envelope import Curve, Estimate, interval, loss_difference, lower_envelope, saving
from scipy.stats import ttest_1samp

COSTS = (1_000.0, 2_000.0, 4_000.0)
SEEDS = range(1, 6)


def true_loss(cost: float) -> float:
    """A power law, as losses of real runs follow: steeper at first."""
    return 1.0 + 8.0 * cost**-0.35


def simulated(rng: np.random.Generator, true_saving: float, seed_sd: float, run_sd: float, cost: float = 1_600.0):
    """A plain curve and a technique that truly saves so much; a seed's effect is shared by all of its plain runs."""
    effect = {seed: rng.normal(0, seed_sd) for seed in SEEDS}
    losses = {s: tuple(true_loss(c) + effect[s] + rng.normal(0, run_sd) for c in COSTS) for s in SEEDS}
    reached = true_loss(cost / (1 - true_saving))
    technique = {
        s: (cost * math.exp(rng.normal(0, 0.01)), reached + 0.7 * effect[s] + rng.normal(0, run_sd)) for s in SEEDS
    }
    return technique, Curve(COSTS, losses, ("a",) * len(COSTS))


def covers(found: Estimate, truth: float) -> bool:
    """Whether the truth lies in an interval, which there has to be."""
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


def test_interval_is_students() -> None:
    values = [0.3, 0.1, 0.25, 0.4, 0.2]
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((np.mean(values), *expected))
    mean, low, high = interval(values, shared=0.5)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(2.776 * math.hypot(0.5, 0.1118 / 5**0.5), rel=1e-3)


@pytest.mark.parametrize("true_saving", [-0.3, 0.0, 0.25])
@pytest.mark.parametrize(("seed_sd", "run_sd"), [(0.02, 0.005), (0.005, 0.02), (0.0, 0.01)])
def test_intervals_cover_the_truth(true_saving: float, seed_sd: float, run_sd: float) -> None:
    rng = np.random.default_rng(1)
    curve = Curve(COSTS, {1: tuple(map(true_loss, COSTS))}, ("a",) * 3)
    cost = 1_600.0
    reached = true_loss(cost / (1 - true_saving))
    found = curve.reaches(reached)
    assert found is not None
    truth = 1 - cost / found[0]  # by the curve through the true losses: what interpolation between lengths can say
    difference = reached - float(np.interp(math.log(cost), np.log(COSTS), list(map(true_loss, COSTS))))
    draws, covered = 1_000, {"saving": 0, "loss": 0}
    for _ in range(draws):
        technique, plain = simulated(rng, true_saving, seed_sd, run_sd)
        one, other = saving(technique, plain), loss_difference(technique, plain)
        covered["saving"] += covers(one, truth)
        covered["loss"] += covers(other, difference)
    assert covered["saving"] >= 0.93 * draws
    assert covered["loss"] >= 0.93 * draws


def test_intervals_of_a_bootstrap_would_not_cover() -> None:
    """The negative control: percentiles of resampled means, as in the first edition, miss the truth too often."""
    rng, missed = np.random.default_rng(2), 0
    for _ in range(400):
        values = rng.normal(0, 1, 5)
        means = values[rng.integers(5, size=(400, 5))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        missed += not low <= 0 <= high
    assert missed > 0.1 * 400


def test_a_shared_error_of_prices_is_covered() -> None:
    rng, covered, draws = np.random.default_rng(3), 0, 500
    for _ in range(draws):
        technique, plain = simulated(rng, 0.2, 0.005, 0.003)
        wrong = math.exp(rng.normal(0, 0.05))
        found = saving({s: (c * wrong, loss) for s, (c, loss) in technique.items()}, plain, price_error=0.05)
        covered += covers(found, 0.2)
    assert covered >= 0.93 * draws


def test_saving_of_what_is_known_exactly() -> None:
    curve = Curve((100.0, 400.0), {s: (3.0 + s / 100, 2.0 + s / 100) for s in SEEDS}, ("a", "a"))
    technique = {s: (100.0, 2.5 + s / 100) for s in SEEDS}  # plain runs need 200 for that
    one, other = saving(technique, curve), loss_difference(technique, curve)
    assert (one.estimate, one.low, one.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (other.estimate, other.low, other.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_nothing_is_extrapolated() -> None:
    curve = Curve((100.0, 400.0), dict.fromkeys(SEEDS, (3.0, 2.0)), ("a", "a"))
    better = saving(dict.fromkeys(SEEDS, (200.0, 1.9)), curve)
    assert better.estimate is None
    assert "at least 50% saved" in better.reason
    worse = saving(dict.fromkeys(SEEDS, (200.0, 3.1)), curve)
    assert worse.estimate is None
    assert "worse than the shortest" in worse.reason
    beyond = loss_difference(dict.fromkeys(SEEDS, (900.0, 2.0)), curve)
    assert beyond.estimate is None
    assert "900" in beyond.reason
    assert saving({1: (200.0, 2.5)}, curve).estimate is None
    one_length = Curve((100.0,), dict.fromkeys(SEEDS, (3.0,)), ("a",))
    assert saving(dict.fromkeys(SEEDS, (100.0, 2.9)), one_length).reason == "plain runs of one length only"
    assert loss_difference(dict.fromkeys(SEEDS, (100.0, 2.9)), one_length).low == pytest.approx(-0.1)
    priced = loss_difference(dict.fromkeys(SEEDS, (100.0, 2.9)), one_length, price_error=0.01)
    assert priced.estimate == pytest.approx(-0.1)
    assert (priced.low, priced.high) == (None, None)
    assert "one length only" in priced.reason


def test_the_error_of_prices_widens_the_interval_of_the_loss_by_the_slope() -> None:
    curve = Curve((100.0, 400.0), dict.fromkeys(SEEDS, (3.0, 2.0)), ("a", "a"))
    found = loss_difference(dict.fromkeys(SEEDS, (200.0, 2.5)), curve, price_error=0.01)
    expected = 2.776 * 0.01 / math.log(4.0)  # a nat of loss for a factor of four
    assert found.high == pytest.approx(expected, rel=1e-3)
    assert found.low == pytest.approx(-expected, rel=1e-3)


def test_the_envelope_is_what_nothing_cheaper_beats() -> None:
    rng = np.random.default_rng(4)
    points = [(str(i), float(cost), float(loss)) for i, (cost, loss) in enumerate(rng.random((40, 2)))]
    kept = {name for name, _ in lower_envelope(points)}
    for name, cost, loss in points:
        beaten = any(other_cost <= cost and other_loss < loss for _, other_cost, other_loss in points)
        assert (name in kept) == (not beaten)
