import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import savings
import tables
import yaml
from presets import PRESETS

ROOT = Path(__file__).parents[2]


def shape(plain, seconds, count, **technique):
    common = {"phase": "train", "samples": 4, "tokens": 64, "update": True, "plain": plain, "batch": "4x16"}
    return common | technique | {"count": count, "flops_each": 1, "seconds_each": seconds, "price": "replay"}


def record(*shapes, charges=0.0):
    return {
        "step_kinds": list(shapes),
        "charges": {"growth": {"count": 1, "seconds": charges}},
        "flops": 5,
        "wall_seconds": 7.0,
    }


def test_a_slow_machine_does_not_change_what_a_step_costs_relative_to_the_plain_one():
    baseline = [record(shape(True, seconds, 10)) for seconds in (0.9, 1.0, 5.0)]
    technique = [record(shape(False, 0.2 * s, 5, blocks=2), shape(True, s, 5, blocks=8)) for s in (1.1, 4.0)]
    plain = savings.plain_prices([*baseline, *technique])
    assert plain == 1.1  # the median of 0.9, 1.0, 1.1, 4.0, 5.0: one slow run decides nothing
    assert savings.costs(baseline[2], plain)["reference_seconds"] == pytest.approx(11.0)
    for one in technique:
        assert savings.costs(one, plain)["reference_seconds"] == pytest.approx((5 * 0.2 + 5) * 1.1)


def test_charges_count_and_validation_does_not():
    validation = shape(True, 100.0, 3) | {"phase": "validate"}
    one = record(shape(True, 1.0, 10), validation, charges=2.5)
    assert savings.costs(one, savings.plain_prices([one]))["reference_seconds"] == pytest.approx(12.5)


def test_the_rate_is_tuned_beyond_the_ends_of_the_grid(tmp_path):
    preset = replace(PRESETS["bert_progressive_stack"]["cpu"], lrs=[1e-3, 2e-3])
    sweep = savings.Sweep("bert_progressive_stack", "cpu", preset, tmp_path, None, 1)
    best = {10: 4e-3, 20: 2.5e-4}
    sweep.make_all = lambda runs, what: {
        run: {"metrics": {"val/loss": abs(math.log(run.lr / best[run.steps]))}} for run in runs
    }
    rates, tried = savings.tuned_rates(sweep, True, [10, 20])
    assert rates == best
    assert {one["lr"] for one in tried if one["steps"] == 10} == {1e-3, 2e-3, 4e-3, 8e-3}


def test_the_readme_and_the_cards_say_what_is_stored():
    """Every generated table is exactly what the stored results give; no figure is typed by hand."""
    results = ROOT / "benchmarks" / "results"
    readme = (ROOT / "README.md").read_text()
    assert tables.render(readme, results) == readme
    for result in tables.stored(results, "saving"):
        card = (ROOT / "docs" / f"{result['technique']}.md").read_text()
        assert tables.points_table(result) in card
    for result in tables.stored(results, "choices"):
        assert tables.choices_table(result) in (ROOT / "docs" / f"{result['technique']}.md").read_text()
    for kind, card, make in (
        ("large_batch", "large_batch", tables.large_batch_lines),
        ("memory", "eight_bit_optimizer", tables.parity_lines),
    ):
        for result in tables.stored(results, kind):
            assert make(result) in (ROOT / "docs" / f"{card}.md").read_text()


def test_readme_names_every_recipe_and_technique_with_results():
    readme = (ROOT / "README.md").read_text()
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert recipe.name in readme
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if "saving" in json.loads(path.read_text()):
            assert f"docs/{json.loads(path.read_text())['technique']}.md" in readme


def test_stored_savings_follow_from_their_own_points():
    """Recomputed from counts, prices and losses of every run, the stored saving comes out again."""
    for result in tables.stored(ROOT / "benchmarks" / "results", "saving"):
        for point in result["points"]:
            again = savings.costs(point, result["plain_seconds"])
            for clock in again:
                assert again[clock] == pytest.approx(point[clock])
        lengths = [entry["steps"] for entry in result["by_length"]]
        headline, by_length = savings.analyse(
            result["points"], result["headline_steps"], lengths, result.get("after_one_step", {})
        )
        assert by_length == result["by_length"]
        assert {clock: headline[clock] for clock in result["saving"]} == result["saving"]
        assert set(savings.CLOCKS) <= set(result["saving"])


