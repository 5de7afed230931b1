"""What tables say of runs whose losses follow a known law (see made_results.py)."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tables
from entries import Control, Entry
from made_results import ENTRY, SEEDS, TASK, run, store_plain, store_technique
from store import Store

ROOT = Path(__file__).parents[2]
OTHER = replace(ENTRY, technique="patch_dropping", kind="half")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "KNOWN", {TASK.name: TASK})
    monkeypatch.setattr(tables, "ENTRIES", {ENTRY.name: ENTRY, OTHER.name: OTHER})


def row_of(folder: Path, technique: str = "token dropping") -> dict[str, str]:
    """The cells of a technique's row, by the first words of their columns."""
    lines = tables.savings_table(tables.measured(folder), ROOT / "docs").splitlines()
    head, rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1]), lines[2:]
    (names,) = head
    line = next(line for line in rows if line.startswith(f"| [{technique}"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    short = ("technique", "task", "network", "any", "same", "loss", "control", "wall", "tried")
    assert len(names) == len(cells) == len(short)
    return dict(zip(short, cells, strict=True))


# -- the README's table -----------------------------------------------------------------------------------------------


def test_a_technique_that_beats_the_envelope_and_its_control_is_bold(tmp_path: Path, known: None) -> None:
    """At the headline cost the best plain network has 1.9, and 1.8 for twice that; the same network has 1.95."""
    store_technique(tmp_path, store_plain(tmp_path), 1.85)
    row = row_of(tmp_path)
    assert row["technique"] == "[token dropping](docs/token_dropping.md)"
    assert row["network"] == "2x8, 32 tokens per parameter"
    assert re.fullmatch(r"\*\*29% \(2\d% to 3\d%\)\*\*", row["any"])  # 1 - 1 / sqrt(2)
    assert re.fullmatch(r"50% \((49|50)% to 5[01]%\)", row["same"])
    assert row["loss"] == "-0.0500 (-0.0509 to -0.0491); -0.1000 (-0.1009 to -0.0991)"
    assert row["control"] == "better than a network of half the depth: -0.0500 (-0.0509 to -0.0491)"
    assert row["tried"] == "5 seeds; 4 settings, plain 1"


def test_a_gain_that_a_smaller_network_has_too_is_told_in_words(tmp_path: Path, known: None) -> None:
    store_technique(tmp_path, store_plain(tmp_path), 1.9)
    row = row_of(tmp_path)
    assert row["any"].startswith("0% (")
    assert row["same"].startswith("29% (")
    assert row["same"].endswith("; a network of half the depth does as well")
    assert row["control"].startswith("not told apart from a network of half the depth: ")
    store_technique(tmp_path, store_plain(tmp_path), 1.93)
    row = row_of(tmp_path)
    assert row["same"].endswith("; a network of half the depth does better")
    assert row["control"].startswith("worse than a network of half the depth: +0.0300 (")


def test_nothing_is_bold_without_a_control_or_with_an_interval_that_reaches_zero(tmp_path: Path, known: None) -> None:
    store = store_technique(tmp_path, store_plain(tmp_path), 1.85)
    del store.data["control"]
    store.data["result"] = tables.measured(tmp_path)[0].result
    nothing = {"about": "none", "estimate": None, "low": None, "high": None, "reason": "it has none on this network"}
    store.data["result"]["static_control"] = nothing
    store.save()
    row = row_of(tmp_path)
    assert row["control"] == "none"
    assert "**" not in row["any"]
    store_technique(tmp_path, store_plain(tmp_path), 1.85, jitter=0.2)  # beats both on the mean only
    row = row_of(tmp_path)
    assert row["any"].startswith("29% (")
    assert "not told apart from" in row["control"]


def test_an_incomplete_result_is_marked_and_never_bold(tmp_path: Path, known: None) -> None:
    store_technique(tmp_path, store_plain(tmp_path), 1.85, seeds=(1, 2, 3))
    row = row_of(tmp_path)
    assert row["tried"].startswith("**incomplete**: 3 of 5 seeds")
    assert row["any"].startswith("29% (")


def test_the_best_stands_first_and_those_without_an_estimate_last(tmp_path: Path, known: None) -> None:
    plain = store_plain(tmp_path)
    store_technique(tmp_path, plain, 1.93)
    store_technique(tmp_path, plain, 1.85, entry=OTHER)
    far = replace(ENTRY, technique="rho_loss")
    store_technique(tmp_path, plain, 1.5, entry=far, own_steps=5_000.0)
    text = tables.savings_table(tables.measured(tmp_path), ROOT / "docs")
    assert re.findall(r"^\| \[(.+?)\]", text, re.MULTILINE) == ["patch dropping (half)", "token dropping", "rho loss"]
    row = row_of(tmp_path, "rho loss")
    assert row["loss"].startswith("its cost lies beyond the plain runs'; ")
    assert row["any"] == "better than the longest plain run"  # and dearer, so that no share is told


def test_wall_time_that_contradicts_the_priced_saving_is_told(tmp_path: Path, known: None) -> None:
    """By priced steps the technique costs as much as the plain run beside it, and saves half against the curve."""
    plain = store_plain(tmp_path)
    for factor, expected, ending in (
        (1.0, 50, "%)"),
        (1.8, 10, "less than by priced steps"),
        (0.4, 80, "more than by"),
    ):
        store_technique(tmp_path, plain, 1.85, wall_factor=factor)
        wall = row_of(tmp_path)["wall"]
        assert int(wall.partition("%")[0]) == pytest.approx(expected, abs=1)
        assert ending in wall
        assert ("priced" in wall) == (factor != 1.0)
    store_technique(tmp_path, plain, 1.85)
    assert row_of(tmp_path)["wall"] == "not measured in pairs"


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("better than the longest plain run: at least 12% saved", "at least 12%: better than the longest plain run"),
        ("better than the longest plain run: at least -12% saved", "better than the longest plain run"),
        ("an interval needs runs of at least two seeds on both sides", "too few seeds"),
        ("its cost, 9,000, lies beyond the plain runs' 500 to 2,000", "its cost lies beyond the plain runs'"),
        ("something new", "something new"),
    ],
)
def test_reasons_are_told_in_few_words(reason: str, words: str) -> None:
    assert tables.brief(reason) == words


