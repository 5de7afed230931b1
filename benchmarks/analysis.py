"""Computes the results of a technique, which are the numbers of its row, from the stored runs of its task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from entries import Entry
from envelope import Curve, Estimate, interval, loss_difference, lower_envelope, saving
from store import Store
from tasks import Task

__all__ = ["analyse", "envelope", "envelope_size", "plain_points", "price_of"]

TUNING = 1_000  # runs with this seed or a larger one are for tuning, and are not reported


def price_of(store: Store, size: str) -> float:
    """Price of a step of this size, in steps of the unit."""
    return float(store.data["prices"]["sizes"][size]["price"])


def plain_points(store: Store, task: Task) -> dict[tuple[str, int], dict[int, dict[str, Any]]]:
    """Plain runs at the rate that was chosen for their size and length, by (size, steps) and then by seed."""
    points: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    rates, own_rates = store.data.get("rates", {}), store.data.get("point_rates", {})
    for run in store.runs:
        plain = run["technique"] is None and not run["flags"] and not run["again"]
        if (
            plain
            and run["seed"] < TUNING
            and run["lr"] == own_rates.get(f"{run['size']}@{run['steps']}", rates.get(run["size"]))
        ):
            points.setdefault((run["size"], run["steps"]), {})[run["seed"]] = run
    return points


def complete(points: Mapping[tuple[str, int], Mapping[int, Any]], task: Task) -> dict[tuple[str, int], Any]:
    """The points that have runs of all seeds."""
    return {key: runs for key, runs in points.items() if set(task.seeds) <= set(runs)}


def mean(runs: Iterable[dict[str, Any]], task: Task, split: str) -> float:
    """Mean loss of runs on a split."""
    return statistics.mean(run[split][task.metric] for run in runs)


def cost_of(run: dict[str, Any], store: Store, clock: str) -> float:
    """Cost of a run: in FLOPs if ``clock`` is ``"flops"``, else in steps of the unit."""
    if clock == "flops":
        return float(run["flops"])
    return float(run["own_steps"]) * price_of(store, run["size"])


def curve_of(points: Mapping[tuple[str, int], Mapping[int, Any]], task: Task, store: Store, clock: str) -> Curve | None:
    """The curve through these points, which all have the same seeds; None if there are none."""
    chosen = sorted(points, key=lambda key: cost_of(points[key][task.seeds[0]], store, clock))
    if not chosen:
        return None
    return Curve(
        tuple(cost_of(points[key][task.seeds[0]], store, clock) for key in chosen),
        {seed: tuple(points[key][seed]["test"][task.metric] for key in chosen) for seed in task.seeds},
        tuple(size for size, _ in chosen),
    )


def envelope(store: Store, task: Task, clock: str = "cost") -> Curve | None:
    """The lower envelope over sizes and lengths: chosen on the validation split, reported on the test split."""
    points = complete(plain_points(store, task), task)
    candidates = [
        (key, cost_of(runs[task.seeds[0]], store, clock), mean(runs.values(), task, "val"))
        for key, runs in points.items()
    ]
    # costs that differ by a few percent belong to one budget
    names = {str(number): key for number, (key, _, _) in enumerate(candidates)}
    rounded = [
        (str(number), math.exp(round(math.log(cost) / 0.1) * 0.1), loss)
        for number, (_, cost, loss) in enumerate(candidates)
    ]
    chosen = [names[name] for name, _ in lower_envelope(rounded)]
    return curve_of({key: points[key] for key in chosen}, task, store, clock)


def same_network(store: Store, task: Task, size: str, clock: str = "cost") -> Curve | None:
    """The curve of one network size."""
    points = complete(plain_points(store, task), task)
    return curve_of({key: runs for key, runs in points.items() if key[0] == size}, task, store, clock)


def envelope_size(store: Store, task: Task) -> str:
    """The plain network with the least validation loss at the headline budget."""
    at = {
        size: mean(runs.values(), task, "val")
        for (size, steps), runs in complete(plain_points(store, task), task).items()
        if 0.9 < steps * price_of(store, size) / task.headline < 1.1
    }
    if not at:
        raise ValueError(f"{task.name} has no plain runs at its headline budget; make them: clock.py plain {task.name}")
    return min(at, key=lambda size: at[size])


def price_error(store: Store, one: str, other: str) -> float:
    """Standard deviation of the logarithm of the price ratio of two sizes."""
    sizes = store.data["prices"]["sizes"]
    return 0.0 if one == other else math.hypot(sizes[one]["log_sd"], sizes[other]["log_sd"])


def pooled_cost(costs: Sequence[float]) -> tuple[float, float]:
    """Cost of a technique's run, and the standard deviation of its logarithm.

    All seeds make the same steps, so that their costs differ only by how well each run could time its kinds of step.
    Their median is the cost of each, with one error that all seeds share.

    >>> cost, error = pooled_cost([100.0, 102.0, 98.0])
    >>> cost, round(error, 4)
    (100.0, 0.0144)
    """
    logs = [math.log(cost) for cost in costs]
    error = 1.25 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0  # of a median
    return statistics.median(costs), error


def technique_runs(store: Store, task: Task, size: str, chosen: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The technique's runs that are reported, by seed."""
    return {
        run["seed"]: run
        for run in store.runs
        if run["technique"] == chosen["flags"]
        and (run["size"], run["steps"], run["lr"], run["again"]) == (size, chosen["steps"], chosen["lr"], "")
        and not run["flags"]
        and run["seed"] in task.seeds
    }


