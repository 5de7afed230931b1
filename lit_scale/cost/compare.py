"""Compare runs: the cost and loss of each, and the saving of runs with a technique against runs without one.

    python -m lit_scale.cost.compare plain-short/result.json plain-long/result.json technique/result.json

Costs are in *plain steps*: steps of the network without any technique, which each run has timed along with its own
steps. Costs of two runs can be compared if their plain steps are the same: an equal number of parameters, and about
equal FLOPs, hence equal batches. If plain steps differ, name the run whose plain step is the unit:

    python -m lit_scale.cost.compare small/result.json large/result.json --unit small/result.json

Runs with another plain step are then converted by the ratio of the plain steps' FLOPs, and runs without a plain step by
their own FLOPs. FLOPs are not time: small networks need more time per FLOP, so do not rely on the order of two costs
that are close.

Savings are at equal loss. Baselines of at least two lengths, each with a schedule that ends with the run, make a curve
of loss over the logarithm of cost. The saving of a technique is 1 - its cost / the cost at which the curve reaches its
loss. Nothing is extrapolated. Runs of equal length are averaged. There is no interval, so a saving of a few percent is
not significant.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["ComparedRun", "compare", "cost_at", "main", "read", "saving"]

_SAME_STEP = 1.05  # largest ratio of the FLOPs of equal plain steps, which may be counted in different ways


@dataclass(frozen=True)
class ComparedRun:
    """A run's record, and its cost in the unit.

    Attributes:
        name: Name of the run's folder.
        record: The record that ``CostMeter`` wrote.
        cost: Cost in plain steps of the unit; None if the run has no plain step and no unit is given.
        how: How the cost was converted to the unit; empty if it is in the run's own plain steps.
        loss: The last validation loss, or another metric that is compared; None if it was not measured.
    """

    name: str
    record: dict[str, Any]
    cost: float | None
    how: str
    loss: float | None

    @property
    def baseline(self) -> bool:
        """Whether the run was made without a technique."""
        return bool(self.record["baseline"]) or not self.record["technique"]


def read(path: Path) -> dict[str, Any]:
    """Read a record of ``CostMeter``; ``path`` is the file or the run's folder.

    Raises:
        ValueError: If there is no record, or an earlier version wrote it.
    """
    path = path / "result.json" if path.is_dir() else path
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no record of CostMeter ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: no record of CostMeter")
    missing = {"reference_seconds", "cost_in_plain_steps", "plain_step_flops", "prices"} - record.keys()
    if missing:
        raise ValueError(f"{path}: no record of this version of CostMeter (it lacks {', '.join(sorted(missing))})")
    return record


def same_plain_step(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the plain steps of two runs are of the same network on batches of the same size."""
    flops = sorted((one["plain_step_flops"], other["plain_step_flops"]))
    return one["parameters"] == other["parameters"] and flops[1] <= flops[0] * _SAME_STEP


def compare(
    records: dict[str, dict[str, Any]], unit: dict[str, Any] | None = None, metric: str = "val/loss"
) -> list[ComparedRun]:
    """Costs of runs in one unit.

    Args:
        records: Records by name.
        unit: The record whose plain step is the unit. Without it all plain steps must be the same.
        metric: Name of the metric that is compared; lower is better.

    Raises:
        ValueError: If no run has the metric, runs have different plain steps and no unit is given, or the unit has no
            plain step.
    """
    if not any(metric in record["metrics"] for record in records.values()):
        known = sorted({name for record in records.values() for name in record["metrics"]})
        advice = f"choose one of {', '.join(known)}" if known else "validate the runs, so that they have some"
        raise ValueError(f"--metric {metric}: no run has a metric of this name; {advice}")
    priced = {name: record for name, record in records.items() if record["plain_step_flops"]}
    if unit is None:
        first = next(iter(priced), "")
        for name, record in priced.items():
            if not same_plain_step(priced[first], record):
                told = (f"{n}: {r['parameters']:,} parameters, {r['plain_step_flops']:,} FLOPs" for n, r in
                        ((first, priced[first]), (name, record)))  # fmt: skip
                raise ValueError(
                    f"the plain steps differ ({'; '.join(told)}), so their costs do not compare; "
                    f"name the run whose plain step is the unit: --unit FILE"
                )
    elif not unit["plain_step_flops"]:
        raise ValueError(f"--unit: that run has no plain step: {unit.get('no_plain_step', 'its FLOPs are not known')}")
    runs = []
    for name, record in records.items():
        cost, how = record["cost_in_plain_steps"], ""
        if unit is not None and name not in priced:
            cost, how = record["flops"] / record["world_size"] / unit["plain_step_flops"], "by FLOPs"
        elif unit is not None and not same_plain_step(unit, record):
            cost, how = cost * record["plain_step_flops"] / unit["plain_step_flops"], "plain step by FLOPs"
        runs.append(ComparedRun(name, record, cost, how, record["metrics"].get(metric)))
    return runs


