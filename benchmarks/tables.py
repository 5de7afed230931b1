"""Generates the tables of the README and of docs/, and the pictures, from the stored results.

    python benchmarks/tables.py

Nothing is measured here; only the stored files are read. ``check.py`` reports whether the pages are up to date.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import component_tables  # noqa: E402
import tasks_gpu  # noqa: E402
from analysis import TUNING, envelope, plain_points, price_of  # noqa: E402
from entries import ENTRIES  # noqa: E402
from envelope import interval  # noqa: E402
from store import Store  # noqa: E402
from tasks import TASKS, Task  # noqa: E402

__all__ = ["RESULTS", "Measured", "PlainPoint", "measured", "pages", "plain_points_of", "update_pages"]

RESULTS = ROOT / "benchmarks" / "results"
KNOWN: dict[str, Task] = TASKS | tasks_gpu.TASKS
NO_VALUE: dict[str, Any] = {"estimate": None, "low": None, "high": None, "reason": "not measured"}

_REASONS = {  # reasons of analysis.py, shortened for tables
    r"an interval needs runs of at least two seeds.*": "too few seeds",
    r"better than the longest plain run: at least (-\d+%) saved": "better than the longest plain run",
    r"better than the longest plain run: at least (\d+%) saved": r"at least \1: better than the longest plain run",
    r"its loss, .*, is worse than the shortest plain run's .*": "worse than the shortest plain run",
    r"its cost, .*, lies beyond the plain runs' .*": "its cost lies beyond the plain runs'",
    r"no interval: plain runs of one length only.*": "no interval: plain runs of one length only",
    r"no pairs of runs at the same time were made": "not measured in pairs",
    r"it has none on this network": "none for this network",
}


# -- what is stored ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A technique on a task: its result file, and the plain runs of the task."""

    name: str
    task: Task
    store: Store
    plain: Store

    @cached_property
    def result(self) -> dict[str, Any]:
        """The stored result."""
        return self.store.data["result"]

    @property
    def technique(self) -> str:
        """Name of the technique, which is the stem of its card."""
        return self.store.data["technique"]

    @property
    def title(self) -> str:
        """Name for tables and pictures."""
        kind = self.store.data.get("kind", "")
        return self.technique.replace("_", " ") + (f" ({kind})" if kind else "")

    @property
    def missing_seeds(self) -> int:
        """Number of the reported seeds without a run."""
        return len(set(self.task.seeds) - set(self.result["seeds"]))


def measured(folder: Path) -> list[Measured]:
    """Techniques with results, ordered by their loss at equal cost against the best plain network."""
    found = []
    plain: dict[str, Store] = {}
    for path in sorted(folder.glob("*.json")):
        store = Store(path)
        task = KNOWN.get(store.data.get("task", ""))
        if task is not None and store.data.get("result", {}).get("loss") is not None:
            own = plain.setdefault(task.name, Store(folder / f"{task.name}.plain.json"))
            found.append(Measured(path.stem, task, store, own))

    def order(one: Measured) -> tuple[bool, float, str]:
        estimate = one.result["loss_at_equal_cost"]["any_size"]["estimate"]
        return estimate is None, estimate or 0.0, one.name

    return sorted(found, key=order)


@dataclass(frozen=True)
class PlainPoint:
    """Plain runs that differ only in their seed."""

    size: str
    steps: int
    lr: float
    flags: tuple[str, ...]
    runs: tuple[dict[str, Any], ...]

    @property
    def tuning(self) -> bool:
        """Whether these are runs for tuning."""
        return self.runs[0]["seed"] >= TUNING

    @property
    def tokens_per_parameter(self) -> float:
        """Trained tokens per parameter."""
        return self.runs[0]["tokens"] / self.runs[0]["parameters"]

    def counts(self, store: Store, task: Task) -> bool:
        """Whether techniques are compared with these runs: not for tuning, and at the chosen learning rate."""
        reported = plain_points(store, task).get((self.size, self.steps), {})
        return not self.flags and not self.tuning and any(run["lr"] == self.lr for run in reported.values())

    def losses(self, split: str, metric: str) -> list[float]:
        """The losses on a split, one per seed."""
        return [run[split][metric] for run in self.runs]


