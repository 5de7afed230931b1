"""Stale results are told from current ones, and a run that comes out the same makes its group current."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import check
import pytest
import tables
from entries import Control
from made_results import ENTRY, RATE, TASK, run, store_plain, store_technique
from provenance import code_digest
from store import Store
from tasks import TASKS, ladder

from runs import Run, Runner

PLAIN, TECHNIQUE = code_digest("bert_progressive_stack", False), code_digest("bert_token_dropping", True)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made results, taken for the project's; its pages are up to date."""
    root = tmp_path / "root"
    folder = root / "benchmarks" / "results"
    (root / "docs").mkdir(parents=True)
    plain = store_plain(folder)
    store_technique(folder, plain, 1.85, code=TECHNIQUE)
    monkeypatch.setattr(tables, "KNOWN", {TASK.name: TASK})
    monkeypatch.setattr(tables, "RESULTS", folder)
    monkeypatch.setattr(tables, "ROOT", root)
    for module in (tables, check):
        monkeypatch.setattr(module, "ENTRIES", {ENTRY.name: ENTRY})
    own_pages = tables.pages
    monkeypatch.setattr(tables, "pages", lambda folder: own_pages(folder, root))
    (root / "README.md").write_text("<!-- savings:begin -->\n<!-- savings:end -->\n")
    write_pages(folder)
    return folder


def write_pages(folder: Path) -> None:
    for path, text in tables.pages(folder).items():
        path.write_text(text)


class SameAgain(Runner):
    """Makes no run, but says that it came out as it is stored, all metrics or all but one."""

    def __init__(self, store: Store, change: float = 0.0) -> None:
        self.store, self.change = store, change
        self.made: list[Any] = []

    def make(self, run: Run, core: int | None = None) -> dict[str, Any]:
        self.made.append(run)
        found = next(e for e in self.store.runs if all(e[name] == value for name, value in run.key.items()))
        test = found["test"] | {"loss": found["test"]["loss"] + self.change}
        return found | {"test": test, "code": code_digest(run.recipe, run.technique is not None)}


# -- what is stale ----------------------------------------------------------------------------------------------------


def test_groups_are_told_by_their_code(results: Path, capsys: pytest.CaptureFixture) -> None:
    assert check.main([]) == 0
    printed = capsys.readouterr().out
    count = len(Store(results / "made_up.plain.json").runs)
    assert f"made_up.plain: {count} plain runs of bert_progressive_stack, 2026-01-02: stale" in printed
    assert "token_dropping.made_up: 5 technique runs of bert_token_dropping, 2026-01-02: current" in printed
    assert "1 group of runs was made with other code" in printed
    assert check.main(["--strict"]) == 1
    store = Store(results / "made_up.plain.json")
    for entry in store.runs:
        entry["code"] = PLAIN
    store.runs[0]["date"] = "2026-01-01"
    store.save()
    assert check.main(["--strict"]) == 0
    assert "2026-01-01 to 2026-01-02: current" in capsys.readouterr().out


