import math

import pytest

from lit_scale.schedules import rewarmup, stage_at, warmup_cosine

GRID = [i / 1000 for i in range(1001)]


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.05, 0.3, 0.9])
def test_the_rate_climbs_to_its_peak_and_falls_to_zero(warmup: float) -> None:
    values = [warmup_cosine(p, warmup) for p in GRID]
    peak = values.index(max(values))
    assert GRID[peak] == pytest.approx(warmup, abs=1e-3)
    assert max(values) == pytest.approx(1.0, abs=1e-3)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[-1] == 0.0  # exactly: "annealed to zero" must not leave a remainder
    assert all(0.0 <= value <= 1.0 for value in values)


def test_it_is_linear_and_then_half_a_cosine() -> None:
    assert warmup_cosine(0.05, 0.2) == pytest.approx(0.25)
    assert warmup_cosine(0.6, 0.2) == pytest.approx(0.5)
    assert warmup_cosine(0.4, 0.2) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert warmup_cosine(0.8, 0.2) == pytest.approx(0.5 - math.sqrt(0.5) / 2)
    assert warmup_cosine(1.2, 0.2) == 0.0  # a run that goes on does not rise again


def test_a_stage_begins_at_its_start() -> None:
    starts = [0.0, 0.3, 0.6]
    assert [stage_at(p, starts) for p in (0.0, 0.2999, 0.3, 0.5999, 0.6, 1.0)] == [0, 0, 1, 1, 2, 2]
    for steps in (7, 10, 30, 100, 1000):  # step / steps and the literal round alike
        assert stage_at(-(-3 * steps // 10) / steps, starts) == 1
        assert stage_at((-(-3 * steps // 10) - 1) / steps, starts) == 0


def test_the_rate_climbs_again_after_an_event() -> None:
    assert [rewarmup(p, 0.5, 0.2) for p in (0.0, 0.499, 0.5, 0.6, 0.7, 1.0)] == pytest.approx([1, 1, 0, 0.5, 1, 1])
    assert {rewarmup(p, 0.5, 0.0) for p in GRID} == {1.0}