def test_what_has_not_been_measured_is_named(tmp_path: Path, known: None) -> None:
    plain = store_plain(tmp_path)
    none = tables.savings_table(tables.measured(tmp_path), ROOT / "docs")
    both = "`token_dropping.made_up`, `patch_dropping.made_up.half`"
    assert none == f"Not yet measured by this edition of the clock: {both}."
    store_technique(tmp_path, plain, 1.85)
    some = tables.savings_table(tables.measured(tmp_path), ROOT / "docs")
    assert some.endswith("Not yet measured by this edition of the clock: `patch_dropping.made_up.half`.")
    assert "(benchmarks/results/overview.png)" in some
    begun = Store(tmp_path / f"{OTHER.name}.json")  # its runs have begun, and say nothing yet
    begun.data |= {"task": TASK.name, "technique": OTHER.technique}
    begun.save()
    assert tables.savings_table(tables.measured(tmp_path), ROOT / "docs") == some


def test_a_cost_by_samples_and_another_metric_are_told(tmp_path: Path, known: None, monkeypatch) -> None:
    task = replace(TASK, metric="probe_error")
    monkeypatch.setattr(tables, "KNOWN", {TASK.name: task})
    plain = store_plain(tmp_path)
    store = store_technique(tmp_path, plain, 1.85, priced="by samples")
    for one in (plain, store):
        for entry in one.runs:
            entry["test"]["probe_error"] = entry["val"]["probe_error"] = entry["test"]["loss"]
        one.save()
    row = row_of(tmp_path)
    assert row["any"].endswith("; its cost is counted by samples")
    assert row["loss"].endswith(" (probe error)")


def test_of_several_words_for_a_control_the_verb_fits(tmp_path: Path, known: None) -> None:
    several = replace(ENTRY, control=Control("half of the samples, taken at random", size={"2x8": "1x8"}))
    store_technique(tmp_path, store_plain(tmp_path), 1.9, entry=several)
    assert row_of(tmp_path)["same"].endswith("; half of the samples, taken at random, do as well")