def test_the_recorded_command_names_no_folder():
    args = ["bert", "--runs", "/a/b", "--seeds", "3", "--out=/c"]
    assert savings.command("savings", args) == "python benchmarks/savings.py bert --seeds 3"


def test_all_sweeps_go_on_when_one_fails(monkeypatch, capsys):
    made = []

    def sweep(args):
        made.append((args.recipe, args.preset))
        if args.recipe == "vit_resolution_growing":
            raise RuntimeError("baseline-300 ended with exit code 1")

    monkeypatch.setattr(savings, "run_sweep", sweep)
    monkeypatch.setattr(sys, "argv", ["savings.py", "--all"])
    with pytest.raises(SystemExit, match="these sweeps failed.*: vit_resolution_growing cpu$"):
        savings.main()
    cpu = [(recipe, name) for recipe, own in PRESETS.items() for name in own if name.startswith("cpu")]
    assert made == cpu
    assert ("vit_importance_sampling", "cpu-plain") in made
    printed = capsys.readouterr().out
    assert f"sweep {len(made)} of {len(made)}" in printed
    assert "vit_resolution_growing: baseline-300 ended with exit code 1" in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("bert_progressive_stack --seeds=0", "--seeds"),
        ("bert_progressive_stack --jobs=0", "--jobs"),
        ("bert_progressive_stack --preset=tpu", "--preset"),
        ("bert_progressive_stack --all", "name one recipe, or --all"),
        ("vit_resolution_growing --preset=cpu-plain", "--preset cpu-plain: vit_resolution_growing has cpu, gpu"),
        ("no_such_recipe", "recipe"),
    ],
)
def test_bad_arguments_are_refused_with_usage(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["savings.py", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        savings.main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_only_the_projects_own_results_are_shown_in_its_readme(tmp_path, monkeypatch):
    stored = tmp_path / "benchmarks" / "results"
    for folder in (stored, tmp_path / "docs", tmp_path / "mine"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(text := "<!-- memory:begin -->\nolder\n<!-- memory:end -->\n")
    tables.update_readme(tmp_path / "mine")
    assert (tmp_path / "README.md").read_text() == text
    tables.update_readme(stored)
    assert "Not measured yet" in (tmp_path / "README.md").read_text()


def test_flags_behind_two_dashes_are_those_of_every_run(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        savings.Sweep, "make_all", lambda sweep, runs, what: asked.extend(map(sweep.flags, runs)) or 1 / 0
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["savings.py", "bert_token_dropping", f"--runs={tmp_path}", "--", "--data.corpus=books", "--model.depth=2"],
    )
    with pytest.raises(ZeroDivisionError):
        savings.main()
    assert len(asked) == 3  # the first runs of a sweep: its rates
    own = PRESETS["bert_token_dropping"]["cpu"].flags
    assert all(flags[: len(own) + 2] == [*own, "--data.corpus=books", "--model.depth=2"] for flags in asked)


@pytest.mark.parametrize(
    ("recipe", "name"), [(recipe, name) for recipe, own in PRESETS.items() for name in own if name == "gpu"]
)
def test_a_recipe_takes_the_flags_of_its_gpu_preset(recipe, name, monkeypatch, capsys):
    """No such machine is needed to see that they are flags, and that baselines are long enough to be compared with."""
    preset, path = PRESETS[recipe][name], str(savings.ROOT / "recipes" / f"{recipe}.py")
    monkeypatch.setattr(sys, "argv", [path, *preset.flags, "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(path, run_name="__main__")
    assert not stopped.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    asked = dict(flag.removeprefix("--").split("=", 1) for flag in preset.flags)
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["model"]["width"] == int(asked["model.width"])
    cost = preset.technique_steps[0] * preset.relative_cost
    assert min(preset.baseline_steps) < cost / 2
    assert cost < 2 * max(preset.baseline_steps)


@pytest.mark.slow
def test_a_sweep_runs_is_stored_and_resumes(tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "cache"))
    preset = replace(
        PRESETS["bert_progressive_stack"]["cpu"],
        flags=[
            f"--data.corpus={tiny_corpus}",
            "--data.sequence_length=16",
            "--data.batch_size=4",
            "--data.max_val_sequences=32",
            "--model.depth=4",
            "--model.width=16",
            "--model.num_heads=2",
        ],
        lrs=[3e-3],
        tune_steps=[8],
        baseline_steps=[8, 40],
        technique_steps=[16],
        jobs=2,
    )
    monkeypatch.setitem(PRESETS["bert_progressive_stack"], "cpu", preset)
    monkeypatch.setattr(tables, "update_readme", lambda folder: None)
    out = tmp_path / "out"
    command = ["savings.py", "bert_progressive_stack", "--seeds=2", f"--runs={tmp_path / 'runs'}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", command)
    savings.main()
    stored = json.loads((out / "bert_progressive_stack.cpu.json").read_text())
    assert (out / "bert_progressive_stack.cpu.png").stat().st_size > 10_000
    assert (out / "overview.png").stat().st_size > 5_000
    assert len(stored["points"]) == 6
    assert set(stored["saving"]) == set(savings.CLOCKS)
    assert all(point["reference_seconds"] > 0 and point["flops"] > 0 for point in stored["points"])

    # again with one run missing: only that one is made
    runs = sorted((tmp_path / "runs").glob("*/*-seed*"))
    assert len(runs) == 2 + 6  # two were made to tune the rates
    times = {run: (run / "result.json").stat().st_mtime_ns for run in runs}
    missing = next(run for run in runs if run.name.startswith("technique"))
    (missing / "result.json").unlink()
    savings.main()
    remade = [run for run in runs if (run / "result.json").stat().st_mtime_ns != times[run]]
    assert remade == [missing]
    again = json.loads((out / "bert_progressive_stack.cpu.json").read_text())
    assert [p["loss"] for p in again["points"]] == [p["loss"] for p in stored["points"]]  # and to the last bit


@pytest.mark.slow
def test_recipes_that_train_the_same_without_their_technique_share_the_baseline(tmp_path):
    def home(recipe, **changes):
        preset = replace(PRESETS[recipe]["cpu"], **changes)
        return savings.Sweep(recipe, "cpu", preset, tmp_path / recipe, None, 1).home(True)

    stacking = home("bert_progressive_stack")
    assert home("bert_token_dropping") == stacking
    assert home("bert_token_dropping", flags=["--model.depth=4"]) != stacking
    assert home("gpt_sequence_length_warmup") != stacking


def test_wall_times_of_different_sweeps_are_not_compared():
    costs = {"reference_seconds": 1.0, "flops": 1.0, "wall_seconds": 1.0}
    points = [
        {"baseline": True, "steps": n, "lr": 1.0, "loss": 3.0 - n, "recipe": "other"}
        | {c: n * v for c, v in costs.items()}
        for n in (1, 2)
    ] + [{"baseline": False, "steps": 1, "lr": 1.0, "loss": 1.5, "recipe": "own"} | costs]
    headline, _ = savings.analyse(points, 1, [1])
    assert headline["wall_seconds"]["estimate"] is None
    assert headline["wall_seconds"]["reason"].startswith("the baseline ran at another time")
    assert headline["flops"]["estimate"] == pytest.approx(1 - 2**-0.5)


def test_flops_that_zeros_need_not_cost_are_a_clock_of_their_own():
    prices = {"reference_seconds": 1.0, "wall_seconds": 1.0, "recipe": "own", "lr": 1.0}
    points = [prices | {"baseline": True, "steps": n, "loss": 4.0 - n, "flops": 10.0**n} for n in (1, 2, 3)]
    points += [prices | {"baseline": False, "steps": 2, "loss": 2.2, "flops": 100.0, "sparse_flops": 30.0}]
    headline, _ = savings.analyse(points, 2, [2])
    paid = 10**1.8  # the frontier loses a nat for each factor of ten
    assert headline["flops"]["estimate"] == pytest.approx(1 - 100 / paid)
    assert headline["sparse_flops"]["estimate"] == pytest.approx(1 - 30 / paid)
    assert headline["as_long"]["loss"]["estimate"] == pytest.approx(0.1)
    assert headline["as_long"]["reference_seconds"]["estimate"] == 0.0
