"""The README's tables and the plots, made from the stored results and from nothing else."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from frontier import best_runs

ROOT = Path(__file__).resolve().parents[1]


REFERENCES = ("unigram_entropy", "chance_accuracy")  # what is reached without learning from context or image


ACCURACIES = {  # in a run's metrics, and what tables call them
    "val/accuracy": "accuracy",
    "linear_probe_accuracy": "linear probe",
    "fine_tune_accuracy": "fine-tuned",
}


def quality(runs: list[dict[str, Any]]) -> str:
    """Mean loss of some runs, and what it means: the unigram entropy beside it, or accuracy and chance."""
    mean = {name: [run[name] for run in runs if run.get(name) is not None] for name in ("loss", *REFERENCES)}
    text = f"{statistics.mean(mean['loss']):.3f}"
    if mean["unigram_entropy"]:
        text += f" (unigram {statistics.mean(mean['unigram_entropy']):.3f})"
    if mean["chance_accuracy"]:
        names = [name for name in ACCURACIES if name in runs[0]["metrics"]]
        told = (f", {ACCURACIES[n]} {statistics.mean(run['metrics'][n] for run in runs):.1%}" for n in names)
        text += f"{''.join(told)} (chance {statistics.mean(mean['chance_accuracy']):.1%})"
    return text


def stored(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Results in a folder: savings are told by their ``saving``, other benchmarks by their file's stem."""
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if kind == "saving" and "saving" in result or path.name.startswith(f"{kind}."):
            results.append(result)
    return results


def percent(one: dict[str, Any]) -> str:
    """A saving with its interval, or that there is none."""
    if one["estimate"] is None:
        return "none told"
    if one["low"] is None:
        return f"{one['estimate']:.0%} (no interval)"
    return f"**{one['estimate']:.0%}** ({one['low']:.0%} to {one['high']:.0%})"


def signed(one: dict[str, Any]) -> str:
    """A relative difference with its interval."""
    within = "no interval" if one["low"] is None else f"{one['low']:+.1%} to {one['high']:+.1%}"
    return f"{one['estimate']:+.1%} ({within})"


