"""Training runs of the clock: each runs a recipe in its own process on its own core, and is stored as one entry.

A stored run is identified by its flags, its steps, its seed, and a digest of the code that it trained with. An
interrupted run continues from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from provenance import ROOT, code_digest
from tasks import Task

__all__ = ["Run", "Runner", "plain_seconds", "steps_of"]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: The task.
        size: Name of a network in the task's ladder.
        steps: Optimizer steps.
        lr: Peak learning rate.
        seed: Seed of weights, order of the data, masks and dropout.
        recipe: Name of the recipe: the task's for a plain run, else the technique's.
        technique: Flags of the technique's recipe, or None for a plain run.
        flags: Additional flags, after the task's.
        again: For runs that are repeated in pairs, to measure wall time: a name of the other run of the pair.
    """

    task: Task
    size: str
    steps: int
    lr: float
    seed: int
    recipe: str
    technique: tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()
    again: str = ""

    @property
    def key(self) -> dict[str, Any]:
        """Identifies the run among those of a result file."""
        key: dict[str, Any] = {"size": self.size, "steps": self.steps, "lr": self.lr, "seed": self.seed}
        technique = None if self.technique is None else list(self.technique)
        return key | {"technique": technique, "flags": list(self.flags), "again": self.again}

    @property
    def settings(self) -> str:
        """Digest of the task's flags and those of the size, which the key only names."""
        flags = json.dumps([self.task.machine, self.task.flags, self.task.sizes[self.size]])
        return hashlib.blake2b(flags.encode(), digest_size=8).hexdigest()

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        parts = [self.size, str(self.steps), f"lr{self.lr:g}", f"seed{self.seed}"]
        parts += [flag.removeprefix("--") for flag in (*(self.technique or ()), *self.flags)]
        text = "-".join([*parts, *([f"beside-{self.again}"] if self.again else [])])
        return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in text)[:200]

    def arguments(self, folder: Path) -> list[str]:
        """Arguments of the recipe's command line."""
        return [
            *self.task.machine,
            *self.task.flags,
            *self.task.sizes[self.size],
            *self.flags,
            *(["--baseline"] if self.technique is None else self.technique),
            f"--model.lr={self.lr}",
            f"--trainer.max_steps={self.steps}",
            f"--seed_everything={self.seed}",
            "--trainer.check_val_every_n_epoch=1000000",  # the recipe validates when training has ended
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={folder}",
        ]


def steps_of(budget: float, price: float) -> int:
    """Number of steps for a budget and the price of a step, both in steps of the unit; rounded to tens.

    >>> steps_of(9_400, 1.86)
    5050
    """
    return max(10, round(budget / price / 10) * 10)


def plain_seconds(record: dict[str, Any]) -> float | None:
    """Seconds of the plain step in a run's record, the most frequent one if there are several; None without one."""
    plain = [kind for kind in record["step_kinds"] if kind["phase"] == "train" and kind["plain"] and kind["update"]]
    return max(plain, key=lambda kind: kind["count"])["seconds_each"] if plain else None


def entry_of(run: Run, record: dict[str, Any], core: int | None) -> dict[str, Any]:
    """The entry that is stored for a run: its metrics, and its cost in steps of its own plain network."""
    steps = [kind for kind in record["step_kinds"] if kind["phase"] == "train"]
    plain = plain_seconds(record)
    spent = sum(kind["count"] * kind["seconds_each"] for kind in steps)
    charged = sum(one["seconds"] for one in record["charges"].values())
    samples = sum(kind["count"] * kind["samples"] for kind in steps)
    if run.technique is None:  # if its batch size is not the task's: the number of steps with the task's batch size
        own_steps = samples / run.task.batch_size
    elif plain:  # steps and charges are both in seconds of this run
        own_steps = (spent + charged) / plain
    else:  # there is no plain step to time along with its steps; only pairs of runs measure its time
        own_steps = samples / run.task.batch_size
    val, test = ({n.partition("/")[2]: v for n, v in split.items()} for split in (record["metrics"], record["test"]))
    for split, prefix in ((val, ""), (test, "test_")):
        if (accuracy := record.get(f"{prefix}linear_probe_accuracy")) is not None:
            split["probe_error"] = 1 - accuracy
    extra = {name: record[name] for name in ("sparse_flops",) if name in record}
    return {
        **run.key,
        "settings": run.settings,
        "own_steps": own_steps,
        "flops": record["flops"],
        "tokens": samples * run.task.tokens,
        "parameters": record["parameters"],
        "val": val,
        "test": test,
        "wall_seconds": record["wall_seconds"],
        "cpu_seconds": record["cpu_seconds"],
        "plain_seconds": plain,
        "priced": "by samples" if run.technique is not None and not plain else "by steps",
        "charges": record["charges"],
        "kinds": len(steps),
        **extra,
        "reference": record.get("unigram_entropy") or record.get("chance_accuracy"),
        "optimizer_state_bytes": record["optimizer_state_bytes"],
        "core": core,
        "code": code_digest(run.recipe, run.technique is not None),
        "date": date.today().isoformat(),
    }


