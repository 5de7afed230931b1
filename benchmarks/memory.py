"""Savings and costs of 8-bit optimizer state: bytes of state, peak memory, time of a step, and loss.

    python benchmarks/memory.py --preset cpu
    python benchmarks/memory.py --preset gpu

State, memory and time are measured for training steps of ``GPT``, with every 8-bit optimizer and its 32-bit form (for
AdamW, torch's fused one). Peak memory is that of a separate process, minus what it held before the model was built.
Timed steps are interleaved in rotating order and compared by the median of paired ratios; time is processor time on one
CPU thread, else wall time. Losses are those of ``recipes/gpt_eight_bit_optimizer.py`` with and without the technique,
over several seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import component_tables
import tables
import torch
from provenance import ROOT
from rich.console import Console
from rich.table import Table
from sweeps import Preset, Run, Sweep, above
from throughput import Clock, interval, ratio

from lit_scale.cost import hardware, resident_peak, versions, write_json
from lit_scale.factors.optimizers import create_optimizer, state_bytes
from lit_scale.models import GPT

RESULTS = Path(__file__).parent / "results"
RECIPE = "gpt_eight_bit_optimizer"
SIDES: dict[str, list[str]] = {"32-bit": ["--baseline"], "8-bit": []}
PAIRS = {"adamw": "adamw8bit", "lion": "lion8bit", "lamb": "lamb8bit", "momentum": "sgd8bit"}


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    depth: int
    width: int
    length: int
    batch: int
    vocab_size: int

    @property
    def name(self) -> str:
        return f"{self.depth} x {self.width}, {self.batch} x {self.length} tokens, vocabulary {self.vocab_size:,}"


SIZES = {
    "cpu": [Size(6, 256, 128, 8, 258), Size(4, 512, 128, 4, 258)],
    "gpu": [Size(12, 768, 512, 8, 32_768), Size(24, 1024, 512, 8, 32_768)],
}
PARITY = {
    "cpu": Preset(
        flags=["--trainer.accelerator=cpu", "--trainer.devices=1", "--data.sequence_length=128", "--data.batch_size=8"],
        lrs=[1e-3],
        steps=200,
        jobs=max(1, os.cpu_count() or 1),
        threads=1,
    ),
    "gpu": Preset(
        flags=[
            "--trainer.accelerator=gpu",
            "--trainer.devices=1",
            "--trainer.precision=bf16-mixed",
            "--model.depth=12",
            "--model.width=768",
            "--model.num_heads=12",
            "--data.tokenizer=bpe",
            "--data.batch_size=16",
            "--data.num_workers=4",
        ],
        lrs=[6e-4],
        steps=2_000,
    ),
}


def contestant(size: Size, name: str, device: torch.device) -> tuple[Callable[[], None], Any, Callable[[], None]]:
    """A training step, its optimizer, and the optimizer's update alone."""
    torch.manual_seed(0)
    model = GPT(size.vocab_size, size.length, depth=size.depth, width=size.width, num_heads=size.width // 64).to(device)
    optimizer = create_optimizer(model, name, lr=1e-4, weight_decay=0.1)
    ids = torch.randint(size.vocab_size, (size.batch, size.length), device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.per_sample_loss({"input_ids": ids}).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, optimizer, lambda: optimizer.step()


def peak(size: Size, name: str, device: torch.device) -> int:
    """Peak memory of three steps in this process, in bytes; on a CPU, minus what the process held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    create_optimizer(torch.nn.Linear(64, 64).to(device), name, lr=0.0)  # loads libraries, which are not to be counted
    before = resident_peak()
    step, _, _ = contestant(size, name, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resident_peak() - before


def peak_alone(preset: str, index: int, name: str) -> int:
    """Like :func:`peak`, in a separate process."""
    script = [sys.executable, __file__, "--preset", preset, "--peak", str(index), name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(script)} failed:\n{done.stderr[-2_000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure(
    preset: str, index: int, repeats: int, seconds: float, clock: Clock, report: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all optimizers at one size."""
    size = SIZES[preset][index]
    rows = []
    for plain, small in PAIRS.items():
        report(f"{size.name}: {small}")
        pair = {name: contestant(size, name, clock.device) for name in (plain, small)}
        for step, _, _ in pair.values():
            clock.seconds(step, 3)  # allocation, kernels, optimizer state
        times: dict[str, dict[str, list[float]]] = {}
        for part in ("step", "update"):
            calls = {name: one[0] if part == "step" else one[2] for name, one in pair.items()}
            counts = {name: max(1, round(seconds / clock.seconds(call, 2))) for name, call in calls.items()}
            times[part] = {name: [] for name in calls}
            for repeat in range(repeats):
                order = list(calls) if repeat % 2 else list(calls)[::-1]
                for name in order:
                    times[part][name].append(clock.seconds(calls[name], counts[name]))
        state = {name: state_bytes([one[1]]) for name, one in pair.items()}
        del pair
        peaks = {name: peak_alone(preset, index, name) for name in (plain, small)}
        rows.append(
            {
                "optimizer": small,
                "against": plain,
                "state_bytes": state[small],
                "state_bytes_32": state[plain],
                "state_ratio": state[small] / state[plain],
                "peak_bytes": peaks[small],
                "peak_bytes_32": peaks[plain],
                "step_ratio": ratio(times["step"][small], times["step"][plain]),
                "update_ratio": ratio(times["update"][small], times["update"][plain]),
                "seconds": times,
            }
        )
    return {"name": size.name, **asdict(size), "optimizers": rows}


def parity(preset: str, seeds: int, runs: Path, console: Console, jobs: int | None) -> dict[str, Any]:
    """Losses with 8-bit and with 32-bit AdamW over seeds, their difference, and the spread over seeds."""
    plan = PARITY[preset]
    sweep = Sweep(RECIPE, plan, SIDES, runs / f"{RECIPE}.{preset}", console, jobs or plan.jobs)
    wanted = [Run(side, plan.steps, plan.lrs[0], seed) for side in SIDES for seed in range(1, seeds + 1)]
    records = sweep.make_all(wanted, "loss parity")
    losses = {side: [records[run]["metrics"][plan.metric] for run in wanted if run.side == side] for side in SIDES}
    first = records[wanted[0]]
    return {
        "recipe": RECIPE,
        "steps": plan.steps,
        "lr": plan.lrs[0],
        "flags": plan.flags,
        "losses": losses,
        "difference": above(losses["8-bit"], losses["32-bit"], paired=True),  # same weights and data at the same seed
        "spread_over_seeds": statistics.stdev(losses["32-bit"]) if seeds > 1 else None,
        "state_ratio": records[wanted[-1]]["optimizer_state_bytes"] / first["optimizer_state_bytes"],
        "unigram_entropy": first.get("unigram_entropy"),
        "parameters": first["parameters"],
    }


def table(size: dict[str, Any]) -> Table:
    """One size as a table."""
    shown = Table(title=size["name"])
    for column in ("", "state / 32-bit", "peak / 32-bit", "step / 32-bit", "update / 32-bit"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in size["optimizers"]:
        state = f"{row['state_bytes'] / 2**20:.1f} MiB, {row['state_ratio']:.3f}"
        peaks = f"{row['peak_bytes'] / 2**20:.0f} MiB, {row['peak_bytes'] / max(1, row['peak_bytes_32']):.2f}"
        shown.add_row(row["optimizer"], state, peaks, interval(row["step_ratio"]), interval(row["update_ratio"]))
    return shown


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SIZES, default="cpu")
    parser.add_argument("--repeats", type=int, default=11, help="interleaved repetitions (default: 11)")
    parser.add_argument("--seconds", type=float, default=0.1, help="time per optimizer and repetition (default: 0.1)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side for the loss; 0 for none (default: 3)")
    parser.add_argument("--jobs", type=int, help="runs at a time for the loss (default: the preset's)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "memory", help="folder of the runs")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/memory.<preset>.json")
    parser.add_argument("--peak", nargs=2, metavar=("SIZE", "OPTIMIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.repeats < 1 or options.threads < 1 or options.seeds < 0:
        parser.error("--repeats and --threads must be at least 1, --seeds at least 0")
    if options.preset == "gpu" and not torch.cuda.is_available():
        parser.error("--preset gpu: torch sees no CUDA device; use --preset cpu")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    if options.peak:
        index, name = options.peak
        print(json.dumps(peak(SIZES[options.preset][int(index)], name, device)))
        return {}
    console, clock = Console(), Clock(device)
    with console.status("") as status:
        sizes = [
            measure(options.preset, index, options.repeats, options.seconds, clock, status.update)
            for index in range(len(SIZES[options.preset]))
        ]
    same = parity(options.preset, options.seeds, options.runs, console, options.jobs) if options.seeds else None
    record = {
        "benchmark": "memory",
        "preset": options.preset,
        "command": shlex.join(["python", "benchmarks/memory.py", *(sys.argv[1:] if args is None else args)]),
        "date": date.today().isoformat(),
        "repeats": options.repeats,
        "clock": clock.name,
        "sizes": sizes,
        "parity": same,
        "versions": versions() | {"bitsandbytes": version("bitsandbytes")},
        "hardware": hardware(),
    }
    path = options.output or RESULTS / f"memory.{options.preset}.json"
    write_json(path, record)
    if options.output is None:
        tables.update_pages(RESULTS)
    for size in sizes:
        console.print(table(size))
    if same is not None:
        console.print(component_tables.parity_lines(record), highlight=False, soft_wrap=True)
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