def analyse(task: Task, entry: Entry, plain: Store, store: Store) -> dict[str, Any]:
    """Results of a technique: those of its headline network at the top level, and of each network in ``networks``."""
    networks = {
        name: of_network(task, plain, store, name, *network)
        for name, network in store.data.get("networks", {}).items()
        if name in store.data.get("chosen", {})
    }
    headline = networks.get(store.data.get("headline", ""), {})
    wall = wall_saving(task, plain, store)
    return {
        **headline,
        "wall": wall,
        "networks": networks,
        "complete": bool(headline) and len(headline["seeds"]) == len(task.seeds) and wall["estimate"] is not None,
    }


def of_network(task: Task, plain: Store, store: Store, name: str, size: str, budget: float) -> dict[str, Any]:
    """Savings, loss at equal cost, and comparison with the static control, on one network."""
    chosen = store.data["chosen"][name]
    runs = technique_runs(store, task, size, chosen)
    result: dict[str, Any] = {"size": size, "budget": budget, "seeds": sorted(runs)}
    if not runs:
        return result
    own, any_size = same_network(plain, task, size), envelope(plain, task)
    cost, spread = pooled_cost([cost_of(run, plain, "cost") for run in runs.values()])
    technique = {s: (cost, r["test"][task.metric]) for s, r in runs.items()}
    by_flops = {s: (cost_of(r, plain, "flops"), r["test"][task.metric]) for s, r in runs.items()}
    nothing = Estimate(None, None, None, "the plain runs are not complete")
    at = any_size.sizes if any_size is not None else (size,)
    error = math.hypot(spread, max(price_error(plain, size, other) for other in at))
    flops = {"same_network": same_network(plain, task, size, "flops"), "any_size": envelope(plain, task, "flops")}
    any_row = next(iter(runs.values()))
    return result | {
        "cost": cost,
        "loss": statistics.mean(loss for _, loss in technique.values()),
        "val_loss": mean(runs.values(), task, "val"),
        "metrics": {k: statistics.mean(r["test"][k] for r in runs.values()) for k in any_row["test"]},
        "flops": statistics.mean(r["flops"] for r in runs.values()),
        "saving": {
            "same_network": (saving(technique, own, price_error=spread) if own else nothing).as_dict(),
            "any_size": (saving(technique, any_size, price_error=error) if any_size else nothing).as_dict(),
        },
        "saving_flops": {
            key: (saving(by_flops, curve) if curve else nothing).as_dict() for key, curve in flops.items()
        },
        "loss_at_equal_cost": {
            "same_network": (loss_difference(technique, own, price_error=spread) if own else nothing).as_dict(),
            "any_size": (loss_difference(technique, any_size, price_error=error) if any_size else nothing).as_dict(),
        },
        "static_control": of_control(task, plain, store, name, technique),
        "tokens_per_parameter": statistics.mean(r["tokens"] / r["parameters"] for r in runs.values()),
        "parameters": any_row["parameters"],
        "settings_tried": chosen["settings_tried"],
        "settings_tried_plain": tried_plain(plain, size),
        "lr": chosen["lr"],
        "reference": any_row["reference"],
        "priced": any_row["priced"],
    }


