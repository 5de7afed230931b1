"""Loss of a batch 16 times as large at equal samples: with LAMB and with AdamW, against the small batch.

    python benchmarks/large_batch.py --preset cpu

Every run is `recipes/bert_large_batch.py` in its own process, in random order. Learning rates are tuned for each side
on a grid with the same factor, which is extended until the best rate is inside. A rate of LAMB is a relative change, so
its grid starts elsewhere. An interrupted sweep continues where it stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from provenance import ROOT
from rich.console import Console
from rich.table import Table
from sweeps import TUNING_SEED, Preset, Run, Sweep, above, command

RECIPE = "bert_large_batch"
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.callbacks=null"]
SMALL = [*CPU, "--data.batch_size=2", "--model.depth=4", "--data.max_val_sequences=512"]
SIDES = {  # flags, and the factor on the preset's grid of rates
    "small batch": (["--baseline"], 1.0),
    "AdamW": (["--large_batch.optimizer=own"], 2.0),  # between no scaling and the square root of 16
    "LAMB": (["--large_batch.optimizer=lamb"], 20.0),
}


@dataclass(frozen=True)
class LargePreset(Preset):
    """The runs of this sweep; ``steps`` counts small batches.

    Attributes:
        times: Ratio of the large batch to the small one.
    """

    times: int = 16


PRESETS = {
    "cpu": LargePreset(
        # 16 times 2 samples is about the critical batch of such a short run
        flags=SMALL,
        lrs=[5e-4, 1e-3, 2e-3],
        steps=3_200,
        jobs=max(1, os.cpu_count() or 1),
        threads=1,
    ),
    "cpu-long": LargePreset(  # 800 steps of the large batch instead of 200
        flags=SMALL,
        lrs=[2.5e-4, 5e-4, 1e-3],
        steps=12_800,
        jobs=max(1, os.cpu_count() or 1),
        threads=1,
    ),
    "gpu": LargePreset(
        flags=[
            "--trainer.accelerator=gpu",
            "--trainer.devices=1",
            "--trainer.precision=bf16-mixed",
            "--trainer.callbacks=null",
            "--model.width=512",
            "--model.num_heads=8",
            "--model.init_std=0.024",
            "--data.tokenizer=bpe",
            "--data.sequence_length=256",
            "--data.batch_size=32",
            "--data.num_workers=4",
        ],
        lrs=[5e-4, 1e-3, 2e-3],
        steps=16_000,
    ),
}


@dataclass
class LargeSweep(Sweep):
    """Runs that are limited by their data; each side has its own flag for the learning rate."""

    preset: LargePreset

    def flags(self, run: Run) -> list[str]:
        rate = [f"--model.lr={run.lr}"]
        if run.side != "small batch":
            rate = [f"--large_batch.lr={run.lr}", f"--large_batch.times={self.preset.times}"]
        return [
            *self.preset.flags,
            *self.sides[run.side],
            *rate,
            "--trainer.max_epochs=1",
            f"--trainer.limit_train_batches={run.steps}",
            f"--seed_everything={run.seed}",
            "--trainer.enable_progress_bar=false",
            f"--trainer.val_check_interval={max(1, run.steps // 2)}",
            "--trainer.check_val_every_n_epoch=null",
        ]


def tune(sweep: LargeSweep) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The best learning rate of each side, and all losses that were measured; the sides are tuned together."""
    lrs, batches = sweep.preset.lrs, sweep.preset.steps
    step = lrs[1] / lrs[0] if len(lrs) > 1 else 1.0
    tried: dict[tuple[str, float], float] = {}
    wanted = [(side, rounded(lr * start)) for side, (_, start) in SIDES.items() for lr in lrs]
    while wanted:
        runs = [Run(side, batches, lr, TUNING_SEED) for side, lr in wanted]
        for run, record in sweep.make_all(runs, "tuning the rates").items():
            tried[run.side, run.lr] = record["metrics"][sweep.preset.metric]
        wanted = []
        for side in SIDES:
            rates = sorted(lr for other, lr in tried if other == side)
            best = min(rates, key=lambda lr: tried[side, lr])
            if len(rates) > 1 and best in (rates[0], rates[-1]):
                wanted.append((side, rounded(best / step if best == rates[0] else best * step)))
    best_rates = {side: min((loss, lr) for (other, lr), loss in tried.items() if other == side)[1] for side in SIDES}
    return best_rates, [{"side": side, "lr": lr, "loss": loss} for (side, lr), loss in sorted(tried.items())]


def rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: the preset's)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "large_batch", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    args = parser.parse_args()
    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        parser.error("--seeds and --jobs must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_sweep(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run_sweep(args: argparse.Namespace) -> None:
    """Tune, train, store the result, and update the pages."""
    import component_tables
    import tables
    import torch

    from lit_scale.cost import write_json

    if args.preset == "gpu" and not torch.cuda.is_available():
        raise SystemExit("--preset gpu needs a CUDA device, and there is none; use --preset cpu")
    preset, console, started = PRESETS[args.preset], Console(), time.perf_counter()
    sides = {side: flags for side, (flags, _) in SIDES.items()}
    sweep = LargeSweep(RECIPE, preset, sides, args.runs / args.preset, console, args.jobs or preset.jobs)
    batches = preset.steps
    rates, tried = tune(sweep)
    seeds = list(range(1, args.seeds + 1))
    runs = [Run(side, batches, rates[side], seed) for side in SIDES for seed in seeds]
    records = sweep.make_all(runs, "all sides")
    points = [
        {
            "side": run.side,
            "lr": run.lr,
            "seed": run.seed,
            "loss": record["metrics"][preset.metric],
            **{
                name: record.get(name)
                for name in ("steps", "samples", "flops", "wall_seconds", *component_tables.REFERENCES)
            },
        }
        for run, record in sorted(records.items(), key=lambda item: item[0].name)
    ]
    losses = {side: [p["loss"] for p in points if p["side"] == side] for side in SIDES}
    first = next(iter(records.values()))
    result = {
        "benchmark": "large_batch",
        "recipe": RECIPE,
        "preset": args.preset,
        "date": date.today().isoformat(),
        "command": command("large_batch", sys.argv[1:]),
        "seeds": seeds,
        "times": preset.times,
        "metric": preset.metric,
        "above_small": {side: above(own, losses["small batch"]) for side, own in losses.items()},
        "tuning": tried,
        "points": points,
        "flags": preset.flags,
        "parameters": first["parameters"],
        "hparams": first["hparams"],
        "hardware": first["hardware"],
        "versions": first["versions"],
        "jobs": sweep.jobs,
        "sweep_seconds": time.perf_counter() - started,
    }
    path = args.out / f"large_batch.{args.preset}.json"
    write_json(path, result)
    tables.update_pages(args.out)
    table = Table(title=f"{RECIPE}, preset {args.preset}: means over {len(seeds)} seeds, at equal samples")
    for name in ("side", "rate", "steps", "loss", "above the small batch"):
        table.add_column(name)
    for side, one in result["above_small"].items():
        own = [p for p in points if p["side"] == side]
        interval = component_tables.signed(one)
        loss = statistics.mean(losses[side])
        table.add_row(side, f"{own[0]['lr']:g}", f"{own[0]['steps']:,}", f"{loss:.3f}", interval)
    console.print(table)
    console.print(f"written: {path}", highlight=False)


if __name__ == "__main__":
    main()
