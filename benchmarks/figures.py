"""Draws the stored results: loss over cost for each task, and an overview of all techniques."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from analysis import envelope, price_of
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from store import Store
from tables import KNOWN, Measured, PlainPoint, loss_interval, measured, minutes, plain_points_of, runs_of, verdict
from tasks import Task

__all__ = ["draw", "plot_overview", "plot_task"]

# Okabe and Ito's colours, which can be distinguished with red-green colour blindness
TECHNIQUE_COLORS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#000000")
TECHNIQUE_MARKERS = ("*", "D", "^", "s", "v", "P", "X")
VERDICT_COLORS = {"better than": "#0072B2", "not told apart from": "#777777", "worse than": "#D55E00"}
GREYS = (0.65, 0.1)  # shades of the smallest and the largest network


def draw(folder: Path) -> list[Path]:
    """Draw all pictures for which a folder has results; return their paths."""
    found, written = measured(folder), []
    for task in KNOWN.values():
        store = Store(folder / f"{task.name}.plain.json")
        if any(point.counts(store, task) for point in plain_points_of(store)):
            written.append(folder / f"{task.name}.png")
            plot_task(task, store, [one for one in found if one.task is task], written[-1])
    if found:
        written.append(folder / "overview.png")
        plot_overview(found, written[-1])
    return written


def apart(places: Sequence[float], least: float) -> list[float]:
    """Move positions as little as possible so that neighbours are at least ``least`` apart; the order is kept.

    >>> apart([0.0, 0.1, 5.0], 1.0)
    [-0.45, 0.55, 5.0]
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[list[int]] = []  # labels that would overlap; each group is spread around its mean
    for index in order:
        groups.append([index])
        while (
            len(groups) > 1
            and _center(groups[-1], places) - _center(groups[-2], places)
            < least * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(places)
    for group in groups:
        for rank, index in enumerate(group):
            moved[index] = round(_center(group, places) + least * (rank - (len(group) - 1) / 2), 9)
    return moved


def _center(group: Sequence[int], places: Sequence[float]) -> float:
    return statistics.mean(places[index] for index in group)


def plot_task(task: Task, plain: Store, found: Sequence[Measured], path: Path) -> None:
    """Draw test loss over cost: plain runs by size, their lower envelope, and techniques.

    The vertical axis ends at the highest loss of the envelope and the techniques; curves above it are cut off.
    """
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    points = [point for point in plain_points_of(plain) if point.counts(plain, task)]
    curves = [[point for point in points if point.size == size] for size in by_price(plain)]
    shades = [f"{shade:.2f}" for shade in np.linspace(*GREYS, len(curves))]
    for own, shade in zip(curves, shades, strict=True):
        _curve(axes, own, task, plain, shade)
    best = _envelope(axes, task, plain)
    handles = [_technique(axes, one, index, len(found)) for index, one in enumerate(found)]

    techniques = [own for one in found for own in one.result["networks"].values() if own.get("loss") is not None]
    costs = [_place(point, task, plain)[0] for point in points] + [minutes(own["cost"], plain) for own in techniques]
    ends = (min(costs) / 1.15, max(costs) * 1.3)
    ticks = [n * 10.0**power for power in range(-3, 5) for n in (1, 2, 5)]
    axes.set_xlim(*ends)
    axes.set_xticks([tick for tick in ticks if ends[0] <= tick <= ends[1]])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    shown = [*best, *(own["loss"] for own in techniques)]
    if best:
        lowest = min(_place(point, task, plain)[1] for point in points)
        margin = 0.12 * (max(shown) - min(lowest, *shown))
        axes.set_ylim(min(lowest, *shown) - margin, max(shown) + margin)
    _size_labels(axes, curves, shades, task, plain)
    axes.set_xlabel("cost in minutes of one core, at prices of steps that were timed in turn")
    axes.set_ylabel(f"test {task.metric.replace('_', ' ')}")
    axes.grid(alpha=0.25)
    axes.set_title(f"{task.name}: {task.about}", fontsize=11, loc="left", pad=12)
    plain_handles = [
        Line2D([], [], color="black", linewidth=2.5, label="best plain network of any size"),
        Line2D([], [], color="0.5", marker="o", markersize=5, linewidth=1, label="plain, mean of all seeds"),
        Line2D([], [], color="0.5", marker="o", mfc="white", markersize=5, linewidth=1, label="plain, fewer seeds"),
        Line2D([], [], color="0.5", marker=".", markersize=4, linewidth=0, label="plain, each run"),
    ]
    told = (
        "Bars: 95% intervals of the difference\nto the best plain network. Techniques of\n"
        "equal cost are drawn side by side.\nHollow: not the headline network."
    )
    figure.legend(
        handles=[*plain_handles, *handles],
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title=told if handles else None,
        title_fontsize=8,
        alignment="left",
    )
    figure.savefig(path, dpi=120)


def by_price(plain: Store) -> list[str]:
    """Sizes, ordered by the price of their steps."""
    return sorted(plain.data["prices"]["sizes"], key=lambda size: price_of(plain, size))


def _place(point: PlainPoint, task: Task, plain: Store) -> tuple[float, float]:
    cost = point.runs[0]["own_steps"] * price_of(plain, point.size)
    return minutes(cost, plain), statistics.mean(point.losses("test", task.metric))


def _curve(axes: Axes, own: Sequence[PlainPoint], task: Task, plain: Store, color: str) -> None:
    """Draw one size: means over seeds, and each run."""
    places = [_place(point, task, plain) for point in own]
    if places:
        axes.plot(*zip(*places, strict=True), color=color, linewidth=1, zorder=2)
    for point, (cost, loss) in zip(own, places, strict=True):
        full = set(task.seeds) <= {run["seed"] for run in point.runs}
        axes.plot(cost, loss, "o", color=color, markerfacecolor=color if full else "white", markersize=5, zorder=3)
        losses = point.losses("test", task.metric)
        axes.plot([cost] * len(losses), losses, ".", color=color, markersize=3, zorder=2)


def _envelope(axes: Axes, task: Task, plain: Store) -> list[float]:
    """Draw the best plain network for each cost, with its name and tokens per parameter on the upper axis."""
    curve = envelope(plain, task)
    if curve is None:
        return []
    costs = [minutes(cost, plain) for cost in curve.costs]
    axes.plot(costs, curve.mean(), color="black", linewidth=2.5, solid_capstyle="round", zorder=2.5)
    seen = {
        (point.size, point.runs[0]["own_steps"] * price_of(plain, point.size)): point.tokens_per_parameter
        for point in plain_points_of(plain)
        if point.counts(plain, task)
    }
    upper = axes.secondary_xaxis("top")
    labels = [f"{size}\n{seen[size, cost]:,.0f}" for size, cost in zip(curve.sizes, curve.costs, strict=True)]
    kept: list[int] = []
    for index, cost in enumerate(costs):
        if not kept or math.log(cost / costs[kept[-1]]) > 0.35:
            kept.append(index)
    upper.set_xticks([costs[index] for index in kept], [labels[index] for index in kept], fontsize=8)
    upper.xaxis.set_minor_locator(NullLocator())
    upper.set_xlabel("best plain network, and its tokens per parameter", fontsize=8)
    return [float(loss) for loss in curve.mean()]


def _technique(axes: Axes, one: Measured, index: int, many: int) -> Line2D:
    """Draw a technique's points, filled for its headline network; return a handle for the legend."""
    color = TECHNIQUE_COLORS[index % len(TECHNIQUE_COLORS)]
    marker = TECHNIQUE_MARKERS[(index + index // len(TECHNIQUE_COLORS)) % len(TECHNIQUE_MARKERS)]
    size = 11 if marker == "*" else 7
    aside = 1.04 ** (index - (many - 1) / 2)
    for name, own in one.result["networks"].items():
        if own.get("loss") is None:
            continue
        low, high = loss_interval(own, [run["test"][one.task.metric] for run in runs_of(one, name)])
        axes.errorbar(
            minutes(own["cost"], one.plain) * aside,
            own["loss"],
            yerr=[[low], [high]],
            color=color,
            marker=marker,
            markersize=size,
            markerfacecolor=color if name == one.store.data["headline"] else "white",
            capsize=4,
            linewidth=1.2,
            zorder=4,
        )
    label = f"{one.title}, {one.result['size']}{' (incomplete)' if one.missing_seeds else ''}"
    return Line2D([], [], color=color, marker=marker, markersize=size, linewidth=0, label=label)


def _size_labels(
    axes: Axes, curves: Sequence[Sequence[PlainPoint]], shades: Sequence[str], task: Task, plain: Store
) -> None:
    """Write the names of the sizes beside the last points of their curves, without overlaps."""
    low, high = axes.get_ylim()
    groups: dict[int, list[tuple[float, float, str, str]]] = {}
    for own, shade in zip(curves, shades, strict=True):
        places = [place for place in (_place(point, task, plain) for point in own) if place[1] < high]
        if places:
            cost, loss = places[-1]
            groups.setdefault(round(math.log(cost) / 0.3), []).append((cost, loss, own[0].size, shade))
    for group in groups.values():
        heights = apart([(loss - low) / (high - low) for _, loss, _, _ in group], 0.042)
        for (cost, loss, size, shade), height in zip(group, heights, strict=True):
            axes.annotate(
                size,
                (cost, loss),
                xytext=(max(cost for cost, *_ in group) * 1.06, low + height * (high - low)),
                color=shade,
                fontsize=9,
                va="center",
                zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            )


def plot_overview(found: Sequence[Measured], path: Path) -> None:
    """Draw the loss at equal cost against the best plain network, for all techniques with an estimate, best first."""
    told = [(one, one.result["loss_at_equal_cost"]["any_size"]) for one in found]
    told = [(one, own) for one, own in told if own["estimate"] is not None]
    figure = Figure(figsize=(9, 1.5 + 0.36 * max(1, len(told))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for place, (_, own) in enumerate(told):
        axes.errorbar(
            own["estimate"],
            place,
            xerr=None if own["low"] is None else [[own["estimate"] - own["low"]], [own["high"] - own["estimate"]]],
            color=VERDICT_COLORS[verdict(own)],
            marker="o",
            capsize=3,
        )
    labels = [
        f"{one.title}, {one.task.name}"
        + ("" if one.task.metric == "loss" else f" ({one.task.metric.replace('_', ' ')})")
        + (" (incomplete)" if one.missing_seeds else "")
        for one, _ in told
    ]
    axes.set_yticks(range(len(told)), labels)
    axes.set_ylim(max(1, len(told)) - 0.4, -0.6)
    ends = [abs(own[end]) for _, own in told for end in ("low", "high") if own[end] is not None]
    if ends and max(ends) > 10 * statistics.median(ends):
        axes.set_xscale("symlog", linthresh=2 * statistics.median(ends))
    label = "test loss above the best plain network's at equal cost (left of 0: better), 95% intervals"
    axes.set_xlabel(label, fontsize=9)
    axes.grid(alpha=0.25, axis="x")
    handles = [
        Line2D([], [], color=color, marker="o", label=f"{words} the best plain network")
        for words, color in VERDICT_COLORS.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