def tried_plain(plain: Store, size: str) -> int:
    """Number of learning rates that the plain network was tried with."""
    own = [r for r in plain.runs if r["size"] == size and r["seed"] >= TUNING and not r["flags"] and not r["again"]]
    return len({run["lr"] for run in own})


def of_control(
    task: Task, plain: Store, store: Store, name: str, technique: Mapping[int, tuple[float, float]]
) -> dict[str, Any]:
    """The technique's loss minus that of its static control at about the same cost, paired by seed."""
    control = store.data.get("control", {}).get(name)
    if control is None:
        return {"about": "none", **Estimate(None, None, None, "it has none on this network").as_dict()}
    if "steps" in control:
        source = plain if control["plain"] else store
        flags = [None, control["flags"]] if control["plain"] else [control["flags"], []]
        runs = {
            run["seed"]: run
            for run in source.runs
            if [run["technique"], run["flags"]] == flags
            and (run["size"], run["steps"], run["lr"]) == (control["size"], control["steps"], control["lr"])
            and run["seed"] in task.seeds
            and not run["again"]
        }
        losses = {seed: run["test"][task.metric] for seed, run in runs.items()}
        costs = [cost_of(run, plain, "cost") for run in runs.values()]
    else:
        curve = same_network(plain, task, control["size"])
        cost = statistics.mean(cost for cost, _ in technique.values())
        if curve is None or not curve.costs[0] * 0.95 <= cost <= curve.costs[-1] * 1.05:
            return {"about": control["about"], **Estimate(None, None, None, "its runs are not complete").as_dict()}
        losses = {seed: curve.at(cost, seed) for seed in curve.losses}
        costs = [cost]
    seeds = sorted(technique.keys() & losses.keys())
    if len(seeds) < 2:
        return {"about": control["about"], **Estimate(None, None, None, "its runs are not complete").as_dict()}
    difference = Estimate(*interval([technique[seed][1] - losses[seed] for seed in seeds]))
    told = {"size": control["size"], "loss": statistics.mean(losses.values()), "cost": statistics.mean(costs)}
    ratio = told["cost"] / statistics.mean(cost for cost, _ in technique.values())
    about = control["about"] + (f", at {ratio:.2f} times the cost" if abs(ratio - 1) > 0.05 else "")
    return {"about": about, **told, **difference.as_dict()}


def wall_saving(task: Task, plain: Store, store: Store) -> dict[str, Any]:
    """The saving in wall seconds, from pairs of runs that were made at the same time; or the reason why there is none.

    The plain run of a pair gives the wall time of a plain step at that time. The curve of the network gives the number
    of plain steps for the technique's loss.
    """
    headline = store.data.get("headline", "")
    if headline not in store.data.get("chosen", {}):
        return Estimate(None, None, None, "no pairs of runs at the same time were made").as_dict()
    size = store.data["networks"][headline][0]
    beside = {run["seed"]: run for run in store.runs if run["technique"] is None and run["again"]}
    own = {run["seed"]: run for run in store.runs if run["again"] == "plain"}
    curve = same_network(plain, task, size)
    seeds = sorted(beside.keys() & own.keys())
    if curve is None or len(seeds) < 2:
        return Estimate(None, None, None, "no pairs of runs at the same time were made").as_dict()
    price = price_of(plain, size)
    spent = {  # in steps of the unit: wall seconds divided by those of a plain step in the same pair
        seed: own[seed]["wall_seconds"] / beside[seed]["wall_seconds"] * beside[seed]["steps"] * price for seed in seeds
    }
    found = saving({seed: (spent[seed], own[seed]["test"][task.metric]) for seed in seeds}, curve)
    return {**asdict(found), "pairs": len(seeds)}