# -- a task's and a card's tables -------------------------------------------------------------------------------------


def test_a_task_shows_all_plain_runs_what_they_cost_and_who_is_best(tmp_path: Path, known: None) -> None:
    plain = store_plain(tmp_path)
    store_technique(tmp_path, plain, 1.85)
    text = tables.task_section(TASK, plain, tables.measured(tmp_path), ROOT / "docs")
    # 64 tokens a step, 0.06 s a step of the unit: 1,000 steps are a minute
    assert "| 1x8 | 1,000 | 1,000 | 64 | 1.0 | 0.00 | 0.001 | 2.400 ± 0.008 | 1.900 ± 0.008 | 5 | yes |" in text
    assert "| 2x8 | 2,000 | 500 | 16 | 1.0 | 0.00 | 0.001 | 2.450 ± 0.008 | 1.950 ± 0.008 | 5 |  |" in text
    assert "1x8, 1,000 steps: 0.001 2.400, 0.002 2.450" in text
    assert "1x8, `--data.batch_size=2`, 2,000 steps: 0.001 2.430" in text
    assert (
        "| [token dropping](token_dropping.md) | 2x8, 32 tokens per parameter | 1.0 | 0.001 | 1.850 (5 seeds) |" in text
    )
    assert "2x8 2.00 (± 0.0%)" in text
    assert "(../benchmarks/results/made_up.png)" in text
    empty = Store(tmp_path / "nothing.json")
    assert tables.task_section(TASK, empty, [], ROOT / "docs") == "Not measured yet."


def test_a_card_shows_each_seed_and_where_it_comes_from(tmp_path: Path, known: None) -> None:
    store_technique(tmp_path, store_plain(tmp_path), 1.85, wall_factor=1.0)
    text = tables.card_section(tables.measured(tmp_path)[0])
    assert "|  | 2x8 (headline) |" in text
    assert "| settings | `--token_dropping.keep=0.5` |" in text
    assert "Test loss of each seed on 2x8: 1: 1.8610, 2: 1.8390, 3: 1.8540, 4: 1.8460, 5: 1.8500." in text
    assert "| other metrics | perplexity 2 |" in text
    assert ", 5 pairs." in text
    assert (
        "From `python benchmarks/clock.py technique token_dropping.made_up` on a processor, 2026-01-02; torch 2."
        in text
    )


def test_a_result_goes_to_its_marks_or_under_measured() -> None:
    marked = "# A\n\n## When\n<!-- result.x:begin -->\nold\n<!-- result.x:end -->\n\n## Last\nmore\n"
    assert tables.with_section(marked, "result.x", "new") == marked.replace("old", "new")
    bare = "# A\n\n## Last\nmore\n"
    once = tables.with_section(bare, "result.x", "new")
    assert once == bare + "\n## Measured\n\n<!-- result.x:begin -->\nnew\n<!-- result.x:end -->\n"
    assert tables.with_section(once, "result.x", "new") == once
    twice = tables.with_section(once, "result.y", "other")
    assert twice == once + "\n<!-- result.y:begin -->\nother\n<!-- result.y:end -->\n"
    between = tables.with_section("# A\n\n## Measured\ntext\n\n## Last\nmore\n", "result.x", "new")
    assert between.index("text") < between.index("new") < between.index("## Last")
    with pytest.raises(ValueError, match="has no <!-- b:end -->"):
        tables.update("<!-- b:begin -->", "b", "")


