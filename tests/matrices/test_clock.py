"""Every technique: the clock's prices are those of the steps that were made, and of a plain one beside them."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

import lit_scale.cost.meter
from lit_scale.cost import CostMeter
from tests.support.cases import CASES, PLACES, STEPS, Case
from tests.support.training import fit

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_clock_times_the_steps_that_were_made(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is replayed to be timed multiplies what the step of that kind multiplied in training."""
    technique, meter, replay = case.make(), CostMeter(repeats=1), lit_scale.cost.meter.replay_step
    impose = technique.impose_step_kind
    imposed: list[dict[str, Any]] = []
    multiplied: list[int] = []

    def noted(trainer: Any, module: Any, kind: dict[str, Any]) -> None:
        imposed.append(kind)
        impose(trainer, module, kind)

    def counted(*args: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            replay(*args)
        multiplied.append(counter.get_total_flops())

    monkeypatch.setattr(technique, "impose_step_kind", noted)
    monkeypatch.setattr(lit_scale.cost.meter, "replay_step", counted)
    place = PLACES[case.home]
    trainer = fit(place.network(), place.data(), tmp_path, technique, meter, max_steps=STEPS)
    ledger = meter.ledger
    assert ledger.calibrated.keys() >= set(ledger.counts)
    keys = list(ledger.calibrated)
    keys += [*keys[1:], *keys[:1]]  # two rounds, the second of which begins with another kind
    assert multiplied == [ledger.flops[key] for key in keys]
    prefix = f"{technique.name}/"
    *during, _ = imposed  # the state before the replay is imposed again at its end
    assert during == [{n.removeprefix(prefix): v for n, v in key if n.startswith(prefix)} for key in keys]
    assert (len(set(multiplied)) == 1) is case.one_price

    # and with them the step of a run without it, whether or not it made one
    without = CostMeter(repeats=0)
    fit(place.network(), place.data(), tmp_path, without, max_steps=1)
    plain = [key for key in ledger.calibrated if dict(key)["plain"]]
    assert {ledger.flops[key] for key in plain} <= set(without.ledger.flops.values())
    told = [one for one in meter.record(trainer, trainer.lightning_module)["step_kinds"] if one["plain"]]
    for steps in ([ledger.counts.get(key, 0) for key in plain], [one["count"] for one in told]):
        assert ("unknown" if not steps else "made" if any(steps) else "priced") == case.plain_steps
