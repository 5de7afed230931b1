"""Reports on a recipe's records: the table of stages, the saving, the comparison, and the plot of curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["comparison_table", "plot_curves", "priced_alike", "saving_line", "stage_table"]

_PRICED = {"plain", "steps", "samples", "tokens", "flops", "reference_seconds", "first_step", "metrics"}
_LOSS, _ACCURACY = "val/loss", "val/accuracy"
_NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}


def amount(value: float) -> str:
    """Format a large number with three digits and an SI prefix.

    Example:
        >>> amount(950), amount(1_620_000), amount(2.5e13)
        ('950', '1.62M', '25.0T')
    """
    prefixes = iter("kMGTPEZY")
    prefix = ""
    while abs(value) >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:#.3g}".rstrip(".") + prefix if prefix else f"{value:.0f}"


def seconds(value: float) -> str:
    """Format seconds: without decimals from 1,000 on, else one decimal from 1 on, else three."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def loss(metrics: dict[str, float]) -> str:
    """Format the validation loss; ``-`` if there is none."""
    return f"{metrics[_LOSS]:.3f}" if _LOSS in metrics else "-"


def stage_table(record: dict[str, Any], label: str = "") -> Table:
    """Table of stages: settings, steps, cost, and validation loss at the end of each. It fits into 80 columns."""
    label = label or ("baseline" if record["baseline"] else record["technique"])
    table = Table(title=f"{record['recipe']}: {label}", title_style="bold", show_footer=True, **_NARROW)
    stages = record["stages"]
    names = [name for name in stages[0] if name not in _PRICED and any(stage[name] for stage in stages)]
    bare = [name.rpartition("/")[2] for name in names]
    for name, short in zip(names, bare, strict=True):  # two techniques may use the same name
        label = short if bare.count(short) == 1 else name.replace("/", " ")
        table.add_column(label.replace("_", " "), "all" if name == names[0] else "", justify="right", no_wrap=True)
    told_from = len(names) <= 3  # with more columns there is no room for the first step
    counted = "samples" if record["tokens"] == record["samples"] else "tokens"  # an image has one
    for name, total in {
        **({"from step": ""} if told_from else {}),
        "steps": f"{record['steps']:,}",
        counted: amount(record["tokens"]),
        "FLOPs": amount(record["flops"]),
        "ref. s": seconds(record["reference_seconds"]),
        "val loss": loss(record["metrics"]),
    }.items():
        table.add_column(name, total, justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(
            *("yes" if stage[name] is True else "" if stage[name] is False else str(stage[name]) for name in names),
            *([f"{stage['first_step']:,}"] if told_from else []),
            f"{stage['steps']:,}",
            amount(stage["tokens"]),
            amount(stage["flops"]),
            seconds(stage["reference_seconds"]),
            loss(stage["metrics"]),
        )
    return table


def plain_step(record: dict[str, Any]) -> dict[str, float] | None:
    """Cost of a step without the technique: the mean of those in the run, else the price measured separately."""
    made = next((stage for stage in record["stages"] if stage["plain"] and stage["steps"]), None)
    if made is not None:
        return {clock: made[clock] / made["steps"] for clock in ("flops", "reference_seconds")}
    steps = [kind for kind in record["step_kinds"] if kind["phase"] == "train"]
    plain = next((kind for kind in steps if kind["plain"]), None)
    if plain is None or not all(kind["update"] for kind in steps):
        return None
    return {"flops": plain["flops_each"], "reference_seconds": plain["seconds_each"]}


def saving_line(record: dict[str, Any]) -> str:
    """Saving over the same number of plain steps, and reference values for the loss and the accuracy."""
    lines = []
    plain = plain_step(record)
    if not record["baseline"] and plain is None:
        lines.append("no step was the full model's, so this run alone does not show a saving")
    elif not record["baseline"] and plain is not None:
        full = {clock: record["steps"] * cost for clock, cost in plain.items()}
        saved = {clock: 1 - record[clock] / max(cost, 1e-12) for clock, cost in full.items()}
        lines += [
            f"against {record['steps']:,} steps of the full model: {_change(-saved['flops'])} FLOPs, "
            f"{_change(-saved['reference_seconds'])} reference seconds",
            "(at equal steps, not equal loss; see python -m lit_scale.cost.compare)",
        ]
    if "sparse_flops" in record:
        lines.append(
            f"a kernel that leaves zeros out would make {amount(record['sparse_flops'])} of the "
            f"{amount(record['flops'])} FLOPs; none is used, so the zeros save no time"
        )
    value, entropy = record["metrics"].get(_LOSS), record.get("unigram_entropy")
    if value is not None and entropy:
        side = "below" if value <= entropy else "above"
        distance = f"{abs(1 - value / entropy):.0%} {side}"
        lines.append(f"validation loss {value:.3f} nats, {distance} the unigram entropy, {entropy:.3f}")
    accuracy, chance = record["metrics"].get(_ACCURACY), record.get("chance_accuracy")
    if accuracy is not None and chance:
        lines.append(f"validation accuracy {accuracy:.1%}; always the most frequent class would reach {chance:.1%}")
    return "\n".join(lines)


def _change(fraction: float) -> str:
    return f"{fraction:+.0%}"


def priced_alike(baseline: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The baseline's record with the prices of the technique's run, for the step kinds that both runs made.

    Within one run, the step kinds are timed in turn. Two runs are timed at different times, when the machine may be
    more or less busy.
    """

    def same(kind: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(kind[name] for name in ("phase", "samples", "tokens", "update", "batch"))

    def alike(kind: dict[str, Any]) -> tuple[Any, ...]:  # the same step on part of a larger batch
        return tuple(kind[name] for name in ("phase", "update", "flops_each"))

    plain = [kind for kind in record["step_kinds"] if kind["plain"]]
    prices = {key(kind): kind["seconds_each"] for key in (alike, same) for kind in plain}
    kinds = [
        kind | {"seconds_each": prices.get(same(kind), prices.get(alike(kind), kind["seconds_each"]))}
        for kind in baseline["step_kinds"]
    ]
    before, after = (
        sum(kind["count"] * kind["seconds_each"] for kind in some if kind["phase"] == "train")
        for some in (baseline["step_kinds"], kinds)
    )
    factor = after / before if before else 1.0

    def scaled(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"reference_seconds": part["reference_seconds"] * factor}

    parts = {name: [scaled(part) for part in baseline[name]] for name in ("curve", "stages")}
    return scaled(baseline) | parts | {"step_kinds": kinds}


def comparison_table(records: dict[str, dict[str, Any]]) -> Table:
    """Table of the runs of a comparison, side by side, and the change from the first to the last."""
    first, last = list(records.values())[0], list(records.values())[-1]
    alike = "steps" if first["steps"] == last["steps"] else "samples"
    what = f"at equal {alike}, not equal loss" if first[alike] == last[alike] else "neither steps nor loss are equal"
    table = Table(title=what, title_style="bold", **_NARROW)
    table.add_column("")
    for name in (*records, "change"):
        table.add_column(name, justify="right")
    rows = {"steps": "{:,}".format, "tokens": amount, "flops": amount, "reference_seconds": seconds}
    rows |= {"wall_seconds": seconds, "optimizer_state_bytes": amount}
    if first["hardware"]["gpus"]:  # a process's peak on a CPU includes earlier runs
        rows |= {"peak_memory_bytes": amount}
    for name, form in rows.items():
        change = _change(last[name] / first[name] - 1) if first[name] else ""
        table.add_row(name.replace("_", " "), *(form(record[name]) for record in records.values()), change)
    for metric in first["metrics"]:
        values = [record["metrics"].get(metric, float("nan")) for record in records.values()]
        change = _change(values[-1] / values[0] - 1) if values[0] else ""
        table.add_row(metric, *(f"{value:.4f}" for value in values), change)
    return table


def plot_curves(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot validation loss over reference seconds and over FLOPs, to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because most of a run does not need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, clock, label in zip(axes, ("reference_seconds", "flops"), ("reference seconds", "FLOPs"), strict=True):
        for name, record in records.items():
            points = [(p[clock], p["metrics"][_LOSS]) for p in record["curve"] if _LOSS in p["metrics"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    entropy = next((r["unigram_entropy"] for r in records.values() if "unigram_entropy" in r), None)
    if entropy is not None:
        axes[0].axhline(entropy, color="grey", linestyle=":", label="unigram entropy")
    axes[0].set_ylabel("validation loss")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