def test_pages_are_written_from_the_stored_files_and_written_once(tmp_path: Path, known: None) -> None:
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(
        "<!-- savings:begin -->\n<!-- savings:end -->\n<!-- memory:begin -->\n<!-- memory:end -->"
    )
    (root / "docs" / "evidence.md").write_text("<!-- task.made_up:begin -->\n<!-- task.made_up:end -->\n")
    (root / "docs" / "token_dropping.md").write_text("# Token dropping\n")
    (root / "docs" / "other.md").write_text("untouched")
    store_technique(tmp_path, store_plain(tmp_path), 1.85)
    (tmp_path / "token_dropping.gone.json").write_text(json.dumps({"task": "gone", "result": {}, "runs": []}))
    texts = tables.pages(tmp_path, root)
    assert "[token dropping](docs/token_dropping.md)" in texts[root / "README.md"]
    assert "Not measured yet; `python benchmarks/memory.py`" in texts[root / "README.md"]
    assert "| 1x8 | 1,000 | 1,000 |" in texts[root / "docs" / "evidence.md"]
    assert "<!-- result.made_up:begin -->\n**`token_dropping.made_up`**" in texts[root / "docs" / "token_dropping.md"]
    assert texts[root / "docs" / "other.md"] == "untouched"
    for path, text in texts.items():
        path.write_text(text)
    assert tables.pages(tmp_path, root) == texts


def test_only_the_projects_own_results_change_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "pages", lambda folder: pytest.fail("pages of somebody's own results"))
    assert tables.update_pages(tmp_path) == []


def test_the_pages_say_what_is_stored() -> None:
    """Every generated table is exactly what the stored results give; no figure is typed by hand."""
    for path, text in tables.pages().items():
        assert path.read_text() == text, f"{path.name}: python benchmarks/tables.py"


def test_the_readme_names_every_recipe_and_every_card_with_results() -> None:
    readme = (ROOT / "README.md").read_text()
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert recipe.name in readme
    for one in tables.measured(tables.RESULTS):
        assert f"docs/{one.technique}.md" in readme


def test_plain_points_put_seeds_together_and_choices_apart(tmp_path: Path) -> None:
    store = store_plain(tmp_path)
    store.data["runs"].append(run("1x8", 1_000, 1, 1.0, again="token_dropping"))  # for wall time only
    points = tables.plain_points_of(store)
    assert {len(point.runs) for point in points if not point.tuning} == {len(SEEDS)}
    assert len([point for point in points if point.tuning]) == 4
    assert [point.size for point in points] == sorted(point.size for point in points)
    assert isinstance(ENTRY, Entry)


def test_points_count_at_the_rate_that_was_tuned_for_their_length(tmp_path: Path) -> None:
    store = store_plain(tmp_path)
    faster = [run("1x8", 2_000, seed, 1.7, lr=2e-3) for seed in SEEDS]
    store.data["runs"] += faster
    store.data["point_rates"] = {"1x8@2000": 2e-3}
    points = tables.plain_points_of(store)
    counting = {(point.size, point.steps, point.lr) for point in points if point.counts(store, TASK)}
    assert counting == {("1x8", 500, 1e-3), ("1x8", 1_000, 1e-3), ("1x8", 2_000, 2e-3)} | {
        ("2x8", steps, 1e-3) for steps in (250, 500, 1_000)
    }
    text = tables.task_section(TASK, store, [], ROOT / "docs")
    assert re.search(r"\| 1x8 \| 1,000 \| 2,000 \| .* \| 0.001 \| .* \| 5 \|  \|", text)
    assert re.search(r"\| 1x8 \| 1,000 \| 2,000 \| .* \| 0.002 \| .* \| 5 \| yes \|", text)


def test_an_estimate_without_an_interval_wins_nothing() -> None:
    reason = "no interval: plain runs of one length only do not tell what the error of prices does to the loss"
    gain = {"estimate": -0.1, "low": None, "high": None, "reason": reason}
    assert tables.verdict(gain) == "not told apart from"
    assert tables.difference(gain) == "-0.100 (no interval: plain runs of one length only)"
    control = {"about": "half", "estimate": 0.0, "low": -0.1, "high": 0.1, "reason": ""}
    row = {"static_control": control, "loss_at_equal_cost": {"same_network": gain, "any_size": gain}}
    assert tables.control_does_as_well(row) == ""  # there is no gain yet that it could equal
    assert tables.loss_interval(row, [1.0, 2.0, 3.0]) == pytest.approx((2.484, 2.484), abs=1e-3)
