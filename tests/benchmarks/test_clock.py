"""The clock from end to end on a task of seconds, and what its tasks and entries promise."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from entries import ENTRIES, Control, Entry
from prices import recipe_of
from tasks import TASKS, Task

from lit_scale.cli import RecipeCLI

ROOT = Path(__file__).parents[2]


def config_of(recipe: str, flags: list[str]) -> dict:
    """All settings of a run, as the command line reads them."""
    return RecipeCLI(recipe_of(recipe), [*flags, "--compare"]).config.as_dict()


def named(flags: tuple[str, ...]) -> set[str]:
    return {flag.removeprefix("--").partition("=")[0] for flag in flags}


def flat(config: dict, prefix: str = "") -> dict:
    out: dict = {}
    for name, value in config.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_a_technique_differs_from_the_plain_run_in_its_own_flags_alone(entry: Entry) -> None:
    task = TASKS[entry.task]
    size = next(iter(task.sizes))
    common = [*task.machine, *task.flags, *task.sizes[size], "--trainer.max_steps=10", "--model.lr=0.001"]
    plain = flat(config_of(task.recipe, common))
    own = flat(config_of(entry.recipe, [*common, *entry.flags]))
    for variant in entry.variants.values():
        config_of(entry.recipe, [*common, *variant])
    for part in ("model", "data", "trainer"):
        names = {name for name in plain.keys() | own.keys() if name.startswith(f"{part}.")}
        differing = {name for name in names if plain.get(name) != own.get(name)}
        assert differing - {"trainer.default_root_dir"} <= named(entry.flags), f"{entry.name} trains something else"


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_task_has_a_ladder_budgets_and_a_network_that_is_trained_properly(task: Task) -> None:
    assert len(task.sizes) >= 4
    assert task.unit in task.sizes
    assert task.headline in task.budgets
    assert list(task.budgets) == sorted(task.budgets)
    size, budget = task.trained
    assert size in task.sizes
    assert budget in task.budgets
    recipe = recipe_of(task.recipe)
    for flags in task.sizes.values():
        config_of(task.recipe, [*task.machine, *task.flags, *flags])
    assert recipe.model is not None


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_controls_are_on_the_ladder_and_are_flags(entry: Entry) -> None:
    task, control = TASKS[entry.task], entry.control
    assert set(control.size.values()) & set(task.sizes) or not control.size
    size = next(iter(task.sizes))
    if control.flags:
        config_of(control.recipe or entry.recipe, [*task.machine, *task.flags, *task.sizes[size], *control.flags])
    if control.batch_size:
        assert control.batch_size != task.batch_size


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="pairs of runs need two cores")
def test_from_plain_runs_to_a_row(tmp_path: Path) -> None:
    """Everything in turn, in a process of its own: prices, rates, ladder, a technique, its control, pairs, analysis."""
    script = tmp_path / "sweep.py"
    script.write_text((Path(__file__).parent / "tiny_sweep.py").read_text())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3_000:]
    plain = json.loads((tmp_path / "results" / "tiny.plain.json").read_text())
    stored = json.loads((tmp_path / "results" / "patch_dropping.tiny.json").read_text())
    row = stored["result"]
    assert row["complete"]
    assert row["seeds"] == [1, 2]
    assert {"same_network", "any_size"} == set(row["saving"]) == set(row["loss_at_equal_cost"])
    for estimate in (*row["saving"].values(), *row["loss_at_equal_cost"].values(), row["static_control"], row["wall"]):
        assert estimate["estimate"] is not None or estimate["reason"]
    # the plain run beside a technique's is the stored one, to the bit
    beside = [run for run in stored["runs"] if run["technique"] is None and run["again"]]
    assert len(beside) == 2
    for run in beside:
        same = [
            other
            for other in plain["runs"]
            if all(other[n] == run[n] for n in ("size", "steps", "lr", "seed")) and not other["flags"]
        ]
        assert [other["test"] for other in same] == [run["test"]]
    # nothing that is reported was chosen on
    assert {run["seed"] for run in stored["runs"] if run["seed"] < 1_000} == {1, 2}
    # once more: nothing is made again
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr[-3_000:]
    assert "test " not in again.stdout


def test_entries_name_a_control_or_say_that_there_is_none() -> None:
    for entry in ENTRIES.values():
        has_one = bool(entry.control.size or entry.control.flags or entry.control.batch_size)
        assert has_one or entry.control.about.startswith("none"), entry.name
    assert isinstance(next(iter(ENTRIES.values())).control, Control)
    assert replace(next(iter(ENTRIES.values())), kind="x").name.endswith(".x")