def plain_points_of(store: Store) -> list[PlainPoint]:
    """All plain runs of a task except those for wall time, ordered by size and length."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in store.runs:
        if run["technique"] is None and not run["again"]:
            key = (run["size"], run["steps"], run["lr"], tuple(run["flags"]), run["seed"] >= TUNING)
            groups.setdefault(key, []).append(run)
    points = [PlainPoint(size, steps, lr, flags, tuple(own)) for (size, steps, lr, flags, _), own in groups.items()]
    return sorted(points, key=lambda one: (price_of(store, one.size), one.size, one.flags, one.steps, one.lr))


def minutes(cost: float, store: Store) -> float:
    """Convert a cost in steps of the unit to minutes of one core."""
    return cost * store.data["prices"]["unit_seconds"] / 60


# -- words and numbers ------------------------------------------------------------------------------------------------


def brief(reason: str) -> str:
    """The reason why there is no estimate, shortened.

    >>> brief("its loss, 1.702, is worse than the shortest plain run's 1.650")
    'worse than the shortest plain run'
    """
    for pattern, words in _REASONS.items():
        if re.fullmatch(pattern, reason):
            return re.sub(pattern, words, reason)
    return reason


def percent(one: Mapping[str, Any]) -> str:
    """A saving with its interval, or the reason why there is none."""
    if one["estimate"] is None:
        return brief(one["reason"])
    return f"{one['estimate']:.0%} ({one['low']:.0%} to {one['high']:.0%})".replace("-0%", "0%")


def difference(one: Mapping[str, Any]) -> str:
    """A difference of losses with its interval, or the reason why there is none."""
    if one["estimate"] is None:
        return brief(one["reason"])
    if one["low"] is None or one["high"] is None:
        return f"{one['estimate']:+.3f} ({brief(one['reason'])})"
    digits = 3 if one["high"] - one["low"] >= 0.004 else 4
    return f"{one['estimate']:+.{digits}f} ({one['low']:+.{digits}f} to {one['high']:+.{digits}f})"


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds if there are several."""
    mean = statistics.mean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def verdict(one: Mapping[str, Any]) -> str:
    """What the whole interval of a difference of losses shows, in words; without an interval it shows nothing."""
    if one["low"] is None or one["high"] is None:
        return "not told apart from"
    if one["high"] < 0:
        return "better than"
    return "worse than" if one["low"] > 0 else "not told apart from"


def against_control(result: Mapping[str, Any]) -> str:
    """The static control, and the difference of the technique's loss to it."""
    control = result.get("static_control", NO_VALUE | {"about": "none"})
    if control["estimate"] is None:
        return (
            control["about"]
            if control["about"].startswith("none")
            else f"{control['about']}: {brief(control['reason'])}"
        )
    return f"{verdict(control)} {control['about']}: {difference(control)}"


def control_does_as_well(result: Mapping[str, Any]) -> str:
    """A note that the static control has the same gain over the same network; empty if it does not."""
    control, gain = result.get("static_control", NO_VALUE), result["loss_at_equal_cost"]["same_network"]
    if control["estimate"] is None or verdict(gain) != "better than" or control["high"] < 0:
        return ""
    about = control["about"]
    verb = "does" if about.split()[0] in ("a", "an", "the") else "do"
    return f"; {about}{',' if ',' in about else ''} {verb} {'better' if control['low'] > 0 else 'as well'}"


def wins(one: Measured) -> bool:
    """Whether it beats the best plain network and its static control, each with the whole interval and all seeds."""
    both = (one.result["loss_at_equal_cost"]["any_size"], one.result.get("static_control", NO_VALUE))
    return not one.missing_seeds and all(verdict(own) == "better than" for own in both)


