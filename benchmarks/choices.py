"""What the defaults of a technique rest on: its variants at equal FLOPs, at the baseline's learning rate.

python benchmarks/choices.py bert_progressive_stack --seeds 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from datetime import date
from pathlib import Path

from presets import PRESETS
from rich.console import Console
from rich.table import Table
from savings import ROOT, Run, Sweep, command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(PRESETS))
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--lr", type=float, required=True, help="the rate that savings.py found for the baseline")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, help="runs at a time (the preset's)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "savings")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    from lit_scale.cost import write_json

    preset = PRESETS[args.recipe][args.preset]
    if not preset.choices:
        parser.error(f"--preset {args.preset} of {args.recipe} has no variants")
    console, jobs = Console(), args.jobs or preset.jobs
    sweep = Sweep(args.recipe, args.preset, preset, args.runs / f"{args.recipe}.{args.preset}", console, jobs)
    runs = [
        Run(False, steps, args.lr, seed, variant)
        for variant, (steps, _) in preset.choices.items()
        for seed in range(1, args.seeds + 1)
    ]
    records = sweep.make_all(runs, "variants")
    rows = []
    for variant, (steps, flags) in preset.choices.items():
        own = [r for run, r in sorted(records.items(), key=lambda item: item[0].seed) if run.variant == variant]
        losses = [record["metrics"][preset.metric] for record in own]  # by seed
        flops = statistics.mean(record["flops"] for record in own)
        row = {"variant": variant, "steps": steps, "flags": flags, "losses": losses, "flops": flops}
        if "sparse_flops" in own[0]:
            row["sparse_flops"] = statistics.mean(record["sparse_flops"] for record in own)
        rows.append(row)
    first = next(iter(records.values()))
    path = args.out / f"choices.{args.recipe}.{args.preset}.json"
    result = {
        "recipe": args.recipe,
        "technique": first["technique"],
        "preset": args.preset,
        "date": date.today().isoformat(),
        "command": command("choices", sys.argv[1:]),
        "lr": args.lr,
        "unigram_entropy": first.get("unigram_entropy"),
        "variants": rows,
        "hardware": first["hardware"],
        "versions": first["versions"],
    }
    write_json(path, result)
    import tables

    tables.update_readme(args.out)
    table = Table(title=f"{args.recipe}: variants at equal FLOPs")
    for name in ("variant", "steps", "TFLOPs", "losses"):
        table.add_column(name)
    for row in rows:
        losses = " ".join(f"{loss:.3f}" for loss in row["losses"])
        table.add_row(row["variant"], str(row["steps"]), f"{row['flops'] / 1e12:.2f}", losses)
    console.print(table)
    console.print(f"written: {path}", highlight=False)


if __name__ == "__main__":
    main()
