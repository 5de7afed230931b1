"""Measures the saving of each technique against the same network, the best plain network of any size, and its control.

    python benchmarks/clock.py plain text_mlm               # the plain runs of a task: prices, rates, ladder, envelope
    python benchmarks/clock.py technique token_dropping.text_mlm
    python benchmarks/clock.py all                          # all tasks and techniques, without runs that are stored
    python benchmarks/clock.py list                         # the number of stored runs, and what is not complete
    python benchmarks/clock.py analyse token_dropping.text_mlm  # compute the result again from the stored runs

Runs are stored one by one in benchmarks/results, and an interrupted run continues from its last checkpoint. Rates,
sizes and variants are chosen on the validation split with seeds from 1,000 on; seeds 1 to 5 are reported, on the test
split.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import tasks_gpu  # noqa: E402
from analysis import analyse, envelope_size, price_of  # noqa: E402
from entries import ENTRIES, Entry  # noqa: E402
from prices import measure  # noqa: E402
from store import Store  # noqa: E402
from tasks import TASKS, Task  # noqa: E402

from runs import Run, Runner, steps_of  # noqa: E402

TUNING_SEED = 1_000  # this and larger seeds are not reported
CLOSE = 1.06  # sizes with a loss above this multiple of the best one are not run at budgets that suit them even less


class Sweep:
    """The runs of a task, of plain networks and of techniques; runs that are not stored yet are made.

    Args:
        task: The task.
        runner: Makes the runs.
        results: Folder of the result files.
    """

    def __init__(self, task: Task, runner: Runner, results: Path) -> None:
        self.task, self.runner, self.results = task, runner, results
        self.plain = Store(results / f"{task.name}.plain.json")
        self.began = time.monotonic()

    # -- runs ---------------------------------------------------------------------------------------------------------

    def plain_run(self, size: str, budget: float, lr: float, seed: int, flags: tuple[str, ...] = ()) -> Run:
        """A plain run of a network of the ladder, for a budget in steps of the unit."""
        steps = steps_of(budget, price_of(self.plain, size))
        return Run(self.task, size, steps, lr, seed, self.task.recipe, None, flags)

    def made(self, store: Store, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """Entries of these runs, in their order; missing runs are made."""
        runs = list(dict.fromkeys(runs))
        missing = [run for run in runs if store.find(run) is None]
        self.runner.make_all(missing, store.add)
        found = [store.find(run) for run in runs]
        assert all(found)
        return [entry for entry in found if entry is not None]

    def loss(self, entry: dict[str, Any], split: str = "val") -> float:
        """The task's metric on a split."""
        return float(entry[split][self.task.metric])

    def tuned(self, store: Store, runs: Mapping[str, Run], rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The learning rate with the lowest validation loss for each of several runs, which are tuned together.

        While the best rate is the lowest or the highest one tried, the next one beyond it is tried.
        """
        tried: dict[str, dict[float, float]] = {name: {} for name in runs}
        todo = [(name, lr) for name in runs for lr in rates[name]]
        while todo:
            made = self.made(store, [replace(runs[name], lr=lr, seed=TUNING_SEED) for name, lr in todo])
            for (name, lr), entry in zip(todo, made, strict=True):
                tried[name][lr] = self.loss(entry)
            todo = []
            for name, losses in tried.items():
                known, best = sorted(losses), min(losses, key=lambda lr: losses[lr])
                if len(known) > 1 and best in (known[0], known[-1]):
                    factor = known[1] / known[0]
                    todo.append((name, float(f"{best / factor if best == known[0] else best * factor:.3g}")))
        return {name: min(losses, key=lambda lr: losses[lr]) for name, losses in tried.items()}

    # -- plain networks -----------------------------------------------------------------------------------------------

    def prices(self) -> None:
        """Measure the price of a step of each size, once; budgets are in steps of the unit."""
        if "prices" in self.plain.data and set(self.plain.data["prices"]["sizes"]) == set(self.task.sizes):
            return
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # with its own threads and core
            self.plain.data["prices"] = pool.submit(measure, self.task, core=self.runner.cores[0]).result()
        self.plain.data["task"] = self.task.name
        self.plain.save()

    def make_plain(self) -> None:
        """Tune each size, run the ladder with one seed, and run the points near the envelope with all seeds."""
        task, store = self.task, self.plain
        self.prices()
        budgets = {size: task.trained[1] if size == task.trained[0] else task.headline for size in task.sizes}
        runs = {size: self.plain_run(size, budget, task.rates[0], TUNING_SEED) for size, budget in budgets.items()}
        store.data["rates"] = rates = self.tuned(store, runs, dict.fromkeys(task.sizes, task.rates))
        found = self.made(store, [self.plain_run(size, task.headline, rates[size], TUNING_SEED) for size in task.sizes])
        at_headline = dict(zip(task.sizes, map(self.loss, found), strict=True))
        best = min(at_headline, key=lambda size: at_headline[size])
        order = sorted(task.sizes, key=lambda size: price_of(store, size))

        def worth(size: str, budget: int) -> bool:
            close = at_headline[size] <= CLOSE * at_headline[best]
            larger = order.index(size) - order.index(best)
            return close or (larger > 0 and budget > task.headline) or (larger < 0 and budget < task.headline)

        scan = [(size, budget) for budget in task.budgets for size in task.sizes if worth(size, budget)]
        made = self.made(store, [self.plain_run(size, b, rates[size], task.seeds[0]) for size, b in scan])
        losses = dict(zip(scan, map(self.loss, made), strict=True))
        around = [budget for budget in task.budgets if task.headline / 2.2 <= budget <= task.headline * 2.2]
        points = {min((key for key in scan if key[1] == budget), key=lambda key: losses[key]) for budget in around}
        center = next(size for size, budget in points if budget == task.headline)
        points |= {(center, budget) for budget in around}
        size, trained = task.trained
        points |= {(size, budget) for budget in task.budgets if trained / 2.2 <= budget <= trained * 2.2}
        self.make_points(points)
        # the batch size of the baseline is tuned too
        batches = {str(batch): self.other_batch(center, rates[center], batch) for batch in task.batches}
        self.tuned(store, batches, {str(b): [rates[center] * 2**power for power in (-1, 0, 1)] for b in task.batches})
        store.save()

    def make_points(self, points: Iterable[tuple[str, int]]) -> None:
        """Make runs of all seeds for each (size, budget), at a learning rate that is tuned for that length."""
        points, rates = sorted(points), self.plain.data["rates"]
        runs = {self._point(*point): self.plain_run(*point, rates[point[0]], TUNING_SEED) for point in points}
        known = self.plain.data.setdefault("point_rates", {})
        todo = {name: run for name, run in runs.items() if name not in known}
        known |= self.tuned(self.plain, todo, {name: [run.lr / 2, run.lr] for name, run in todo.items()})
        self.made(
            self.plain,
            [self.plain_run(*point, self.rate(*point), seed) for point in points for seed in self.task.seeds],
        )

    def _point(self, size: str, budget: float) -> str:
        return f"{size}@{self.plain_run(size, budget, 1.0, 0).steps}"

    def rate(self, size: str, budget: float) -> float:
        """The learning rate that was tuned for a size at a budget, else the one tuned for the size."""
        return self.plain.data.get("point_rates", {}).get(self._point(size, budget), self.plain.data["rates"][size])

    def other_batch(self, size: str, lr: float, batch: int) -> Run:
        """A plain run of another batch size with the same number of samples, so at about the same cost."""
        run = self.plain_run(size, self.task.headline * self.task.batch_size / batch, lr, TUNING_SEED)
        return replace(run, flags=(f"--data.batch_size={batch}",))

    # -- techniques ---------------------------------------------------------------------------------------------------

    def make_technique(self, entry: Entry, *, headline_only: bool = False) -> None:
        """Tune it, give it five seeds on both networks, make its control, and pair it with plain runs for wall time.

        Args:
            entry: What is measured.
            headline_only: Leave out the other network and the pairs, which a later call adds.
        """
        task = self.task
        store = Store(self.results / f"{entry.name}.json")
        store.data |= {"technique": entry.technique, "recipe": entry.recipe, "task": task.name, "kind": entry.kind}
        headline = "trained" if task.judged_on == "trained" else "envelope"
        networks = {"envelope": (envelope_size(self.plain, task), task.headline), "trained": task.trained}
        if entry.suffix:  # it needs networks of a special kind, whose names end with this
            networks = {name: own for name, own in networks.items() if own[0].endswith(entry.suffix)}
        networks = {
            name: (size, budget)
            for name, (size, budget) in networks.items()
            if int(size.partition("x")[0]) >= entry.least_depth
        }
        if headline not in networks:
            headline = next(iter(networks))
        if len(set(networks.values())) == 1:
            networks = {headline: networks[headline]}
        store.data["headline"] = headline
        store.data["networks"] = {name: list(network) for name, network in networks.items()}
        if headline_only:
            networks = {headline: networks[headline]}
        runs = {name: self._technique_run(store, entry, entry.flags, *network) for name, network in networks.items()}
        plain = {name: self.rate(*network) for name, network in networks.items()}
        tuned = self.tuned(store, runs, {name: [rate / 2, rate, rate * 2] for name, rate in plain.items()})
        for name in sorted(networks, key=lambda name: name != headline):
            (size, budget), lr = networks[name], tuned[name]
            flags, run = entry.flags, replace(runs[name], lr=lr)
            if name == headline and entry.variants:
                others = [self._technique_run(store, entry, own, size, budget, lr) for own in entry.variants.values()]
                variants = [replace(one, seed=TUNING_SEED) for one in (run, *others)]
                losses = [self.loss(one) for one in self.made(store, variants)]
                run = variants[losses.index(min(losses))]
                assert run.technique is not None
                flags = run.technique
            tried = len({one["lr"] for one in store.runs if one["size"] == size and one["seed"] == TUNING_SEED})
            store.data.setdefault("chosen", {})[name] = {
                "lr": lr,
                "flags": list(flags),
                "steps": run.steps,
                "settings_tried": tried + (len(entry.variants) if name == headline else 0),
            }
            self.made(store, [replace(run, seed=seed) for seed in task.seeds])
            self._make_control(store, entry, name, size, budget, lr)
        self.finish(entry, store)
        if not headline_only:
            self._make_pairs(store, entry, *networks[headline], headline)
            self.finish(entry, store)

    def _technique_run(
        self,
        store: Store,
        entry: Entry,
        flags: tuple[str, ...],
        size: str,
        budget: float,
        lr: float | None = None,
        recipe: str = "",
    ) -> Run:
        """A run that costs about the budget; the cost of its steps is measured by a short run first."""
        rate = self.rate(size, budget) if lr is None else lr
        price = price_of(self.plain, size)
        steps = steps_of(budget / 20, price * entry.relative_cost)
        guess = Run(self.task, size, steps, rate, TUNING_SEED + 1, recipe or entry.recipe, flags)
        pilot = self.made(store, [guess])[0]
        charged = sum(one["seconds"] for one in pilot["charges"].values()) / (pilot["plain_seconds"] or 1.0)
        each = max(0.05, (pilot["own_steps"] - charged) / guess.steps)
        return replace(guess, steps=steps_of(budget, price * each), seed=TUNING_SEED)

    def _make_control(self, store: Store, entry: Entry, name: str, size: str, budget: float, lr: float) -> None:
        control, task = entry.control, self.task
        if control.size:
            other = control.size.get(size)
            if other is None:
                return
            self.make_points([(other, int(budget))])
            store.data.setdefault("control", {})[name] = {"about": control.about, "size": other}
            return
        if control.batch_size:
            run = replace(self.other_batch(size, self.rate(size, budget), control.batch_size), seed=TUNING_SEED)
            target = self.plain
        elif control.flags:
            recipe = control.recipe or entry.recipe
            run, target = self._technique_run(store, entry, control.flags, size, budget, lr, recipe), store
        else:
            return
        self.made(target, [replace(run, seed=seed) for seed in task.seeds])
        kept = {"about": control.about, "steps": run.steps, "lr": run.lr, "size": size, "plain": run.technique is None}
        flags = run.flags if run.technique is None else run.technique
        store.data.setdefault("control", {})[name] = kept | {"flags": list(flags)}

    def _make_pairs(self, store: Store, entry: Entry, size: str, budget: float, name: str) -> None:
        """Repeat the technique's runs, each at the same time as the plain run of the same seed, for wall time."""
        chosen = store.data["chosen"][name]
        beside = f"{entry.technique}{entry.kind and '-'}{entry.kind}"
        pairs = []
        for seed in self.task.seeds:
            plain = replace(self.plain_run(size, budget, self.rate(size, budget), seed), again=beside)
            own = Run(
                self.task, size, chosen["steps"], chosen["lr"], seed, entry.recipe, tuple(chosen["flags"]), (), "plain"
            )
            if store.find(plain) is None or store.find(own) is None:
                pairs.append((own, plain))
        if len(self.runner.cores) > 1:
            self.runner.make_pairs(pairs, store.add)

    def finish(self, entry: Entry, store: Store) -> None:
        """Compute the result from the runs, and store it with them."""
        store.data["result"] = analyse(self.task, entry, self.plain, store)
        store.data["date"] = date.today().isoformat()
        store.data["command"] = f"python benchmarks/clock.py technique {entry.name}"
        from lit_scale.cost import hardware, versions

        store.data["hardware"] = hardware() | {"threads": 1}
        store.data["versions"] = versions()
        store.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plain", "technique", "all", "list", "analyse"])
    parser.add_argument("names", nargs="*", help="tasks, or techniques on tasks as `list` has them")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0))[:2], help="a run each")
    parser.add_argument("--headline-only", action="store_true", help="a technique's headline network, without pairs")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "clock", help="where runs in progress are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="files of results")
    parser.add_argument("--gpu", action="store_true", help="tasks of a GPU's size (tasks_gpu.py), which NEVER RAN YET")
    args = parser.parse_args()
    tasks, entries = (tasks_gpu.TASKS, tasks_gpu.ENTRIES) if args.gpu else (TASKS, ENTRIES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    known = tasks if args.what == "plain" else entries
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.what == "list":
        listing(args.out, tasks, entries)
        return
    if args.gpu:
        print("No task of a GPU's size has ever been run; sizes, budgets and rates are guesses.", flush=True)
        args.cores = args.cores[:1]  # one run at a time
    os.environ["OMP_NUM_THREADS"] = "1"
    os.nice(10)
    runner = Runner(args.runs, args.cores, lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", flush=True))
    chosen = args.names or list(known)
    if args.what in ("plain", "all"):
        names = chosen if args.what == "plain" else list(dict.fromkeys(entries[name].task for name in chosen))
        for name in names:
            Sweep(tasks[name], runner, args.out).make_plain()
    if args.what in ("technique", "all", "analyse"):
        for name in chosen:
            entry = entries[name]
            sweep = Sweep(tasks[entry.task], runner, args.out)
            if args.what == "analyse":
                if (args.out / f"{name}.json").exists():
                    sweep.finish(entry, Store(args.out / f"{name}.json"))
            else:
                sweep.make_technique(entry, headline_only=args.headline_only)


def listing(folder: Path, tasks: Mapping[str, Task], entries: Mapping[str, Entry]) -> None:
    """Print the number of stored runs of each task and technique."""
    for task in tasks.values():
        store = Store(folder / f"{task.name}.plain.json")
        minutes = sum(entry["wall_seconds"] for entry in store.runs) / 60
        print(f"{task.name}: {len(store.runs)} plain runs, {minutes:.0f} core minutes")
        for entry in entries.values():
            if entry.task == task.name:
                own = Store(folder / f"{entry.name}.json")
                minutes = sum(run["wall_seconds"] for run in own.runs) / 60
                told = "complete" if own.data.get("result", {}).get("complete") else "not complete"
                print(f"  {entry.name}: {len(own.runs)} runs, {minutes:.0f} core minutes, {told}")


if __name__ == "__main__":
    main()