def wall(result: Mapping[str, Any]) -> str:
    """The saving in wall time against the same network, and whether it contradicts the saving in priced steps."""
    own, priced = result["wall"], result["saving"]["same_network"]
    text = percent(own)
    if own["estimate"] is None or priced["estimate"] is None:
        return text
    if own["high"] < priced["low"]:
        return f"{text}; less than by priced steps"
    return f"{text}; more than by priced steps" if own["low"] > priced["high"] else text


def network(result: Mapping[str, Any]) -> str:
    """Size and trained tokens per parameter."""
    return f"{result['size']}, {result['tokens_per_parameter']:.0f} tokens per parameter"


def tried(one: Measured) -> str:
    """Number of seeds, and of settings that were tried."""
    seeds = f"{len(one.result['seeds'])} seeds"
    if one.missing_seeds:
        seeds = f"**incomplete**: {len(one.result['seeds'])} of {len(one.task.seeds)} seeds"
    elif one.store.data["networks"].keys() - one.result["networks"].keys():
        seeds = f"**incomplete**: {seeds} of one of its two networks"
    return f"{seeds}; {one.result['settings_tried']} settings, plain {one.result['settings_tried_plain']}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(head)
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]


# -- the README -------------------------------------------------------------------------------------------------------


def savings_table(found: Sequence[Measured], docs: Path) -> str:
    """A row for each technique and task, the best first, and a list of those that have not been measured."""
    head = (
        "technique",
        "task",
        "network",
        "saved, against the best plain network of any size",
        "saved, against the same network",
        "loss at equal cost, against any size; the same network",
        "against its static control",
        "saved wall time, same network",
        "tried",
    )
    rows = []
    for one in found:
        result, card = one.result, docs / f"{one.technique}.md"
        saved = percent(result["saving"]["any_size"])
        by_samples = "; its cost is counted by samples" if result.get("priced") == "by samples" else ""
        losses = result["loss_at_equal_cost"]
        unit = "" if one.task.metric == "loss" else f" ({one.task.metric.replace('_', ' ')})"
        rows.append(
            (
                f"[{one.title}](docs/{card.name})" if card.exists() else one.title,
                f"`{one.task.name}`",
                network(result),
                (f"**{saved}**" if wins(one) else saved) + by_samples,
                percent(result["saving"]["same_network"]) + control_does_as_well(result),
                f"{difference(losses['any_size'])}; {difference(losses['same_network'])}{unit}",
                against_control(result),
                wall(result),
                tried(one),
            )
        )
    lines = table(head, rows) if rows else []
    if rows:
        picture = "benchmarks/results/overview.png"
        lines += ["", f"![Loss at equal cost against the best plain network, of each technique]({picture})"]
    missing = [entry.name for entry in ENTRIES.values() if entry.name not in {one.name for one in found}]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        lines += [*([""] if lines else []), f"Not yet measured by this edition of the clock: {names}."]
    return "\n".join(lines)


# -- a page per task --------------------------------------------------------------------------------------------------