def savings_table(results: list[dict[str, Any]]) -> str:
    """A row per technique and preset: savings at equal loss on each clock."""
    lines = [
        "| technique | recipe | saved reference time | saved FLOPs | saved wall time | loss | measured on |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        hardware = r["hardware"]
        cpu = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread a run"
        machine = hardware["gpus"][0] if r["preset"] == "gpu" else cpu
        title = r["technique"].replace("_", " ")
        cells = [
            f"[{title}](docs/{r['technique']}.md)",
            f"[`{r['recipe']}`](recipes/{r['recipe']}.py), {r['preset']}",
            percent(r["saving"]["reference_seconds"]),
            percent(r["saving"]["flops"]) + zeros_left_out(r["saving"]),
            percent(r["saving"]["wall_seconds"]),
            "; ".join([quality(best_runs(r["points"], False, r["headline_steps"])), *at_equal_accuracies(r)]),
            f"{machine}, {len(r['seeds'])} seeds, {r['date']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def zeros_left_out(saving: dict[str, Any]) -> str:
    """FLOPs saved if products with zeros cost nothing, which no dense kernel makes true."""
    return f"; {percent(saving['sparse_flops'])} if zeros cost nothing" if "sparse_flops" in saving else ""


def at_equal_accuracies(result: dict[str, Any]) -> list[str]:
    """Reference time saved at equal accuracies, for a loss that is not what one trains for."""
    headline = next(entry for entry in result["by_length"] if entry["steps"] == result["headline_steps"])
    found = headline.get("at_equal", {})
    return [f"at equal {ACCURACIES[name]} accuracy {percent(one)}" for name, one in found.items()]


def points_table(result: dict[str, Any]) -> str:
    """Every point of a sweep, as means over its seeds, and the saving of each length of the technique."""
    lines = [
        "| run | steps | rate | loss (context-free) | reference s | TFLOPs | wall s | saved reference time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    savings = {entry["steps"]: percent(entry["reference_seconds"]) for entry in result["by_length"]}
    groups = {(not p["baseline"], p["steps"], p["lr"]) for p in result["points"]}
    for group in sorted(groups):
        own = [p for p in result["points"] if (not p["baseline"], p["steps"], p["lr"]) == group]
        mean = {n: statistics.mean(p[n] for p in own) for n in ("reference_seconds", "flops", "wall_seconds")}
        baseline, steps = own[0]["baseline"], own[0]["steps"]
        lines.append(
            f"| {'baseline' if baseline else result['technique'].replace('_', ' ')} | {steps:,} | {own[0]['lr']:g} "
            f"| {quality(own)} | {mean['reference_seconds']:.0f} | {mean['flops'] / 1e12:.1f} "
            f"| {mean['wall_seconds']:.0f} | {'' if baseline else savings[steps]} |"
        )
    for entry in result["by_length"]:
        for name, one in entry.get("at_equal", {}).items():
            told = percent(one) + (f" ({one['reason']})" if one["reason"] else "")
            lines += [
                "",
                f"Reference time saved by {entry['steps']:,} steps at equal {ACCURACIES[name]} accuracy: {told}.",
            ]
        if "sparse_flops" in entry:
            told = percent(entry["sparse_flops"])
            lines += ["", f"FLOPs saved by {entry['steps']:,} steps if zeros cost nothing: {told}."]
        if "as_long" in entry:
            told = [signed(entry["as_long"][name]) for name in ("loss", "reference_seconds")]
            lines += ["", f"Against the baseline's {entry['steps']:,} steps: loss {told[0]}, reference time {told[1]}."]
    if after := result.get("after_one_step"):
        told = ", ".join(f"{ACCURACIES[name]} {accuracy:.1%}" for name, accuracy in after.items())
        lines += ["", f"For comparison, after a single step of pre-training: {told}."]
    for baseline, name in ((True, "baseline"), (False, "technique")):
        own = [one for one in result["tuning"] if one["baseline"] == baseline]
        tried = ", ".join(f"{one['steps']:,} steps at {one['lr']:g}: {one['loss']:.3f}" for one in own)
        lines += ["", f"Tuning of the {name}'s rate (loss of one other seed): {tried}."] if own else []
    return "\n".join(lines)


def choices_table(result: dict[str, Any]) -> str:
    """Variants of a technique at equal FLOPs."""
    entropy = result["unigram_entropy"]
    context_free = f" (unigram {entropy:.3f})" if entropy else ""
    lines = [
        f"| variant (rate {result['lr']:g}) | steps | TFLOPs | loss of each seed{context_free} |",
        "|---|---|---|---|",
    ]
    for row in result["variants"]:
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        sparse = f" ({row['sparse_flops'] / 1e12:.2f} if zeros cost nothing)" if "sparse_flops" in row else ""
        lines.append(f"| {row['variant']} | {row['steps']:,} | {row['flops'] / 1e12:.2f}{sparse} | {losses} |")
    return "\n".join(lines)


def mae_step_lines(result: dict[str, Any]) -> str:
    """What a step on the visible patches costs relative to one on all of them."""
    lines = ["| network | encoder alone | whole step | cheaper, end to end |", "|---|---|---|---|"]
    for name, size in result["sizes"].items():
        encoder, whole = size["ratios"]["encoder"], size["ratios"]["end to end"]
        cells = [f"{one['estimate']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in (encoder, whole)]
        lines.append(f"| {name} | {' | '.join(cells)} | {1 / whole['estimate']:.1f} times |")
    return "\n".join(lines)


def throughput_lines(results: list[dict[str, Any]]) -> str:
    """How our training step compares with its peers."""
    lines = ["| step of `BertMLM` against | size | time ratio (below 1: ours is faster) |", "|---|---|---|"]
    for result in results:
        for size in result["sizes"]:
            for peer, ratio in size["ratios"].items():
                interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
                lines.append(f"| {peer} | {size['name']} | {ratio['estimate']:.2f} ({interval}) |")
    return "\n".join(lines)


def overhead_lines(results: list[dict[str, Any]]) -> str:
    """What the idle clock and the guards cost."""
    lines = ["| callback | " + " | ".join(size["name"] for r in results for size in r["sizes"]) + " |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for name in results[0]["sizes"][0]["callbacks"] if results else []:
        found = [(size["callbacks"][name], size["step_seconds"]) for r in results for size in r["sizes"]]
        cells = [f"{one['share']:.2%} of {1e3 * step:.0f} ms" for one, step in found]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_lines(results: list[dict[str, Any]]) -> str:
    """State, peak memory and time of 8-bit optimizers, as shares of their 32-bit forms."""
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
    """The loss with 8-bit state beside that with 32-bit state, seed by seed."""
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
    """Every side of a comparison at equal samples."""
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
    """The table, and the rates that were tried."""
    lines = [large_batch_table(result)]
    for side in result["above_small"]:
        own = [one for one in result["tuning"] if one["side"] == side]
        tried = ", ".join(f"{one['lr']:g}: {one['loss']:.3f}" for one in own)
        lines += ["", f"Rates tried for {side} (loss of one other seed): {tried}."]
    return "\n".join(lines)


def plot_saving(result: dict[str, Any], path: Path) -> None:
    """Loss over cost on each clock: the baseline's frontier, the technique's runs, and the saving between them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    clocks = {"reference_seconds": "reference seconds", "flops": "FLOPs", "wall_seconds": "wall seconds"}
    for axis, (clock, label) in zip(axes, clocks.items(), strict=True):
        for baseline, color, name in ((True, "tab:grey", "baseline"), (False, "tab:blue", result["technique"])):
            own = [p for p in result["points"] if p["baseline"] == baseline]
            axis.scatter([p[clock] for p in own], [p["loss"] for p in own], color=color, s=12)
            lengths = sorted({p["steps"] for p in own})
            means = [
                [statistics.mean(p[key] for p in best_runs(own, baseline, steps)) for key in (clock, "loss")]
                for steps in lengths
            ]
            axis.plot(*zip(*means, strict=True), color=color, label=name.replace("_", " "))
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_title(percent(result["saving"][clock]).replace("*", "") + " saved", fontsize=9)
        axis.grid(alpha=0.3, which="both")
    if result["unigram_entropy"] is not None:
        axes[0].axhline(result["unigram_entropy"], color="black", linestyle=":", label="unigram entropy")
    axes[0].set_ylabel(result["metric"])
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_overview(results: list[dict[str, Any]], path: Path) -> None:
    """Reference time that each technique saved at equal loss, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    told = [(r, r["saving"]["reference_seconds"]) for r in results]
    told = sorted(((r, one) for r, one in told if one["estimate"] is not None), key=lambda pair: pair[1]["estimate"])
    figure = Figure(figsize=(8, 1 + 0.35 * len(told)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, (_, one) in enumerate(told):
        ends = [one["low"], one["high"]] if one["low"] is not None else [one["estimate"]] * 2
        reach = [[100 * (one["estimate"] - ends[0])], [100 * (ends[1] - one["estimate"])]]
        axis.errorbar(100 * one["estimate"], place, xerr=reach, fmt="o", color="tab:blue", capsize=3)
    labels = [f"{r['recipe']}, {r['preset']}" for r, _ in told]  # two recipes may share a technique
    axis.set_yticks(range(len(told)), labels)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_ylim(-0.5, len(told) - 0.5)
    axis.set_xlabel("% of reference time saved at equal loss, 95% intervals")
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


def update(text: str, name: str, body: str) -> str:
    """``text`` with what stands between the marks of ``name`` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    if not found:
        return text
    if end not in rest:
        raise ValueError(f"{begin} has no {end} behind it")
    return f"{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}"


def update_readme(folder: Path) -> None:
    """Write the generated parts of the README and of the method cards anew, if these are the project's own results."""
    if folder.resolve() != ROOT / "benchmarks" / "results":
        return  # somebody's own, kept apart by --out
    readme, docs = ROOT / "README.md", ROOT / "docs"
    readme.write_text(render(readme.read_text(), folder))
    for result in stored(folder, "saving"):
        card = docs / f"{result['technique']}.md"
        if card.exists():
            text = card.read_text()
            for name in (f"points.{result['preset']}", f"points.{result['recipe']}.{result['preset']}"):
                text = update(text, name, points_table(result))  # a card of several recipes has a place for each
            card.write_text(text)
    for result in stored(folder, "mae_step"):
        card = docs / f"{result['technique']}.md"
        card.write_text(update(card.read_text(), f"step.{result['preset']}", mae_step_lines(result)))
    for result in stored(folder, "choices"):
        card = docs / f"{result['technique']}.md"
        if card.exists():
            card.write_text(update(card.read_text(), f"choices.{result['preset']}", choices_table(result)))
    for kind, name, make in (
        ("large_batch", "large_batch", large_batch_lines),
        ("memory", "eight_bit_optimizer", parity_lines),
    ):
        for result in stored(folder, kind):
            card = docs / f"{name}.md"
            if card.exists() and result.get("parity", True):
                card.write_text(update(card.read_text(), f"{kind}.{result['preset']}", make(result)))


def render(text: str, folder: Path) -> str:
    """The README with its generated parts as the stored results in ``folder`` have them."""
    text = update(text, "savings", savings_table(stored(folder, "saving")))
    text = update(text, "memory", memory_lines(stored(folder, "memory")))
    for result in stored(folder, "large_batch"):
        text = update(text, f"large_batch.{result['preset']}", large_batch_table(result))
    text = update(text, "throughput", throughput_lines(stored(folder, "throughput")))
    return update(text, "overhead", overhead_lines(stored(folder, "overhead")))
