"""Runs of one recipe that are compared at equal steps or samples, for benchmarks outside of ``clock.py``.

Every run is the recipe in its own process, in random order. An interrupted sweep continues where it stopped; runs of
other code, flags or versions are made again. ``clock.py`` measures the savings of techniques.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from provenance import ROOT
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy.stats import ttest_1samp, ttest_ind

__all__ = ["TUNING_SEED", "Preset", "Run", "Sweep", "above", "command"]

TUNING_SEED = 1_000  # this seed is not reported


@dataclass(frozen=True)
class Preset:
    """The runs of one sweep.

    Attributes:
        flags: Flags of every run.
        lrs: Learning rates; if rates are tuned, the initial grid.
        steps: Length of a run.
        jobs: Number of runs at a time.
        threads: Threads of each run; None for torch's default.
        metric: Name of the loss that is compared.
    """

    flags: list[str]
    lrs: list[float]
    steps: int
    jobs: int = 1
    threads: int | None = None
    metric: str = "val/loss"


@dataclass(frozen=True)
class Run:
    """One training run of the recipe, for one of the sides that are compared."""

    side: str
    steps: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.side.replace(' ', '_')}-{self.steps}-lr{self.lr:g}-seed{self.seed}"


@dataclass
class Sweep:
    """Makes the runs of one recipe, or finds them in ``folder``; ``sides`` holds the flags of each side by name."""

    recipe: str
    preset: Preset
    sides: Mapping[str, Sequence[str]]
    folder: Path
    console: Console
    jobs: int
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @cached_property
    def code(self) -> list[str]:
        """Digest of all code that a run may use, and versions of its main dependencies."""
        folders = ("lit_scale", "datamodules", "callbacks")
        files = [file for part in folders for file in sorted((ROOT / part).rglob("*.py"))]
        held = b"".join(file.read_bytes() for file in [*files, ROOT / "recipes" / f"{self.recipe}.py"])
        versions = [f"{name} {version(name)}" for name in ("torch", "lightning", "timm")]
        return [hashlib.blake2b(held, digest_size=16).hexdigest(), *versions]

    def flags(self, run: Run) -> list[str]:
        """Flags of the recipe for a run; override it if sides differ in more than ``sides``."""
        return [
            *self.preset.flags,
            *self.sides[run.side],
            f"--trainer.max_steps={run.steps}",
            f"--model.lr={run.lr}",
            f"--seed_everything={run.seed}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.val_check_interval={max(1, run.steps // 2)}",
            "--trainer.check_val_every_n_epoch=null",
        ]

    def make(self, run: Run) -> dict[str, Any]:
        """Make a run and return its record, which is read from its folder if the same run is complete there."""
        folder, wanted = self.folder / run.name, {"flags": self.flags(run), "code": self.code}
        result, begun, done = folder / "result.json", folder / "begun.json", folder / "done.json"
        if result.exists() and done.exists() and json.loads(done.read_text()) == wanted:
            return json.loads(result.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        last = folder / "checkpoints" / "last.ckpt"
        resumable = last.exists() and begun.exists() and json.loads(begun.read_text()) == wanted
        begun.write_text(json.dumps(wanted))
        script = [
            sys.executable,
            str(ROOT / "recipes" / f"{self.recipe}.py"),
            *self.flags(run),
            f"--trainer.default_root_dir={folder}",
            *([f"--ckpt_path={last}"] if resumable else []),
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment |= {"OMP_NUM_THREADS": str(self.preset.threads)} if self.preset.threads else {}
        with open(folder / "log.txt", "ab") as log:
            child = subprocess.Popen(script, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            self.children.append(child)
            code = child.wait()
            self.children.remove(child)
        if code:
            tail = "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{run.name} ended with exit code {code}:\n{tail}")
        for checkpoint in (folder / "checkpoints").glob("*.ckpt"):
            checkpoint.unlink()
        done.write_text(json.dumps(wanted))
        return json.loads(result.read_text())

    def make_all(self, runs: Iterable[Run], what: str) -> dict[Run, dict[str, Any]]:
        """Make all runs, several at a time, in random order, so that slow periods of the machine affect all sides."""
        runs = list(runs)
        random.Random(0).shuffle(runs)
        records: dict[Run, dict[str, Any]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(what, total=sum(run.steps for run in runs), done=f"0/{len(runs)} runs")
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = {pool.submit(self.make, run): run for run in runs}
                try:
                    for future in as_completed(futures):
                        run = futures[future]
                        records[run] = record = future.result()
                        loss = record["metrics"][self.preset.metric]
                        progress.console.print(f"  {run.name}: loss {loss:.4f}", highlight=False)
                        progress.update(task, advance=run.steps, done=f"{len(records)}/{len(runs)} runs")
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for child in list(self.children):
                        child.send_signal(signal.SIGTERM)
                    raise
        return records


def above(own: Sequence[float], other: Sequence[float], *, paired: bool = False) -> dict[str, float | None]:
    """Relative difference of the means of ``own`` and ``other``, with a 95% interval over seeds.

    The interval is from Welch's t-test, or from a paired t-test if ``paired``. With fewer than three seeds there is
    none.

    >>> above([1.1, 1.1, 1.1], [1.0, 1.0, 1.0])
    {'estimate': 0.1, 'low': 0.1, 'high': 0.1}
    """
    mean = float(np.mean(other))
    found: dict[str, float | None] = {"estimate": float(np.mean(own)) / mean - 1, "low": None, "high": None}
    if min(len(own), len(other)) >= 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # raised if all values are equal
            test = ttest_1samp(np.subtract(own, other), 0.0) if paired else ttest_ind(own, other, equal_var=False)
            ends = np.array(test.confidence_interval(0.95)) / mean
        low, high = ends if np.isfinite(ends).all() else np.full(2, found["estimate"], dtype=float)
        found |= {"low": float(low), "high": float(high)}
    return {name: None if value is None else round(value, 6) for name, value in found.items()}


def command(script: str, args: list[str]) -> str:
    """The command line for the record, without the folders of runs and results.

    >>> command("large_batch", ["--runs", "/a/b", "--seeds", "3", "--out=/c"])
    'python benchmarks/large_batch.py --seeds 3'
    """
    kept = [arg for before, arg in zip(["", *args], args, strict=False) if not {before, arg} & {"--runs", "--out"}]
    kept = [arg for arg in kept if not arg.startswith(("--runs=", "--out="))]
    return shlex.join(["python", f"benchmarks/{script}.py", *kept])