def task_section(task: Task, plain: Store, found: Sequence[Measured], docs: Path) -> str:
    """The section of a task: plain runs, rates that were tried, and techniques."""
    if "prices" not in plain.data or not plain.runs:
        return "Not measured yet."
    points, metric = plain_points_of(plain), task.metric.replace("_", " ")
    curve = envelope(plain, task)
    on_envelope = set(zip(curve.sizes, curve.costs, strict=True)) if curve else set()
    rows = []
    for point in (point for point in points if not point.tuning):
        cost = point.runs[0]["own_steps"] * price_of(plain, point.size)
        chosen = point.counts(plain, task) and (point.size, cost) in on_envelope
        rows.append(
            (
                ", ".join([point.size, *(f"`{flag}`" for flag in point.flags)]),
                f"{point.runs[0]['parameters']:,}",
                f"{point.steps:,}",
                f"{point.tokens_per_parameter:.0f}",
                f"{minutes(cost, plain):.1f}" if not point.flags else "",
                f"{point.runs[0]['flops'] / 1e12:.2f}",
                f"{point.lr:g}",
                spread(point.losses("val", task.metric)),
                spread(point.losses("test", task.metric)),
                str(len(point.runs)),
                "yes" if chosen else "",
            )
        )
    head = ["network", "parameters", "steps", "tokens per parameter", "minutes of one core", "TFLOPs", "rate"]
    head += [f"validation {metric}", f"test {metric}", "seeds", "best plain network for its cost"]
    prices = ", ".join(
        f"{size} {own['price']:.2f} (± {own['log_sd']:.1%})" for size, own in plain.data["prices"]["sizes"].items()
    )
    size, budget = task.trained
    each = 1e3 * plain.data["prices"]["unit_seconds"]
    lines = [
        f"{task.about[0].upper()}{task.about[1:]}. A step of `{task.unit}` takes {each:.1f} ms of one core; in its "
        f"steps those of the others cost: {prices}. Techniques are compared at {task.headline:,} such steps "
        f"({minutes(task.headline, plain):.1f} minutes), and on `{size}` at {budget:,} "
        f"({minutes(budget, plain):.1f} minutes). Means ± standard deviations over seeds:",
        "",
        *(table(head, rows) if rows else ["No runs of the seeds that are reported yet."]),
        *tuning_lines([point for point in points if point.tuning], task),
        *technique_lines([one for one in found if one.task is task], docs),
    ]
    if any(point.counts(plain, task) for point in points):
        picture = f"../benchmarks/results/{task.name}.png"
        lines += ["", f"![Loss over cost on {task.name}: plain networks and techniques]({picture})"]
    return "\n".join(lines)


def tuning_lines(points: Sequence[PlainPoint], task: Task) -> Iterator[str]:
    """Learning rates that were tried, with their validation losses."""
    groups: dict[tuple[Any, ...], list[PlainPoint]] = {}
    for point in points:
        groups.setdefault((point.size, point.steps, point.flags), []).append(point)
    told = []
    for (size, steps, flags), own in groups.items():
        where = ", ".join([size, *(f"`{flag}`" for flag in flags), f"{steps:,} steps"])
        told.append(f"{where}: " + ", ".join(f"{p.lr:g} {p.runs[0]['val'][task.metric]:.3f}" for p in own))
    if told:
        yield from ("", f"Rates tried (validation {task.metric.replace('_', ' ')}, one other seed): {'; '.join(told)}.")


def technique_lines(found: Sequence[Measured], docs: Path) -> Iterator[str]:
    """A table of the techniques of a task, with a row for each of their networks."""
    rows = []
    for one in found:
        for own in (one.result["networks"][name] for name in headline_first(one)):
            if own.get("loss") is not None:
                rows.append(
                    (
                        f"[{one.title}]({one.technique}.md)" if (docs / f"{one.technique}.md").exists() else one.title,
                        network(own),
                        f"{minutes(own['cost'], one.plain):.1f}",
                        f"{own['lr']:g}",
                        f"{own['loss']:.3f} ({len(own['seeds'])} seeds)",
                        difference(own["loss_at_equal_cost"]["any_size"]),
                        difference(own["loss_at_equal_cost"]["same_network"]),
                        against_control(own),
                    )
                )
    if rows:
        head = ["technique", "network", "minutes of one core", "rate", f"test {found[0].task.metric.replace('_', ' ')}"]
        head += ["against any size at equal cost", "against the same network", "against its static control"]
        yield from ("", *table(head, rows))


def headline_first(one: Measured) -> list[str]:
    """Names of its networks, the headline network first."""
    return sorted(one.result["networks"], key=lambda name: (name != one.store.data["headline"], name))


# -- a technique's card -----------------------------------------------------------------------------------------------


