"""Stored results that were never measured: runs of a task with losses by a law, so that what tables say is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis import analyse
from entries import Control, Entry
from store import Store
from tasks import Task

SEEDS = (1, 2, 3, 4, 5)
PRICES = {"1x8": 1.0, "2x8": 2.0}
NOISE = {1: 0.01, 2: -0.01, 3: 0.004, 4: -0.004, 5: 0.0}  # of a seed, in all of its runs
RATE = 1e-3
TASK = Task(
    name="made_up",
    about="a task that nobody trained on",
    recipe="bert_progressive_stack",
    flags=("--data.batch_size=4",),
    sizes={"1x8": ("--model.depth=1",), "2x8": ("--model.depth=2",)},
    unit="1x8",
    budgets=(500, 1_000, 2_000),
    headline=1_000,
    trained=("2x8", 1_000),
    rates=(RATE,),
    tokens=16,
)
SHALLOWER = Control("a network of half the depth", size={"2x8": "1x8"})
ENTRY = Entry("token_dropping", "bert_token_dropping", "made_up", SHALLOWER, flags=("--token_dropping.keep=0.5",))


def run(size: str, steps: int, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    """An entry; a step of a block costs 10 FLOPs, and a batch has 64 tokens."""
    depth = int(size[0])
    return {
        **{"size": size, "steps": steps, "lr": RATE, "seed": seed, "technique": None, "flags": [], "again": ""},
        **{"own_steps": float(steps), "flops": 10 * depth * steps, "tokens": 64 * steps, "parameters": 1_000 * depth},
        **{
            "val": {"loss": loss + 0.5},
            "test": {"loss": loss, "perplexity": 2.0},
            "wall_seconds": 0.02 * depth * steps,
        },
        **{"cpu_seconds": 0.01 * depth * steps, "plain_seconds": 0.01 * depth, "priced": "by steps", "charges": {}},
        **{"kinds": 1, "reference": 3.0, "optimizer_state_bytes": 1, "core": 0, "code": "0" * 16, "date": "2026-01-02"},
    } | more


def law(size: str, cost: float) -> float:
    """The deeper network is worse for every cost of the ladder; each doubling of the cost takes a tenth of a nat."""
    halvings = {500: 0, 1_000: 1, 2_000: 2}[round(cost)]
    return 2.0 - 0.1 * halvings + (0.05 if size == "2x8" else 0.0)


def store_plain(folder: Path, task: Task = TASK) -> Store:
    """Plain runs of both sizes at all budgets, some that tuned rates, and one of another batch size."""
    store = Store(folder / f"{task.name}.plain.json")
    sizes = {size: {"price": price, "log_sd": 0.0, "parameters": 1} for size, price in PRICES.items()}
    store.data["prices"] = {"unit": "1x8", "unit_seconds": 0.06, "sizes": sizes}
    store.data["task"], store.data["rates"] = task.name, dict.fromkeys(PRICES, RATE)
    store.data["runs"] = [
        run(size, round(budget / price), seed, law(size, budget) + NOISE[seed])
        for size, price in PRICES.items()
        for budget in task.budgets
        for seed in SEEDS
    ]
    store.data["runs"] += [
        run("1x8", 1_000, 1_000, 1.9),
        run("1x8", 1_000, 1_000, 1.95, lr=2 * RATE),
        run("1x8", 2_000, 1_000, 1.93, flags=["--data.batch_size=2"]),
        run("2x8", 500, 1_000, 1.97),
    ]
    store.save()
    return store


def store_technique(
    folder: Path,
    plain: Store,
    loss: float,
    *,
    entry: Entry = ENTRY,
    task: Task = TASK,
    seeds: tuple[int, ...] = SEEDS,
    jitter: float = 0.001,
    wall_factor: float | None = None,
    **more: Any,
) -> Store:
    """A technique on the deeper network, at the cost of the headline budget: its step costs half of a plain one.

    Args:
        folder: Of results.
        plain: The plain runs.
        loss: Its mean.
        entry: What it is.
        task: Its task.
        seeds: That it was trained with.
        jitter: How far seeds 1 and 2 lie above and below, beside what they do to plain runs too.
        wall_factor: Wall seconds of its run in those of the plain run beside it; without it there are no pairs.
        more: Of each run.
    """
    store = Store(folder / f"{entry.name}.json")
    store.data |= {"technique": entry.technique, "recipe": entry.recipe, "task": task.name, "kind": entry.kind}
    store.data |= {"headline": "envelope", "networks": {"envelope": ["2x8", 1_000]}}
    chosen = {"lr": RATE, "flags": list(entry.flags), "steps": 1_000, "settings_tried": 4}
    store.data["chosen"] = {"envelope": chosen}
    store.data["control"] = {"envelope": {"about": entry.control.about, "size": "1x8"}}
    own = {"technique": list(entry.flags), "own_steps": 500.0} | more
    noise = {seed: NOISE[seed] + {1: jitter, 2: -jitter}.get(seed, 0.0) for seed in seeds}
    store.data["runs"] = [run("2x8", 1_000, seed, loss + noise[seed], **own) for seed in seeds]
    if wall_factor is not None:
        for seed in seeds:
            beside = run("2x8", 500, seed, law("2x8", 1_000), again=entry.technique)
            wall = wall_factor * beside["wall_seconds"]
            again = run("2x8", 1_000, seed, loss + noise[seed], **own, again="plain") | {"wall_seconds": wall}
            store.data["runs"] += [beside, again]
    store.data["result"] = analyse(task, entry, plain, store)
    store.data |= {"date": "2026-01-02", "command": f"python benchmarks/clock.py technique {entry.name}"}
    store.data |= {"hardware": {"cpu": "a processor", "gpus": []}, "versions": {"torch": "2"}}
    store.save()
    return store