def cost_at(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Cost at which a curve of (cost, loss), interpolated linearly in log cost, first falls to ``loss``.

    It is None if no two points of the curve enclose the loss.

    Example:
        >>> cost_at([(100.0, 3.0), (400.0, 2.0)], 2.5)
        200.0
        >>> cost_at([(100.0, 3.0), (400.0, 2.0)], 1.9) is None
        True
    """
    points = sorted(curve)
    for (cost, above), (more, below) in zip(points, points[1:], strict=False):
        if below <= loss <= above and below < above:
            share = (above - loss) / (above - below)
            return round(math.exp(math.log(cost) + share * math.log(more / cost)), 6)
    return None


def saving(run: ComparedRun, runs: Sequence[ComparedRun]) -> str:
    """The saving of a run at equal loss against the baselines among ``runs``, as text; empty if it is undefined."""
    by_steps: dict[int, list[tuple[float, float]]] = {}
    for other in runs:
        if other.baseline and other.cost is not None and other.loss is not None:
            by_steps.setdefault(other.record["steps"], []).append((other.cost, other.loss))
    if run.baseline or run.cost is None or run.loss is None or len(by_steps) < 2:
        return ""
    curve = sorted(
        (sum(cost for cost, _ in own) / len(own), sum(loss for _, loss in own) / len(own)) for own in by_steps.values()
    )
    full = cost_at(curve, run.loss)
    if full is not None:
        return f"{1 - run.cost / full:.0%}".replace("-0%", "0%")
    if run.loss < min(loss for _, loss in curve):
        least = 1 - run.cost / curve[-1][0]
        return f"at least {least:.0%}" if least > 0 else "none: better than all baselines"
    return "none: worse than all baselines" if run.loss > curve[0][1] else "none: not on the baselines' curve"


def table(runs: Sequence[ComparedRun], metric: str) -> Table:
    """A table with a row for each run."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "steps", metric, "cost in plain steps", "FLOPs", "saved at equal loss"):
        shown.add_column(name, justify="left" if name == "run" else "right", no_wrap=name == "run", overflow="fold")
    for run in runs:
        cost = "none" if run.cost is None else f"{run.cost:,.0f}" + (f" ({run.how})" if run.how else "")
        loss = "-" if run.loss is None else f"{run.loss:.4f}"
        own = saving(run, runs)
        name = f"{run.name}, {'baseline' if run.baseline else run.record['technique']}"
        shown.add_row(name, f"{run.record['steps']:,}", loss, cost, f"{run.record['flops']:.3g}", own)
    return shown


def notes(runs: Sequence[ComparedRun]) -> list[str]:
    """Notes and warnings to print below the table."""
    told = [f"{run.name} has no cost: {run.record.get('no_plain_step')}" for run in runs if run.cost is None]
    by = {kind: [run.name for run in runs if run.record["prices"] == kind] for kind in ("replay", "run")}
    if all(by.values()):
        told.append(
            f"warning: prices of {', '.join(by['run'])} are medians of the run's own timings, those of "
            f"{', '.join(by['replay'])} were replayed in turn; other work on the machine may have distorted the former"
        )
    lengths = {run.record["steps"] for run in runs if run.baseline and run.cost is not None and run.loss is not None}
    if len(lengths) < 2 and any(not run.baseline for run in runs):
        told.append("savings need baselines of at least two lengths, each with a schedule that ends with the run")
    return told


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: its folder's, with as many parent folders as are needed to make it unique.

    Example:
        >>> names_of([Path("runs/a/result.json"), Path("runs/b/result.json")])
        ['a', 'b']
        >>> names_of([Path("x/a/result.json"), Path("y/a/result.json")])
        ['x/a', 'y/a']
    """
    folders = [(path if path.is_dir() or path.name != "result.json" else path.parent).resolve().parts for path in paths]
    for depth in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same run is named twice")


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 2 if the runs cannot be compared."""
    summary, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m lit_scale.cost.compare",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="FILE", help="result.json of a run, or its folder")
    parser.add_argument("--unit", type=Path, metavar="FILE", help="run whose plain step is the unit, if they differ")
    parser.add_argument("--metric", default="val/loss", help="metric to compare; lower is better (default: val/loss)")
    options = parser.parse_args(args)
    try:
        records = dict(zip(names_of(options.runs), map(read, options.runs), strict=True))
        unit = None if options.unit is None else read(options.unit)
        runs = compare(records, unit, options.metric)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(table(runs, options.metric))
    for note in notes(runs):
        console.print(note, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