def card_section(one: Measured) -> str:
    """The results of one technique on one task, for its card."""
    names = [name for name in headline_first(one) if one.result["networks"][name].get("loss") is not None]
    own = [one.result["networks"][name] for name in names]
    chosen = [one.store.data["chosen"][name] for name in names]
    metric = one.task.metric.replace("_", " ")

    def row(label: str, values: Iterable[str]) -> tuple[str, ...]:
        return (label, *values)

    rows = [
        row("steps, rate", (f"{c['steps']:,}, {c['lr']:g}" for c in chosen)),
        row("settings", (" ".join(f"`{flag}`" for flag in c["flags"]) or "the recipe's" for c in chosen)),
        row("minutes of one core", (f"{minutes(o['cost'], one.plain):.1f}" for o in own)),
        row("TFLOPs", (f"{o['flops'] / 1e12:.2f}" for o in own)),
        row("tokens per parameter", (f"{o['tokens_per_parameter']:.0f}" for o in own)),
        row(f"test {metric}", (spread([r["test"][one.task.metric] for r in runs_of(one, n)]) for n in names)),
        row("other metrics", (others(o["metrics"], one.task.metric) for o in own)),
        row("saved, any size", (percent(o["saving"]["any_size"]) for o in own)),
        row("saved, same network", (percent(o["saving"]["same_network"]) for o in own)),
        row("saved FLOPs, any size", (percent(o["saving_flops"]["any_size"]) for o in own)),
        row("saved FLOPs, same network", (percent(o["saving_flops"]["same_network"]) for o in own)),
        row(f"{metric} at equal cost, any size", (difference(o["loss_at_equal_cost"]["any_size"]) for o in own)),
        row(
            f"{metric} at equal cost, same network", (difference(o["loss_at_equal_cost"]["same_network"]) for o in own)
        ),
        row("static control", map(against_control, own)),
        row("settings tried", (f"{o['settings_tried']}, plain {o['settings_tried_plain']}" for o in own)),
    ]
    data = one.store.data
    told = [f"**`{one.name}`**: {one.task.about}."]
    if one.missing_seeds:
        told.append(f"**Incomplete**: {len(one.result['seeds'])} of {len(one.task.seeds)} seeds.")
    if one.result.get("priced") == "by samples":
        told.append("Its steps have no plain form to be timed beside, so their cost is counted by samples.")
    heads = [f"{o['size']}{' (headline)' if n == data['headline'] else ''}" for n, o in zip(names, own, strict=True)]
    lines = [" ".join(told), "", *table(["", *heads], rows), ""]
    for name, each in zip(names, own, strict=True):
        seeds = ", ".join(f"{run['seed']}: {run['test'][one.task.metric]:.4f}" for run in runs_of(one, name))
        lines += [f"Test {metric} of each seed on {each['size']}: {seeds}.", ""]
    pairs = f", {one.result['wall']['pairs']} pairs" if one.result["wall"].get("pairs") else ""
    lines += [f"Wall time saved against the same network: {wall(one.result)}{pairs}.", ""]
    hardware = data.get("hardware", {})
    machine = ", ".join(hardware.get("gpus") or [str(hardware.get("cpu", "unknown processor"))])
    packages = ", ".join(f"{name} {version}" for name, version in data.get("versions", {}).items())
    lines.append(f"From `{data['command']}` on {machine}, {data['date']}; {packages}.")
    return "\n".join(lines)


def runs_of(one: Measured, name: str) -> list[dict[str, Any]]:
    """The reported runs of a network, ordered by seed."""
    chosen, size = one.store.data["chosen"][name], one.store.data["networks"][name][0]
    wanted: tuple[Any, ...] = (size, chosen["steps"], chosen["lr"], chosen["flags"], [], "")
    runs = [
        run
        for run in one.store.runs
        if (run["size"], run["steps"], run["lr"], run["technique"], run["flags"], run["again"]) == wanted
        and run["seed"] in one.task.seeds
    ]
    return sorted(runs, key=lambda run: run["seed"])