class Runner:
    """Makes runs in parallel, each pinned to a core, in processes forked from one that has done the imports.

    Args:
        folder: Folder of runs in progress.
        cores: Numbers of the cores; one run at a time on each.
        say: Called with a message after each run.
    """

    def __init__(self, folder: Path, cores: Sequence[int], say: Callable[[str], None] = print) -> None:
        self.folder, self.cores, self.say = folder, list(cores), say
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        sys.path[:0] = [path for path in [str(ROOT)] if path not in sys.path]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lit_scale.cli", "lit_scale.models", "lit_scale.datamodules", "timm"])
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in self.cores:
            self._free.put(core)
        self._children: set[Any] = set()

    def make(self, run: Run, core: int | None = None) -> dict[str, Any]:
        """Make a run and return its entry.

        Raises:
            RuntimeError: If the recipe ended with an error; the message contains the end of its log.
        """
        own = core is None
        if core is None:
            core = self._free.get()
        try:
            record = self._train(run, core)
        finally:
            if own:
                self._free.put(core)
        entry = entry_of(run, record, core)
        self.say(
            f"{run.task.name} {run.name}: test {entry['test'][run.task.metric]:.4f}, {entry['wall_seconds']:.0f} s"
        )
        return entry

    def _train(self, run: Run, core: int) -> dict[str, Any]:
        folder = self.folder / run.task.name / (run.recipe if run.technique is not None else "plain") / run.name
        result, begun = folder / "result.json", folder / "begun.json"
        wanted = json.dumps([run.key, run.settings, code_digest(run.recipe, run.technique is not None)])
        folder.mkdir(parents=True, exist_ok=True)
        same = begun.exists() and begun.read_text() == wanted
        if not (same and result.exists() and "test" in json.loads(result.read_text())):
            arguments = run.arguments(folder)
            saved = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
            if same and saved:  # continue an interrupted run
                arguments.append(f"--ckpt_path={saved[-1]}")
            begun.write_text(wanted)
            script = ROOT / "recipes" / f"{run.recipe}.py"
            child = self._context.Process(target=_child, args=(str(script), arguments, core, str(folder / "log.txt")))
            child.start()
            self._children.add(child)
            child.join()
            self._children.discard(child)
            if child.exitcode:
                tail = "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{run.name} ended with exit code {child.exitcode}:\n{tail}")
        for checkpoint in folder.rglob("*.ckpt"):
            checkpoint.unlink()
        return json.loads(result.read_text())

    def stop(self) -> None:
        """Send SIGTERM to the runs in progress, which makes them save a checkpoint and end."""
        for child in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)

    def make_all(self, runs: Iterable[Run], done: Callable[[Run, dict[str, Any]], None]) -> None:
        """Make all runs, one at a time on each core; ``done`` is called with each run and its entry."""
        self._all([partial(self._alone, run) for run in runs], done, len(self.cores))

    def _alone(self, run: Run) -> list[tuple[Run, dict[str, Any]]]:
        return [(run, self.make(run))]

    def make_pairs(self, pairs: Iterable[tuple[Run, Run]], done: Callable[[Run, dict[str, Any]], None]) -> None:
        """Make pairs of runs that start at the same time on two cores, which are swapped for even seeds.

        The wall seconds of the two can be compared, because other work on the machine affects both.
        """
        first, second = self.cores[0], self.cores[-1]
        if first == second:
            raise ValueError("a pair of runs needs two cores")

        def pair(one: Run, other: Run) -> list[tuple[Run, dict[str, Any]]]:
            cores = (first, second) if one.seed % 2 else (second, first)
            with ThreadPoolExecutor(2) as pool:
                made = [pool.submit(self.make, run, core) for run, core in zip((one, other), cores, strict=True)]
                return [(run, future.result()) for run, future in zip((one, other), made, strict=True)]

        self._all([partial(pair, *both) for both in pairs], done, 1)

    def _all(self, makes: Sequence[Callable[[], list[Any]]], done: Callable[..., None], jobs: int) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in as_completed([pool.submit(make) for make in makes]):
                    for run, entry in future.result():
                        done(run, entry)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise


def _child(script: str, arguments: list[str], core: int, log: str) -> None:
    """Run a recipe as from the command line, on a core and with a log file."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent process sends SIGTERM
    os.chdir(ROOT)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
