"""Tables of the benchmarks of components: throughput, overheads, masked-token skipping, 8-bit state, large batches."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

__all__ = [
    "REFERENCES",
    "large_batch_lines",
    "large_batch_table",
    "mae_step_lines",
    "memory_lines",
    "overhead_lines",
    "parity_lines",
    "signed",
    "stored",
    "throughput_lines",
]

REFERENCES = ("unigram_entropy", "chance_accuracy")  # values that are reached without using context or image


def stored(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Results of one benchmark in a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}.*.json"))]
    return [result for result in found if result.get("benchmark") == kind]


def quality(runs: list[dict[str, Any]]) -> str:
    """Mean loss of some runs, with the unigram entropy."""
    text = f"{statistics.mean(run['loss'] for run in runs):.3f}"
    entropies = [run["unigram_entropy"] for run in runs if run.get("unigram_entropy") is not None]
    return text + (f" (unigram {statistics.mean(entropies):.3f})" if entropies else "")


def signed(one: dict[str, Any]) -> str:
    """A relative difference with its interval."""
    within = "no interval" if one["low"] is None else f"{one['low']:+.1%} to {one['high']:+.1%}"
    return f"{one['estimate']:+.1%} ({within})"


def mae_step_lines(result: dict[str, Any]) -> str:
    """The cost of a step on the visible patches relative to one on all patches."""
    lines = ["| network | encoder alone | whole step | cheaper, end to end |", "|---|---|---|---|"]
    for name, size in result["sizes"].items():
        encoder, whole = size["ratios"]["encoder"], size["ratios"]["end to end"]
        cells = [f"{one['estimate']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in (encoder, whole)]
        lines.append(f"| {name} | {' | '.join(cells)} | {1 / whole['estimate']:.1f} times |")
    return "\n".join(lines)


def throughput_lines(results: list[dict[str, Any]]) -> str:
    """The time of our training step relative to those of other libraries."""
    lines = ["| step of `BertMLM` against | size | time ratio (below 1: ours is faster) |", "|---|---|---|"]
    for result in results:
        for size in result["sizes"]:
            for peer, ratio in size["ratios"].items():
                interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
                lines.append(f"| {peer} | {size['name']} | {ratio['estimate']:.2f} ({interval}) |")
    return "\n".join(lines)


def overhead_lines(results: list[dict[str, Any]]) -> str:
    """The time that the idle clock and the guards add to a step."""
    lines = ["| callback | " + " | ".join(size["name"] for r in results for size in r["sizes"]) + " |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for name in results[0]["sizes"][0]["callbacks"] if results else []:
        found = [(size["callbacks"][name], size["step_seconds"]) for r in results for size in r["sizes"]]
        cells = [f"{one['share']:.2%} of {1e3 * step:.0f} ms" for one, step in found]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_lines(results: list[dict[str, Any]]) -> str:
    """State, peak memory and step time of 8-bit optimizers, relative to their 32-bit forms."""
    lines = [
        "| optimizer | size | state | share of 32-bit | peak memory | time of a step | on |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        machine = (result["hardware"]["gpus"] or [result["hardware"]["cpu"]])[0]
        for size in result["sizes"]:
            for row in size["optimizers"]:
                step = row["step_ratio"]
                cells = [
                    f"`{row['optimizer']}` / `{row['against']}`",
                    size["name"],
                    f"{row['state_bytes'] / 2**20:.1f} MiB",
                    f"**{row['state_ratio']:.3f}**",
                    f"{row['peak_bytes'] / max(1, row['peak_bytes_32']):.2f}",
                    f"{step['estimate']:.2f} ({step['low']:.2f} to {step['high']:.2f})",
                    f"{machine}, {result['date']}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if results else "Not measured yet; `python benchmarks/memory.py` writes the table here."


def parity_lines(result: dict[str, Any]) -> str:
    """The losses with 8-bit and with 32-bit state, by seed."""
    same = result["parity"]
    entropy = f" (unigram {same['unigram_entropy']:.3f})" if same["unigram_entropy"] else ""
    lines = [
        f"| state | bytes | loss of each seed after {same['steps']:,} steps{entropy} | mean |",
        "|---|---|---|---|",
    ]
    for side, losses in same["losses"].items():
        share = f"{same['state_ratio']:.3f}" if side == "8-bit" else "1"
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {side} | {share} | {each} | {statistics.mean(losses):.4f} |")
    spread = same["spread_over_seeds"]
    noise = f"; seeds differ by {spread:.4f} (standard deviation)" if spread is not None else ""
    told = f"Loss with 8-bit state against 32-bit, seed by seed: {signed(same['difference'])}{noise}."
    return "\n".join([*lines, "", told])


def large_batch_table(result: dict[str, Any]) -> str:
    """A row for each side of a comparison at equal samples."""
    lines = [
        f"| side | batch | steps | rate | loss (context-free) | above the small batch, {len(result['seeds'])} seeds |",
        "|---|---|---|---|---|---|",
    ]
    for side, one in result["above_small"].items():
        own = [p for p in result["points"] if p["side"] == side]
        cells = [
            side,
            f"{own[0]['samples'] // own[0]['steps']:,}",
            f"{own[0]['steps']:,}",
            f"{own[0]['lr']:g}",
            quality(own),
            "" if side == "small batch" else signed(one),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def large_batch_lines(result: dict[str, Any]) -> str:
    """The table, and the learning rates that were tried."""
    lines = [large_batch_table(result)]
    for side in result["above_small"]:
        own = [one for one in result["tuning"] if one["side"] == side]
        tried = ", ".join(f"{one['lr']:g}: {one['loss']:.3f}" for one in own)
        lines += ["", f"Rates tried for {side} (loss of one other seed): {tried}."]
    return "\n".join(lines)
