import math

import frontier
import numpy as np
import pytest


def power_law(cost):
    """A baseline whose loss falls by 1 nat for each factor e of cost: linear in log cost, so interpolation is exact."""
    return 10.0 - math.log(cost)


BASELINE = {n: [(cost, power_law(cost))] * 3 for n, cost in enumerate((10.0, 100.0, 1_000.0))}


@pytest.mark.parametrize("cost", [10.0, 17.0, 100.0, 640.0, 1_000.0])
def test_the_frontier_is_the_law_it_was_drawn_from(cost):
    assert frontier.frontier_cost(BASELINE, power_law(cost)) == pytest.approx(cost)


def test_a_technique_at_half_the_cost_saves_half():
    one = frontier.saving(BASELINE, [(50.0, power_law(100.0))] * 3)
    assert (one.estimate, one.low, one.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_technique_that_costs_more_has_a_negative_saving():
    assert frontier.saving(BASELINE, [(200.0, power_law(100.0))] * 3).estimate == pytest.approx(-1.0)


@pytest.mark.parametrize("loss", [power_law(9.9), power_law(1_010.0)])
def test_nothing_is_extrapolated(loss):
    assert frontier.frontier_cost(BASELINE, loss) is None
    one = frontier.saving(BASELINE, [(50.0, loss)] * 3)
    assert one.estimate is None
    assert one.low is None
    assert "beyond the frontier" in one.reason


def test_no_interval_where_the_draws_leave_the_frontier():
    at_the_end = power_law(1_000.0)
    noisy = [(50.0, at_the_end - 0.1), (50.0, at_the_end), (50.0, at_the_end + 0.13)]
    one = frontier.saving(BASELINE, noisy)
    assert one.estimate is not None
    assert one.low is None


def test_a_longer_run_that_did_worse_is_no_frontier():
    baseline = {1: [(10.0, 3.0)], 2: [(100.0, 2.0)], 3: [(1_000.0, 2.5)]}
    assert frontier.frontier_cost(baseline, 2.0) == pytest.approx(100.0)
    assert frontier.frontier_cost(baseline, 1.99) is None


@pytest.mark.parametrize("seeds", [3, 20])
def test_the_interval_covers_the_truth(seeds):
    """Of the 95% intervals nine in ten at least hold the true saving of one half, from three seeds as well."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(100):

        def runs(cost, paid=None):
            return [((paid or cost), power_law(cost) + rng.normal(0, 0.05)) for _ in range(seeds)]  # noqa: B023

        baseline = {n: runs(cost) for n, cost in enumerate((10.0, 100.0, 1_000.0))}
        one = frontier.saving(baseline, runs(100.0, paid=50.0), draws=300, seed=trial)
        held += one.low <= 0.5 <= one.high
    assert 88 <= held <= 100


def test_more_noise_makes_a_wider_interval():
    def width(noise):
        rng = np.random.default_rng(1)
        baseline = {
            n: [(cost, power_law(cost) + noise * rng.normal()) for _ in range(3)]
            for n, cost in enumerate((10, 100, 1000))
        }
        one = frontier.saving(baseline, [(50.0, power_law(100.0) + noise * rng.normal()) for _ in range(3)])
        return one.high - one.low

    assert width(0.2) > 2 * width(0.02)


def test_fewer_than_three_seeds_have_no_interval():
    one = frontier.saving({n: runs[:2] for n, runs in BASELINE.items()}, [(50.0, power_law(100.0))] * 2)
    assert one.estimate == pytest.approx(0.5)
    assert (one.low, one.high) == (None, None)
    assert "three seeds" in one.reason


def test_the_frontier_takes_the_better_rate_at_each_length():
    points = [
        {"baseline": True, "steps": steps, "lr": lr, "loss": loss}
        for steps, lr, loss in [(10, 1e-3, 3.0), (10, 1e-3, 3.2), (10, 2e-3, 2.9), (10, 2e-3, 3.0), (20, 1e-3, 2.0)]
    ]
    assert {p["lr"] for p in frontier.best_runs(points, True, 10)} == {2e-3}
    assert [p["loss"] for p in frontier.best_runs(points, True, 20)] == [2.0]


def test_differences_over_seeds_are_students() -> None:
    """Of three seeds a side the interval holds the truth as often as it says."""
    rng = np.random.default_rng(0)
    for paired in (False, True):
        held = 0
        for _ in range(400):
            own, other = 1.02 + 0.01 * rng.standard_normal(3), 1 + 0.01 * rng.standard_normal(3)
            found = frontier.above(own, other, paired=paired)
            held += found["low"] <= 0.02 <= found["high"]
        assert 0.92 < held / 400 < 0.985
    assert frontier.above([1.5, 1.5], [1.0, 1.0]) == {"estimate": 0.5, "low": None, "high": None}
