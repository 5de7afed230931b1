"""Checks that the stored results were made with the present code, and that the pages agree with them.

    python benchmarks/check.py                     # exit status 1 if a page or a result disagrees with the stored runs
    python benchmarks/check.py --strict            # ... or if a run was made with other code
    python benchmarks/check.py --verify            # repeat the cheapest run of each stale group
    python benchmarks/check.py --verify text_mlm.plain token_dropping.text_mlm

Every run is stored with a digest of the code that it trained with. A change of the code may leave the outcome of a run
unchanged. So ``--verify`` repeats the cheapest run of each stale group; if its losses are the same to the last bit, the
group counts as current, and a note is stored in the file. This covers only the code that this run executes. After a
change that affects other settings only, make the results again. Do not verify while ``clock.py`` writes the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import tables  # noqa: E402
import tasks_gpu  # noqa: E402
from analysis import analyse  # noqa: E402
from entries import ENTRIES as ON_CPU  # noqa: E402
from entries import Entry  # noqa: E402
from provenance import code_digest  # noqa: E402
from store import Store  # noqa: E402

from runs import Run, Runner  # noqa: E402

__all__ = ["Group", "groups", "unlike_their_runs", "verify"]

ENTRIES: dict[str, Entry] = ON_CPU | tasks_gpu.ENTRIES


@dataclass
class Group:
    """Runs of one file that were made with the same code.

    Attributes:
        store: The file.
        recipe: Name of the recipe that made the runs.
        technique: Whether the runs use a technique.
        code: Digest of the code that the runs were made with.
        runs: Entries of the runs.
    """

    store: Store
    recipe: str
    technique: bool
    code: str
    runs: list[dict[str, Any]]

    @property
    def present(self) -> str:
        """Digest of the present code for these runs; ``"of no recipe"`` if the recipe no longer exists."""
        gone = not (ROOT / "recipes" / f"{self.recipe}.py").exists()
        return "of no recipe" if gone else code_digest(self.recipe, self.technique)

    @property
    def stale(self) -> bool:
        """Whether the code has changed since the runs were made."""
        return self.code != self.present

    def __str__(self) -> str:
        """A description in one line."""
        what = f"{len(self.runs)} {'technique' if self.technique else 'plain'} run{'s' if len(self.runs) > 1 else ''}"
        days = sorted({run["date"] for run in self.runs})
        told = f"{self.store.path.stem}: {what} of {self.recipe}, {' to '.join(dict.fromkeys((days[0], days[-1])))}: "
        return told + (f"stale, made with code {self.code}, now {self.present}" if self.stale else "current")


def groups(folder: Path) -> Iterator[Group]:
    """All stored runs of tasks, by file, recipe and code."""
    for path in sorted(folder.glob("*.json")):
        store = Store(path)
        task = tables.KNOWN.get(store.data.get("task", ""))
        if task is None or "runs" not in store.data:
            continue
        found: dict[tuple[str, bool, str], list[dict[str, Any]]] = {}
        for entry in store.runs:
            recipe = recipe_of(store, entry)
            found.setdefault((recipe, entry["technique"] is not None, entry["code"]), []).append(entry)
        for (recipe, technique, code), runs in sorted(found.items()):
            yield Group(store, recipe, technique, code, runs)


def recipe_of(store: Store, entry: dict[str, Any]) -> str:
    """Name of the recipe of a run: the task's for a plain run; a control may have the recipe of another technique."""
    if entry["technique"] is None:
        return tables.KNOWN[store.data["task"]].recipe
    known = ENTRIES.get(store.path.stem)
    if known is not None and known.control.recipe and entry["technique"] == list(known.control.flags):
        return known.control.recipe
    return store.data["recipe"]


def run_of(group: Group, entry: dict[str, Any]) -> Run:
    """The run that belongs to an entry."""
    technique = None if entry["technique"] is None else tuple(entry["technique"])
    task = tables.KNOWN[group.store.data["task"]]
    where = (task, entry["size"], entry["steps"], entry["lr"], entry["seed"], group.recipe)
    return Run(*where, technique, tuple(entry["flags"]), entry["again"])


def verify(group: Group, runner: Runner) -> str:
    """Repeat the cheapest run of a stale group, and mark the group as current if all losses agree; return a message."""
    cheapest = min(group.runs, key=lambda entry: entry["flops"])
    run = run_of(group, cheapest)
    again = runner.make(run)
    for split in ("val", "test"):
        names = [name for name, value in cheapest[split].items() if again[split].get(name) != value]
        if names:
            told = ", ".join(f"{name} {again[split].get(name)} instead of {cheapest[split][name]}" for name in names)
            return f"{group.store.path.stem}: {run.name} is another run now ({split}: {told}); the group stays stale"
    note = {"date": date.today().isoformat(), "from": group.code, "to": again["code"], "run": run.key}
    for entry in group.runs:
        entry["code"] = again["code"]
    group.store.data.setdefault("verified", []).append(note)
    group.store.save()
    return f"{group.store.path.stem}: {run.name} is the same run to the last bit; {len(group.runs)} runs are current"


def unlike_their_runs(folder: Path) -> Iterator[str]:
    """Messages on stored results that differ from those computed from the stored runs."""
    for one in tables.measured(folder):
        entry = ENTRIES.get(one.name)
        if entry is None:
            yield f"{one.name}: no such entry in benchmarks/entries.py"
        elif not same(again(one, entry), one.result):
            yield f"{one.name}: its result is not what its runs give; python benchmarks/clock.py analyse {one.name}"


def again(one: tables.Measured, entry: Entry) -> dict[str, Any]:
    """The result of a technique computed from its runs, in the form of the stored one."""
    found: dict[str, Any] = json.loads(json.dumps(analyse(one.task, entry, one.plain, one.store)))
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, up to rounding errors that differ between machines.

    >>> same({"a": [1.0, "x"]}, {"a": [1.0 + 1e-9, "x"]}), same({"a": 1.0}, {"a": 1.01})
    (True, False)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=2e-5)
    return bool(one == other)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="treat runs of other code as an error")
    parser.add_argument(
        "--verify", nargs="*", metavar="NAME", help="repeat one run of each stale group (of all files by default)"
    )
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="core for repeated runs")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "verify", help="folder of runs in progress")
    options = parser.parse_args(args)
    folder = tables.RESULTS
    if options.verify is not None:
        if unknown := [name for name in options.verify if not (folder / f"{name}.json").exists()]:
            parser.error(f"--verify: no results named {', '.join(unknown)}")
        runner = Runner(options.runs, [options.core])
        for group in list(groups(folder)):
            if group.stale and (not options.verify or group.store.path.stem in options.verify):
                print(verify(group, runner), flush=True)
    stale = 0
    for group in groups(folder):
        print(group)
        stale += group.stale
    wrong = list(unlike_their_runs(folder))
    changed = [path for path, text in tables.pages(folder).items() if path.read_text() != text]
    wrong += [f"{path.relative_to(tables.ROOT)} is not what is stored; python benchmarks/tables.py" for path in changed]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if stale:
        told = "1 group of runs was" if stale == 1 else f"{stale} groups of runs were"
        print(f"{told} made with other code; --verify makes one run of each again")
    return int(bool(wrong) or (options.strict and stale > 0))


if __name__ == "__main__":
    sys.exit(main())
