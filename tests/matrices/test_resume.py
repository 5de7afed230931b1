"""Every technique: a run that is resumed at any of several steps ends as the uninterrupted one, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cases import CASES, STEPS, Case, train
from tests.support.equality import assert_same, same
from tests.support.training import left

pytestmark = [pytest.mark.filterwarnings("ignore")]

STOPS = (1, 3, 4, 6, 7)  # first steps, before and at a change, at the end of an epoch, the last step


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_a_resumed_run_is_the_uninterrupted_one(case: Case, tmp_path: Path) -> None:
    whole, watch = train(case.home, tmp_path, case.make(), save=tmp_path / "saved")
    for stop in STOPS:
        rest, again = train(case.home, tmp_path, case.make(), resume=tmp_path / "saved" / f"step={stop}.ckpt")
        assert_same(left(whole), left(rest), f"resumed at step {stop}")
        assert 0 < len(again.losses) < len(watch.losses)
        assert again.losses == watch.losses[-len(again.losses) :]


def test_without_counted_randomness_a_resumed_run_differs(case: Case, tmp_path: Path) -> None:
    ends = []
    for resume in (None, None, tmp_path / "saved" / "step=3.ckpt"):
        torch.manual_seed(7)
        saving: dict[str, Any] = {"resume": resume} if resume else {"save": tmp_path / "saved"}
        trainer, _ = train(case.home, tmp_path, case.make(), step_seed=False, **saving)
        ends.append(left(trainer)["weights"])
    assert_same(ends[0], ends[1], "the run itself repeats")
    assert not same(ends[0], ends[2])


def test_a_run_that_resumes_without_its_own_state_differs_where_the_registry_says_so(
    case: Case, tmp_path: Path
) -> None:
    whole, _ = train(case.home, tmp_path, case.make(), save=tmp_path / "saved")
    path = tmp_path / "saved" / f"step={STEPS - 3}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    kept = {key: state for key, state in checkpoint["callbacks"].items() if not key.startswith(case.name)}
    assert len(kept) < len(checkpoint["callbacks"]) or not case.state_matters
    torch.save(checkpoint | {"callbacks": kept}, path)
    rest, _ = train(case.home, tmp_path, case.make(), resume=path)
    assert same(left(whole)["weights"], left(rest)["weights"]) is not case.state_matters
