"""Every two techniques: they go along, and a run with both resumes exactly, or they are refused before a step."""

from pathlib import Path

import pytest

from tests.support.cases import CASES, Pair, pairs, train
from tests.support.equality import assert_same
from tests.support.networks import build
from tests.support.training import left, quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]

REFUSED = [pair for pair in pairs() if pair.why_refused]
ALLOWED = [pair for pair in pairs() if not pair.why_refused]


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: pair.name)
def test_two_that_cannot_go_along_are_refused_in_one_line_at_setup(pair: Pair, tmp_path: Path) -> None:
    techniques = [pair.one.make(), pair.other.make()]
    trainer = quiet_trainer(tmp_path, callbacks=techniques)
    with pytest.raises(ValueError, match=rf"^{pair.one.name} and {pair.other.name} {pair.why_refused}$") as caught:
        techniques[0].setup(trainer, build("plain_torch"), "fit")
    assert "\n" not in str(caught.value)


def test_every_refusal_names_techniques_of_the_registry() -> None:
    assert {name for case in CASES.values() for name in case.refused} <= CASES.keys()


@pytest.mark.parametrize("pair", ALLOWED, ids=lambda pair: pair.name)
def test_two_go_along_and_resume_exactly(pair: Pair, tmp_path: Path) -> None:
    stop = 3 if pair.in_order else 5  # before what changes in the middle, and behind it
    whole, watch = train(pair.place, tmp_path, *pair.make(), save=tmp_path / "saved")
    rest, again = train(pair.place, tmp_path, *pair.make(), resume=tmp_path / "saved" / f"step={stop}.ckpt")
    assert_same(left(whole), left(rest))
    assert again.losses == watch.losses[-len(again.losses) :] != watch.losses
