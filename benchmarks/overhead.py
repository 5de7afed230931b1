"""Overhead: the time that an idle CostMeter and the guards add to a training step of Lightning's Trainer.

    python benchmarks/overhead.py

Each callback is measured in two ways, in runs with it that alternate with runs without it. The first is the time inside
its hooks per step, after the meter has timed the kind of step and only counts. The second is the ratio of whole runs
with and without it; it includes costs outside of the hooks, but is noisier. Runs use one thread and are compared by
processor time, so that other processes matter little.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from throughput import interval, ratio
from torch.utils.data import DataLoader

from lit_scale.cost import CostMeter, hardware, versions, write_json
from lit_scale.guards import FiniteGuard, PreemptionGuard, StepSeed
from lit_scale.models import BertMLM

RESULTS = Path(__file__).parent / "results"
IDLE = 40  # steps after which the meter no longer times steps of the kind
HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


@dataclass(frozen=True)
class Size:
    """A model and its batch, and the steps of a run that are measured."""

    name: str
    depth: int
    width: int
    num_heads: int
    length: int
    batch: int
    steps: int


PRESETS = {
    "cpu": [
        Size("bert_progressive_stack's step", depth=8, width=128, num_heads=4, length=64, batch=16, steps=40),
        Size("a very small step", depth=2, width=32, num_heads=2, length=16, batch=2, steps=600),
    ]
}

CALLBACKS: dict[str, Callable[[Path], Callback | None]] = {
    "nothing": lambda folder: None,
    "CostMeter": lambda folder: CostMeter(repeats=0),
    "FiniteGuard": lambda folder: FiniteGuard(),
    "StepSeed": lambda folder: StepSeed(),
    "PreemptionGuard": lambda folder: PreemptionGuard(folder),
}


class StepClock(Callback):
    """Measures wall and processor seconds per step, from the end of step ``IDLE`` to the end of the run."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == IDLE:
            self.start = time.perf_counter(), time.process_time()
        elif trainer.global_step == trainer.max_steps:
            steps = trainer.max_steps - IDLE
            self.wall = (time.perf_counter() - self.start[0]) / steps
            self.cpu = (time.process_time() - self.start[1]) / steps


def watched(callback: Callback) -> list[float]:
    """A list of the seconds inside the callback's hooks, one entry per step after ``IDLE``, filled during training."""
    spent = [0.0]

    def watch(name: str) -> Callable[..., None]:
        hook = getattr(callback, name)

        def timed(trainer: Trainer, *args: Any) -> None:
            step = trainer.global_step  # at the end of a batch, the number of steps done
            start = time.perf_counter()
            hook(trainer, *args)
            spent[-1] += time.perf_counter() - start
            if name == "on_train_batch_end":
                if step <= IDLE:
                    spent[-1] = 0.0
                elif step < trainer.max_steps:
                    spent.append(0.0)

        return timed

    for name in HOOKS:
        setattr(callback, name, watch(name))
    return spent


def run(size: Size, name: str, folder: Path) -> dict[str, float]:
    """Make a short training run with one callback; return seconds per step, and seconds inside its hooks."""
    seed_everything(0, verbose=False)
    model = BertMLM(258, size.length, depth=size.depth, width=size.width, num_heads=size.num_heads, positions="rotary")
    masked = max(1, round(0.15 * size.length))
    batch = {
        "input_ids": torch.randint(258, (size.batch, size.length)),
        "positions": torch.rand(size.batch, size.length).argsort(1)[:, :masked],
        "labels": torch.randint(258, (size.batch, masked)),
    }
    callback, clock = CALLBACKS[name](folder), StepClock()
    spent = watched(callback) if callback is not None else [0.0]
    trainer = Trainer(
        max_steps=IDLE + size.steps,
        accelerator="cpu",
        callbacks=[clock] if callback is None else [clock, callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [batch] * (IDLE + size.steps)  # Any: a list works as a data set, but its type is not Dataset
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return {
        "wall_seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "median_hook_seconds": statistics.median(spent),
        "mean_hook_seconds": statistics.fmean(spent),
    }


def measure(size: Size, repeats: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure all callbacks at one size, with runs interleaved in rotating order."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CALLBACKS}
    names = list(CALLBACKS)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            report(f"{size.name}: {name}, repetition {repeat + 1} of {repeats}")
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(run(size, name, Path(folder)))
    seconds = {name: [one["cpu_seconds"] for one in own] for name, own in runs.items()}
    step = statistics.median(seconds["nothing"])
    callbacks = {}
    for name in names[1:]:
        median = statistics.median(one["median_hook_seconds"] for one in runs[name])
        callbacks[name] = {
            "share": median / step,
            "median_seconds": median,
            "mean_seconds": statistics.fmean(one["mean_hook_seconds"] for one in runs[name]),
            "run_ratio": ratio(seconds[name], seconds["nothing"]),
        }
    return {**asdict(size), "step_seconds": step, "callbacks": callbacks, "runs": runs}


def table(result: dict[str, Any]) -> Table:
    """One size as a table."""
    shown = Table(title=f"{result['name']}: {1e3 * result['step_seconds']:.2f} ms")
    for column in ("", "µs a step", "share of the step", "whole runs, with / without"):
        shown.add_column(column, justify="right" if column else "left")
    for name, one in result["callbacks"].items():
        shown.add_row(
            name,
            f"{1e6 * one['median_seconds']:.1f}",
            f"{one['share']:.3%}",
            interval(one["run_ratio"]),
        )
    return shown


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each callback (default: 3)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/overhead.<preset>.json")
    options = parser.parse_args(args)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no message at the end of each of many runs
    console = Console()
    with console.status("") as status, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a loader without workers may be slow": this one has one batch in memory
        sizes = [measure(size, options.repeats, status.update) for size in PRESETS[options.preset]]
    record = {
        "benchmark": "overhead",
        "preset": options.preset,
        "command": shlex.join(["python", "benchmarks/overhead.py", *(sys.argv[1:] if args is None else args)]),
        "date": date.today().isoformat(),
        "repeats": options.repeats,
        "meter_share": sizes[0]["callbacks"]["CostMeter"]["share"],
        "sizes": sizes,
        "versions": versions(),
        "hardware": hardware(),
    }
    path = options.output or RESULTS / f"overhead.{options.preset}.json"
    write_json(path, record)
    for size in sizes:
        console.print(table(size))
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
