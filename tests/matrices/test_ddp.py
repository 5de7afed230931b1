"""Every technique in two processes: their weights agree after every step, and a resumed run is the uninterrupted one.

A test runs this file as a script with many cases; Lightning starts its second process, and both leave what they hold.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import CASES, STEPS, train
from tests.support.equality import assert_same
from tests.support.processes import cases_asked_for, of_ranks, run_phases, run_ranks
from tests.support.training import left

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STOP = 3
GROUPS = [list(CASES)[start::3] for start in range(3)]  # one start of two processes for each


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_two_processes_agree_after_every_step_and_resume(names: list[str], tmp_path: Path) -> None:
    run_ranks(__file__, names, tmp_path)
    for name in names:
        whole, rest = of_ranks(tmp_path / name), of_ranks(tmp_path / name, f"from {STOP}")
        assert_same(whole[0]["left"]["weights"], whole[1]["left"]["weights"], name)
        assert whole[0]["losses"] != whole[1]["losses"], name  # each rank has samples of its own
        for before, after in zip(whole, rest, strict=True):
            assert before["gaps"] == [0.0] * len(before["losses"]), name
            assert len(before["losses"]) >= STEPS
            assert 0 < len(after["losses"]) < len(before["losses"]), name
            assert after["losses"] == before["losses"][-len(after["losses"]) :], name
            assert_same(before["left"], after["left"], name)


def fit(name: str, folder: Path, phase: str, resume: Path | None) -> dict[str, Any]:
    case = CASES[name]
    save = None if resume else folder / phase
    options = {"strategy": case.strategy, "devices": 2}
    trainer, watch = train(case.home, folder, case.make(), resume=resume, save=save, batch_size=2, **options)
    return {"left": left(trainer), "losses": watch.losses, "gaps": watch.gaps}


if __name__ == "__main__":
    names, root = cases_asked_for()
    for name in names:
        run_phases(name, root, (STOP,), lambda *args, name=name: fit(name, *args))