def others(metrics: Mapping[str, float], compared: str) -> str:
    """All metrics except the one that is compared."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in metrics.items() if name != compared)


# -- pages ------------------------------------------------------------------------------------------------------------


def update(text: str, name: str, body: str) -> str:
    """Replace the part of ``text`` between the marks of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    if not found:
        return text
    if end not in rest:
        raise ValueError(f"{begin} has no {end} behind it")
    return f"{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}"


def with_section(text: str, name: str, body: str) -> str:
    """Put a result into a card; without marks for it, they are added at the end of the section "Measured"."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text:
        before, heading, rest = text.partition("\n## Measured\n")
        own, next_heading, after = rest.partition("\n## ")
        text = f"{before.rstrip()}\n\n## Measured\n{own.rstrip()}\n\n{begin}\n{end}\n".replace(
            "## Measured\n\n\n", "## Measured\n\n"
        )
        text += f"{next_heading}{after}" if heading else ""
    return update(text, name, body)


def pages(folder: Path = RESULTS, root: Path = ROOT) -> dict[Path, str]:
    """All pages, with generated parts made from the results in ``folder``."""
    found, docs = measured(folder), root / "docs"
    texts = {path: path.read_text() for path in [root / "README.md", *sorted(docs.glob("*.md"))] if path.exists()}

    def put(path: Path, name: str, body: str) -> None:
        if path in texts:
            texts[path] = update(texts[path], name, body)

    readme = root / "README.md"
    put(readme, "savings", savings_table(found, docs))
    for task in KNOWN.values():
        body = task_section(task, Store(folder / f"{task.name}.plain.json"), found, docs)
        put(docs / "evidence.md", f"task.{task.name}", body)
    for one in found:
        card = docs / f"{one.technique}.md"
        if card in texts:
            name = one.name.removeprefix(f"{one.technique}.")
            texts[card] = with_section(texts[card], f"result.{name}", card_section(one))
    put(readme, "memory", component_tables.memory_lines(component_tables.stored(folder, "memory")))
    put(readme, "throughput", component_tables.throughput_lines(component_tables.stored(folder, "throughput")))
    put(readme, "overhead", component_tables.overhead_lines(component_tables.stored(folder, "overhead")))
    for result in component_tables.stored(folder, "large_batch"):
        name = f"large_batch.{result['preset']}"
        put(readme, name, component_tables.large_batch_table(result))
        put(docs / "large_batch.md", name, component_tables.large_batch_lines(result))
    for result in component_tables.stored(folder, "memory"):
        if result.get("parity"):
            put(docs / "eight_bit_optimizer.md", f"memory.{result['preset']}", component_tables.parity_lines(result))
    for result in component_tables.stored(folder, "mae_step"):
        put(docs / f"{result['technique']}.md", f"step.{result['preset']}", component_tables.mae_step_lines(result))
    return texts


def update_pages(folder: Path) -> list[Path]:
    """Update the generated parts of all pages, if ``folder`` is the project's own; return the pages that changed."""
    if folder.resolve() != RESULTS:
        return []  # results of a user, written elsewhere with --out
    changed = {path: text for path, text in pages(folder).items() if path.read_text() != text}
    for path, text in changed.items():
        path.write_text(text)
    return list(changed)


def loss_interval(result: Mapping[str, Any], losses: Sequence[float]) -> tuple[float, float]:
    """Lengths of the error bar of a technique's loss, down and up.

    The interval is that of the difference to the best plain network; if it has none, that of the losses.
    """
    own = result["loss_at_equal_cost"]["any_size"]
    if own["low"] is not None:
        return own["estimate"] - own["low"], own["high"] - own["estimate"]
    mean, low, high = interval(losses) if len(losses) > 1 else (0.0, 0.0, 0.0)
    return mean - low, high - mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    import figures

    for path in [*update_pages(RESULTS), *figures.draw(RESULTS)]:
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
