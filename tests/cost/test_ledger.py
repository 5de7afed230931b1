import json
from typing import Any

import pytest

from lit_scale.cost.ledger import Key, Ledger


def kind(samples: int = 4, *, phase: str = "train", update: bool = True, **of_techniques: Any) -> Key:
    common = {"phase": phase, "samples": samples, "tokens": 8 * samples, "update": update, "plain": False}
    return tuple((common | of_techniques).items())


SMALL, LARGE, HELD_OUT = kind(4, size=1), kind(16, size=2), kind(2, phase="validate")


@pytest.fixture
def ledger() -> Ledger:
    """Three small steps, a validation, and two large ones."""
    ledger = Ledger()
    ledger.flops = {SMALL: 100, LARGE: 1_000, HELD_OUT: 7}
    ledger.timings = {SMALL: [9.0, 9.0, 1.0, 2.0, 3.0], HELD_OUT: [0.5]}
    ledger.waits = {SMALL: [0.1, 0.3, 0.2]}
    ledger.calibrated = {LARGE: 5.0}
    for step, key in enumerate([SMALL, SMALL, SMALL, HELD_OUT, LARGE, LARGE]):
        ledger.count(key, step)
        if key is HELD_OUT:
            ledger.charge("growth", 1.0, flops=50)
            ledger.add_point(3, {"val/loss": 2.0}, {"wall_seconds": 7.0})
    ledger.add_point(6, {"val/loss": 1.0}, {"wall_seconds": 9.0})
    return ledger


def test_a_step_costs_its_median_behind_the_first_two_and_the_median_wait(ledger: Ledger) -> None:
    assert ledger.seconds_each(SMALL) == pytest.approx(2.0 + 0.2)
    assert ledger.seconds_each(LARGE) == 5.0  # replayed, which goes before timings
    assert ledger.seconds_each(HELD_OUT) == 0.5  # all that there is, where there are no more than two
    assert ledger.seconds_each(kind(1, batch="4x8")) == 0.0  # no step had such a batch
    assert ledger.seconds_each(kind(1)) == pytest.approx(0.2)  # priced only: it would have waited as the others did


def test_a_run_costs_what_its_steps_and_charges_do(ledger: Ledger) -> None:
    assert ledger.totals() == {
        "steps": 5,
        "samples": 3 * 4 + 2 * 16,
        "tokens": 8 * (3 * 4 + 2 * 16),
        "flops": 3 * 100 + 2 * 1_000 + 50,
        "reference_seconds": pytest.approx(3 * 2.2 + 2 * 5.0 + 1.0),
    }
    record = ledger.record()
    assert record["validation"] | {"reference_seconds": 0.5} == {
        "steps": 1,
        "samples": 2,
        "tokens": 16,
        "flops": 7,
        "reference_seconds": 0.5,
    }
    assert record["charges"] == {"growth": {"count": 1, "seconds": 1.0, "flops": 50}}


def test_the_curve_has_what_was_spent_by_then(ledger: Ledger) -> None:
    early, late = ledger.record()["curve"]
    assert (early["step"], early["steps"], early["flops"]) == (3, 3, 3 * 100 + 50)
    assert early["reference_seconds"] == pytest.approx(3 * 2.2 + 1.0)
    assert late["flops"] == ledger.totals()["flops"]
    assert (early["metrics"], late["wall_seconds"]) == ({"val/loss": 2.0}, 9.0)
    assert ledger.record()["metrics"] == {"val/loss": 1.0}


def test_a_step_has_one_point_on_the_curve(ledger: Ledger) -> None:
    ledger.add_point(6, {"val/loss": 0.5}, {"wall_seconds": 10.0})
    assert [point["step"] for point in ledger.record()["curve"]] == [3, 6]


def test_stages_are_told_by_what_techniques_say_and_may_come_back(ledger: Ledger) -> None:
    ledger.count(kind(8, size=1), 5)  # another batch, and the first stage again
    first, second = ledger.record()["stages"]
    assert [(stage["size"], stage["first_step"], stage["steps"]) for stage in (first, second)] == [(1, 0, 4), (2, 4, 2)]
    assert (first["metrics"], second["metrics"]) == ({"val/loss": 2.0}, {"val/loss": 1.0})


def test_batches_of_one_step_are_counted_once_as_a_step() -> None:
    ledger = Ledger()
    for update in (False, False, True):
        ledger.count(kind(update=update), 0)
    assert (ledger.totals()["steps"], ledger.totals()["samples"]) == (1, 12)


def test_what_a_sparse_kernel_would_skip_is_told_apart(ledger: Ledger) -> None:
    assert "sparse_flops" not in ledger.record()
    ledger.skipped = {LARGE: 400}
    assert ledger.record()["sparse_flops"] == ledger.totals()["flops"] - 2 * 400


def test_a_kind_that_is_only_priced_is_listed_with_no_steps(ledger: Ledger) -> None:
    ledger.calibrated[kind(32)] = 1.0
    listed = {one["samples"]: (one["count"], one["price"]) for one in ledger.record()["step_kinds"]}
    assert listed == {4: (3, "run"), 2: (1, "run"), 16: (2, "replay"), 32: (0, "replay")}


def test_a_ledger_goes_on_from_its_state(ledger: Ledger) -> None:
    state = ledger.state_dict()
    assert Ledger.reads(state)
    assert not Ledger.reads({})
    again = Ledger()
    again.load_state_dict(state)
    assert again.record() == ledger.record()
    for one in (again, ledger):
        one.count(LARGE, 7)
    assert again.record() == ledger.record()
    assert json.dumps(again.record())  # plain values


def test_ranks_are_counted_together(ledger: Ledger) -> None:
    """As `exchange` leaves them: all samples and FLOPs, but the steps and the seconds of one."""
    alone = ledger.totals()
    ledger._others = [{"counts": dict(ledger.counts)}]
    both = ledger.totals()
    assert both["steps"] == alone["steps"]
    assert both["samples"] == 2 * alone["samples"]
    assert both["flops"] - 50 == 2 * (alone["flops"] - 50)
    assert both["reference_seconds"] == pytest.approx(alone["reference_seconds"])
    ledger.forget_ranks()
    assert ledger.totals() == alone