def test_a_control_of_another_recipe_is_that_recipes(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Control("small images", flags=("--resolution_growing.a=1",), recipe="vit_resolution_growing")
    monkeypatch.setattr(check, "ENTRIES", {ENTRY.name: replace(ENTRY, control=other)})
    store = Store(results / f"{ENTRY.name}.json")
    store.data["runs"].append(run("2x8", 300, 1, 2.0, technique=["--resolution_growing.a=1"]))
    store.data["runs"].append(run("2x8", 300, 1, 2.0, again="token_dropping"))  # plain, beside the technique's
    store.save()
    found = {(group.recipe, group.technique): len(group.runs) for group in check.groups(results)}
    assert found[("vit_resolution_growing", True)] == 1
    assert found[("bert_token_dropping", True)] == 5
    assert found[("bert_progressive_stack", False)] >= 1


def test_a_recipe_that_is_gone_leaves_its_runs_stale(results: Path) -> None:
    store = Store(results / f"{ENTRY.name}.json")
    store.data["recipe"] = "bert_forgotten"
    store.save()
    (group,) = (group for group in check.groups(results) if group.technique)
    assert group.stale
    assert "of no recipe" in str(group)


def test_files_of_other_benchmarks_are_left_alone(results: Path) -> None:
    (results / "memory.cpu.json").write_text(json.dumps({"benchmark": "memory", "sizes": []}))
    assert {group.store.path.name for group in check.groups(results)} == {
        "made_up.plain.json",
        "token_dropping.made_up.json",
    }


# -- made again -------------------------------------------------------------------------------------------------------


def test_a_run_that_comes_out_the_same_makes_its_group_current(results: Path) -> None:
    stale = next(group for group in check.groups(results) if group.stale)
    runner = SameAgain(stale.store)
    assert "the same run to the last bit" in check.verify(stale, runner)
    cheapest = min(stale.runs, key=lambda entry: entry["flops"])
    assert [made.key for made in runner.made] == [{name: cheapest[name] for name in runner.made[0].key}]
    assert (cheapest["size"], cheapest["steps"], cheapest["lr"]) == ("1x8", 500, RATE)
    stored = Store(results / "made_up.plain.json")
    assert {entry["code"] for entry in stored.runs} == {PLAIN}
    (note,) = stored.data["verified"]
    assert (note["from"], note["to"], note["run"]) == ("0" * 16, PLAIN, runner.made[0].key)
    assert check.main(["--strict"]) == 0


def test_a_run_that_differs_in_the_last_bit_leaves_its_group_stale(results: Path) -> None:
    before = (results / "made_up.plain.json").read_text()
    stale = next(group for group in check.groups(results) if group.stale)
    told = check.verify(stale, SameAgain(stale.store, math.ulp(2.0)))
    assert "another run now (test: loss 2." in told
    assert (results / "made_up.plain.json").read_text() == before


def test_only_the_files_that_are_named_are_verified(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(group: Any, runner: Any) -> str:
        asked.append(group.store.path.stem)
        return ""

    monkeypatch.setattr(check, "verify", note)
    monkeypatch.setattr(check, "Runner", lambda *_: None)
    assert check.main(["--verify", ENTRY.name]) == 0
    assert asked == []  # it is current
    assert check.main(["--verify"]) == 0
    assert asked == ["made_up.plain"]
    with pytest.raises(SystemExit):
        check.main(["--verify", "nothing"])


@pytest.mark.slow
def test_a_real_run_comes_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(TASKS["image_noisy"], name="tiny", sizes=ladder((1, 32)), unit="1x32", trained=("1x32", 15_000))
    monkeypatch.setattr(tables, "KNOWN", {"tiny": task})
    wanted = Run(task, "1x32", 10, 1e-3, 1, task.recipe)
    store = Store(tmp_path / "tiny.plain.json")
    store.data["task"] = "tiny"
    store.add(wanted, Runner(tmp_path / "first", [0], lambda text: None).make(wanted))
    (entry,) = store.runs
    present, entry["code"] = entry["code"], "of another time"
    store.save()
    (group,) = check.groups(tmp_path)
    assert group.stale
    assert "the same run" in check.verify(group, Runner(tmp_path / "second", [0], lambda text: None))
    (entry,) = Store(tmp_path / "tiny.plain.json").runs
    assert entry["code"] == present


# -- pages and results ------------------------------------------------------------------------------------------------


def test_a_page_that_is_not_what_is_stored_fails(results: Path, capsys: pytest.CaptureFixture) -> None:
    (tables.ROOT / "README.md").write_text("<!-- savings:begin -->\n99% saved\n<!-- savings:end -->\n")
    assert check.main([]) == 1
    assert "README.md is not what is stored" in capsys.readouterr().out


def test_a_result_that_its_runs_do_not_give_fails(results: Path, capsys: pytest.CaptureFixture) -> None:
    store = Store(results / f"{ENTRY.name}.json")
    store.data["result"]["saving"]["any_size"]["estimate"] = 0.9
    store.save()
    write_pages(results)
    assert check.main([]) == 1
    told = capsys.readouterr().out
    assert "its result is not what its runs give; python benchmarks/clock.py analyse token_dropping.made_up" in told


def test_a_result_without_an_entry_fails(results: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(check, "ENTRIES", {})
    assert check.main([]) == 1
    assert "no such entry" in capsys.readouterr().out
