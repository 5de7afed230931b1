"""Runs side by side: costs in one unit, savings by hand, and refusals in one line."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_scale.cost import compare

ROOT = Path(__file__).parents[2]


def record(steps: int, loss: float | None, cost: float | None, **more: Any) -> dict[str, Any]:
    """What CostMeter writes, as far as it is read here: a plain step takes 0.1 s and 1,000 FLOPs."""
    made = {
        **{"baseline": False, "technique": "", "steps": steps, "parameters": 50, "world_size": 1, "prices": "replay"},
        **{"metrics": {} if loss is None else {"val/loss": loss}, "reference_seconds": (cost or 0.0) / 10},
        **{"flops": 1_000 * round(cost or steps), "plain_step_flops": 1_000, "plain_step_seconds": 0.1},
        **{"cost_in_plain_steps": cost},
    }
    if cost is None:
        made |= {"plain_step_flops": None, "plain_step_seconds": None, "no_plain_step": "no plain form"}
    return made | more


def stored(folder: Path, **records: dict[str, Any]) -> dict[str, Path]:
    for name, one in records.items():
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(one))
    return {name: folder / name / "result.json" for name in records}


SHORT, LONG = record(100, 3.0, 100.0), record(400, 2.0, 400.0)


def savings(**records: dict[str, Any]) -> dict[str, str]:
    runs = compare.compare(records)
    return {run.name: compare.saving(run, runs) for run in runs}


def test_a_saving_is_that_of_the_curve_through_the_baselines() -> None:
    """A factor of four takes a nat, so that 2.5 is reached in the middle of the logarithms, at 200 plain steps."""
    own = record(250, 2.5, 120.0, technique="stacking")
    assert savings(short=SHORT, long=LONG, own=own) == {"short": "", "long": "", "own": "40%"}
    dear = record(250, 2.5, 250.0, technique="stacking")
    assert savings(short=SHORT, long=LONG, own=dear)["own"] == "-25%"
    exact = record(250, 2.5, 200.0, technique="stacking")
    assert savings(short=SHORT, long=LONG, own=exact)["own"] == "0%"


def test_baselines_of_equal_length_count_as_one() -> None:
    seeds = {f"short{seed}": record(100, 3.0 + shift, 100.0) for seed, shift in enumerate((-0.2, 0.2))}
    assert savings(**seeds, long=LONG, own=record(250, 2.5, 100.0, technique="stacking"))["own"] == "50%"


def test_nothing_is_extrapolated() -> None:
    def own(loss: float, cost: float) -> str:
        return savings(short=SHORT, long=LONG, own=record(250, loss, cost, technique="stacking"))["own"]

    assert own(1.9, 100.0) == "at least 75%"
    assert own(1.9, 500.0) == "none: better than all baselines"
    assert own(3.1, 50.0) == "none: worse than all baselines"
    assert savings(short=SHORT, own=record(250, 2.5, 100.0, technique="stacking"))["own"] == ""
    assert savings(short=SHORT, long=LONG, own=record(250, None, 100.0, technique="stacking"))["own"] == ""


def test_a_baseline_that_did_worse_for_longer_is_on_the_curve_no_further() -> None:
    worse = record(800, 2.2, 800.0)
    own = record(250, 2.1, 100.0, technique="stacking")
    found = savings(short=SHORT, long=LONG, longer=worse, own=own)["own"]
    assert found == f"{1 - 100 / math.exp(math.log(100) + 0.9 * math.log(4)):.0%}"


def test_a_run_that_says_so_is_a_baseline_whatever_its_technique_is_called() -> None:
    runs = compare.compare({"a": record(1, 1.0, 1.0, technique="x", baseline=True), "b": record(1, 1.0, 1.0)})
    assert [run.baseline for run in runs] == [True, True]


# -- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        record(100, 2.5, 100.0, parameters=60),
        record(100, 2.5, 100.0, plain_step_flops=2_000),  # the same network on batches twice as large
    ],
)
def test_runs_with_different_plain_steps_are_refused_in_one_line(other: dict[str, Any], tmp_path, capsys) -> None:
    paths = stored(tmp_path, short=SHORT, other=other)
    assert compare.main([str(path) for path in paths.values()]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert "the plain steps differ" in refused
    assert "--unit FILE" in refused
    assert compare.main([*map(str, paths.values()), f"--unit={paths['short']}"]) == 0


def test_flops_that_are_counted_in_another_way_are_the_same_plain_step() -> None:
    assert len(compare.compare({"a": SHORT, "b": record(100, 2.5, 100.0, plain_step_flops=1_020)})) == 2


def test_with_a_unit_other_plain_steps_count_by_their_flops() -> None:
    large = record(100, 2.5, 150.0, parameters=60, plain_step_flops=3_000, technique="stacking")
    without = record(70, 2.5, None, technique="odd", flops=80_000, world_size=2)
    runs = compare.compare({"short": SHORT, "large": large, "without": without}, unit=SHORT)
    assert [(run.cost, run.how) for run in runs] == [
        (100.0, ""),
        (450.0, "plain step by FLOPs"),
        (40.0, "by FLOPs"),  # of two processes, each of which makes half of them
    ]
    with pytest.raises(ValueError, match="--unit: that run has no plain step: no plain form"):
        compare.compare({"short": SHORT}, unit=without)


def test_a_run_without_a_plain_step_has_no_cost_and_says_why(tmp_path, capsys) -> None:
    paths = stored(tmp_path, short=SHORT, long=LONG, odd=record(70, 2.5, None, technique="odd"))
    assert compare.main([str(path) for path in paths.values()]) == 0
    printed = capsys.readouterr().out
    assert "odd has no cost: no plain form" in printed


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_row_for_each_run(tmp_path: Path) -> None:
    own = record(250, 2.5, 120.0, technique="stacking")
    stored(tmp_path, short=SHORT, long=LONG, own=own)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "lit_scale.cost.compare", "short", "long", "own"]
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "short, baseline 100 3.0000 100 1e+05" in rows
    assert "own, stacking 250 2.5000 120 1.2e+05 40%" in rows
    assert "warning" not in done.stdout


def test_prices_of_both_kinds_are_warned_of(tmp_path, capsys) -> None:
    paths = stored(tmp_path, short=SHORT, long=LONG, own=record(250, 2.5, 120.0, technique="stacking", prices="run"))
    assert compare.main([str(path) for path in paths.values()]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "prices of own are medians" in line
    assert "those of short, long were replayed" in line
    paths = {name: path for name, path in paths.items() if name != "own"}
    assert compare.main([str(path) for path in paths.values()]) == 0
    assert "warning" not in capsys.readouterr().out


def test_too_few_baselines_are_told(tmp_path, capsys) -> None:
    paths = stored(tmp_path, short=SHORT, own=record(250, 2.5, 120.0, technique="stacking"))
    assert compare.main([str(path) for path in paths.values()]) == 0
    assert "baselines of at least two lengths" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", "[1", "[]", '{"reference_seconds": 1.0}'])
def test_what_is_no_record_is_refused_in_one_line(text: str, tmp_path, capsys) -> None:
    (tmp_path / "result.json").write_text(text)
    assert compare.main([str(tmp_path)]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert "no record of" in refused
    assert compare.main([str(tmp_path / "nothing")]) == 2


def test_another_metric_can_be_compared(tmp_path, capsys) -> None:
    paths = stored(tmp_path, short=record(100, 3.0, 100.0, metrics={"val/error": 0.25}))
    assert compare.main([str(paths["short"]), "--metric=val/error"]) == 0
    assert "0.2500" in capsys.readouterr().out


def test_a_metric_that_no_run_has_is_refused_with_those_there_are(tmp_path, capsys) -> None:
    own = SHORT | {"metrics": {"val_loss": 3.0}}
    (tmp_path / "result.json").write_text(json.dumps(own))
    assert compare.main([str(tmp_path)]) == 2
    assert "--metric val/loss: no run has a metric of this name; choose one of val_loss" in capsys.readouterr().err


def test_the_same_run_twice_is_refused(tmp_path, capsys) -> None:
    path = str(stored(tmp_path, short=SHORT)["short"])
    assert compare.main([path, path]) == 2
    assert "twice" in capsys.readouterr().err
