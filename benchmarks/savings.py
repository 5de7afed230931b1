"""What a technique saves at equal loss, against the frontier of a tuned and fully decayed baseline.

    python benchmarks/savings.py bert_progressive_stack --preset cpu
    python benchmarks/savings.py --all --preset cpu
    python benchmarks/savings.py bert_token_dropping --preset gpu -- --data.corpus=/data/books --model.depth=24

What stands behind `--` are flags of the recipe for every run, of both sides.
Every run is the recipe itself in a process of its own, in mixed order. An interrupted sweep goes on where it stopped;
runs of other code, flags or versions are made anew. Recipes that train the same without their technique share the
baseline's runs; wall times are then of different hours, and no saving is told in them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from frontier import Saving, above, best_runs, saving  # noqa: E402
from presets import PRESETS, Preset  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402

CLOCKS = ("reference_seconds", "flops", "wall_seconds")
TUNING_SEED = 1_000  # not one of the seeds that are reported


@dataclass(frozen=True)
class Run:
    """One training run of the recipe."""

    baseline: bool
    steps: int
    lr: float
    seed: int
    variant: str = ""

    @property
    def name(self) -> str:
        kind = "baseline" if self.baseline else self.variant.replace(" ", "_").replace("/", "_") or "technique"
        return f"{kind}-{self.steps}-lr{self.lr:g}-seed{self.seed}"


@dataclass
class Sweep:
    """The runs of one recipe and preset, made or found in ``folder``."""

    recipe: str
    preset_name: str
    preset: Preset
    folder: Path
    console: Console
    jobs: int
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shared = [file for part in ("lit_scale", "datamodules") for file in sorted((ROOT / part).rglob("*.py"))]
        own = [ROOT / "recipes" / f"{self.recipe}.py", *sorted((ROOT / "callbacks").glob("*.py"))]
        self.code = {True: digest(shared), False: digest([*shared, *own])}  # by whether it is the baseline's

    @cached_property
    def plain_config(self) -> str:
        """What is trained without the technique: recipes that agree in it share their baseline's runs."""
        import yaml

        path = ROOT / "recipes" / f"{self.recipe}.py"
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        call = next(one for one in calls if isinstance(one.func, ast.Name) and one.func.id == "run_recipe")
        command = [sys.executable, str(path), *self.preset.flags, "--baseline", "--print_config"]
        printed = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=True).stdout
        config = yaml.safe_load(printed)
        config["trainer"].pop("default_root_dir")
        kept = {name: config[name] for name in ("trainer", "model", "data")}
        return json.dumps([*map(ast.unparse, call.args), kept])

    @property
    def environment(self) -> dict[str, str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return environment | ({"OMP_NUM_THREADS": str(self.preset.threads)} if self.preset.threads else {})

    def home(self, baseline: bool) -> Path:
        """Folder of the runs of one side."""
        if not baseline:
            return self.folder
        name = hashlib.blake2b(self.plain_config.encode(), digest_size=5).hexdigest()
        return self.folder.parent / f"baseline.{name}.{self.preset_name}"

    def flags(self, run: Run) -> list[str]:
        return [
            *self.preset.flags,
            f"--trainer.max_steps={run.steps}",
            f"--model.lr={run.lr}",
            f"--seed_everything={run.seed}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.val_check_interval={max(1, run.steps // 2)}",
            "--trainer.check_val_every_n_epoch=null",
            *(["--baseline"] if run.baseline else []),
            *(self.preset.choices[run.variant][1] if run.variant else []),
        ]

    def make(self, run: Run) -> dict[str, Any]:
        """The run's record, from its folder if the same run has been finished before."""
        folder = self.home(run.baseline) / run.name
        wanted = self.wanted(run)
        result, begun, done = folder / "result.json", folder / "begun.json", folder / "done.json"
        if result.exists() and self.is_done(run):
            return json.loads(result.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        last = folder / "checkpoints" / "last.ckpt"
        resumable = last.exists() and begun.exists() and json.loads(begun.read_text()) == wanted
        begun.write_text(json.dumps(wanted))
        command = [
            sys.executable,
            str(ROOT / "recipes" / f"{self.recipe}.py"),
            *self.flags(run),
            f"--trainer.default_root_dir={folder}",
            *([f"--ckpt_path={last}"] if resumable else []),
        ]
        with open(folder / "log.txt", "ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment)
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
        """All of these runs, several at a time, in mixed order, so that a slow hour falls on both sides."""
        runs = list(runs)
        random.Random(0).shuffle(runs)
        records: dict[Run, dict[str, Any]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(what, total=sum(map(self.weight, runs)), done=f"0/{len(runs)} runs")
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = {pool.submit(self.make, run): run for run in runs}
                try:
                    for future in as_completed(futures):
                        run = futures[future]
                        records[run] = record = future.result()
                        loss = record["metrics"][self.preset.metric]
                        progress.console.print(f"  {run.name}: loss {loss:.4f}", highlight=False)
                        progress.update(task, advance=self.weight(run), done=f"{len(records)}/{len(runs)} runs")
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for child in list(self.children):
                        child.send_signal(signal.SIGTERM)
                    raise
        return records

    def other_rates(self, lengths: dict[bool, list[int]], seeds: list[int]) -> dict[Run, dict[str, Any]]:
        """Runs of an earlier sweep at other rates, where all seeds are there: of each side the best rate counts."""
        found = {}
        for folder in [*self.home(True).glob("*-lr*-seed*"), *self.folder.glob("*-lr*-seed*")]:
            if name := re.fullmatch(r"(baseline|technique)-(\d+)-lr(.+)-seed(\d+)", folder.name):
                run = Run(name[1] == "baseline", int(name[2]), float(name[3]), int(name[4]))
                if run.steps in lengths[run.baseline] and run.seed in seeds and self.is_done(run):
                    found[run] = self.make(run)
        return {run: record for run, record in found.items() if all(replace(run, seed=seed) in found for seed in seeds)}

    def wanted(self, run: Run) -> dict[str, Any]:
        """What decides the outcome of a run."""
        flags = [flag for flag in self.flags(run) if not run.baseline or flag not in self.preset.flags]
        plain = {"plain_config": self.plain_config} if run.baseline else {}
        return plain | {"flags": flags, "code": self.code[run.baseline]}

    def is_done(self, run: Run) -> bool:
        done = self.home(run.baseline) / run.name / "done.json"
        return done.exists() and json.loads(done.read_text()) == self.wanted(run)

    def weight(self, run: Run) -> float:
        return run.steps * (1.0 if run.baseline else self.preset.relative_cost) + 20


def digest(files: Iterable[Path]) -> list[str]:
    """Of code: what these files hold, and the versions of what they stand on."""
    held = hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()
    return [held, *(f"{name} {version(name)}" for name in ("torch", "lightning", "timm"))]


def tuned_rates(sweep: Sweep, baseline: bool, lengths: list[int]) -> tuple[dict[int, float], list[dict[str, Any]]]:
    """The best learning rate at each of these lengths, and what was tried.

    Where the best is the lowest or the highest that was tried, the next beyond it is tried too, until it is neither.
    """
    preset, what = sweep.preset, "baseline" if baseline else "technique"
    tried: dict[tuple[int, float], float] = {}
    wanted = [(steps, lr) for steps in lengths for lr in preset.lrs]
    while wanted:
        runs = [Run(baseline, steps, lr, TUNING_SEED) for steps, lr in wanted]
        records = sweep.make_all(runs, f"tuning the {what}'s rate")
        tried |= {(run.steps, run.lr): record["metrics"][preset.metric] for run, record in records.items()}
        wanted = []
        for steps in lengths:
            rates = sorted(lr for length, lr in tried if length == steps)
            best = min(rates, key=lambda lr: tried[steps, lr])
            if len(rates) > 1 and best == rates[0]:
                wanted.append((steps, float(f"{best * rates[0] / rates[1]:.2g}")))
            elif len(rates) > 1 and best == rates[-1]:
                wanted.append((steps, float(f"{best * rates[-1] / rates[-2]:.2g}")))
    best_rates = {
        steps: min((loss, lr) for (length, lr), loss in tried.items() if length == steps)[1] for steps in lengths
    }
    return best_rates, [
        {"baseline": baseline, "steps": steps, "lr": lr, "loss": loss} for (steps, lr), loss in sorted(tried.items())
    ]


def tuned_before(sweep: Sweep) -> list[dict[str, Any]]:
    """What earlier tuning of the same sweep has tried."""
    tried = []
    folders = (sweep.home(True), sweep.folder)
    for done in (path for folder in folders for path in folder.glob(f"*-seed{TUNING_SEED}/done.json")):
        record = json.loads((done.parent / "result.json").read_text())
        loss, lr = record["metrics"][sweep.preset.metric], record["hparams"]["lr"]
        tried.append({"baseline": record["baseline"], "steps": record["steps"], "lr": lr, "loss": loss})
    return sorted(tried, key=lambda one: (not one["baseline"], one["steps"], one["lr"]))


def plain_prices(records: Iterable[dict[str, Any]]) -> float:
    """Seconds of the plain step, the one that both sides make: the median over all runs."""
    return statistics.median(own for record in records if (own := plain_price(record)) is not None)


def plain_price(record: dict[str, Any]) -> float | None:
    """A run's own seconds of the plain step, the most frequent if there are several; None if it made none."""
    plain = [s for s in record["step_kinds"] if s["phase"] == "train" and s["plain"] and s["update"]]
    return max(plain, key=lambda kind: kind["count"])["seconds_each"] if plain else None


def costs(record: dict[str, Any], plain: float) -> dict[str, float]:
    """A run's cost on each clock.

    Reference seconds rest on ratios: within a run all kinds of step were timed in turn, so the price of each relative
    to the run's own plain step does not depend on what else the machine did; the plain step's price is common to all.
    """
    steps = [kind for kind in record["step_kinds"] if kind["phase"] == "train"]
    own = sum(kind["count"] * kind["seconds_each"] for kind in steps)
    charged = sum(one["seconds"] for one in record["charges"].values())
    sparse = {"sparse_flops": float(record["sparse_flops"])} if "sparse_flops" in record else {}
    return {
        "reference_seconds": own * plain / (plain_price(record) or plain) + charged,
        "flops": float(record["flops"]),
        "wall_seconds": record["wall_seconds"],
        **sparse,
    }


def analyse(
    points: list[dict[str, Any]], headline: int, lengths: list[int], accuracies: Iterable[str] = ()
) -> tuple[dict[str, Any], list[Any]]:
    """Savings on each clock, and of reference time at equal accuracies: of the headline length, and of every length.

    Where a side was run at several rates, the best one counts at each length. FLOPs that a technique would save if
    zeros cost nothing are a clock of their own, on which the baseline pays all of its FLOPs.
    """
    clocks = [*CLOCKS, *(["sparse_flops"] if any("sparse_flops" in p for p in points) else [])]

    def of(baseline: bool, steps: int, clock: str, accuracy: str = "") -> list[tuple[float, float]]:
        runs = best_runs(points, baseline, steps)
        return [(p.get(clock, p["flops"]), 1 - p["metrics"][accuracy] if accuracy else p["loss"]) for p in runs]

    by_length = []
    for steps in lengths:
        entry: dict[str, Any] = {"steps": steps}
        for clock in clocks:
            frontier = {p["steps"]: of(True, p["steps"], clock) for p in points if p["baseline"]}
            entry[clock] = asdict(saving(frontier, of(False, steps, clock)))
            if clock == "wall_seconds" and len({p["recipe"] for p in points if "recipe" in p}) > 1:
                entry[clock] = asdict(Saving(None, None, None, "the baseline ran at another time, in another sweep"))
        own = [loss for _, loss in of(False, steps, "flops")]
        entry["loss"] = statistics.mean(own)
        if any(p["baseline"] and p["steps"] == steps for p in points):
            sides = [zip(*of(baseline, steps, "reference_seconds"), strict=True) for baseline in (False, True)]
            (spent, losses), (plain_spent, plain_losses) = sides
            entry["as_long"] = {
                "loss": above(losses, plain_losses, paired=True),  # the same weights and data at the same seed
                "reference_seconds": above(spent, plain_spent),
            }
        if accuracies:
            clock, lengths_run = "reference_seconds", {p["steps"] for p in points if p["baseline"]}
            entry["at_equal"] = {
                name: asdict(saving({n: of(True, n, clock, name) for n in lengths_run}, of(False, steps, clock, name)))
                for name in accuracies
            }
        by_length.append(entry)
    return next(e for e in by_length if e["steps"] == headline), by_length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(PRESETS), nargs="?")
    parser.add_argument("--all", action="store_true", help="every recipe that has the preset, and its kinds, in turn")
    presets = sorted({name for own in PRESETS.values() for name in own})
    parser.add_argument("--preset", choices=presets, default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every point (3)")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        help="no tuning: rates of both sides, of which the best one counts at each length",
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (the preset's)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "savings", help="where the runs are kept")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="where the results go; the README shows those of the default only",
    )
    parser.add_argument("--table", action="store_true", help="only write the README's tables from the stored results")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    args.flags = given[end + 1 :]
    if args.table:
        import tables

        return tables.update_readme(args.out)
    if args.all == (args.recipe is not None):
        parser.error(f"name one recipe, or --all: {', '.join(sorted(PRESETS))}")
    if args.recipe is not None and args.preset not in PRESETS[args.recipe]:
        parser.error(f"--preset {args.preset}: {args.recipe} has {', '.join(PRESETS[args.recipe])}")
    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        parser.error("--seeds and --jobs must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.preset == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("--preset gpu needs a CUDA device, and there is none; use --preset cpu")
    try:
        if args.all:
            run_all(args)
        else:
            run_sweep(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run_all(args: argparse.Namespace) -> None:
    """All sweeps of the preset and its kinds (cpu-plain); one that fails is told, and does not stop the others."""
    console, started, failed = Console(), time.perf_counter(), []
    kinds = [(recipe, own) for recipe, presets in PRESETS.items() for own in presets]
    sweeps = [(recipe, own) for recipe, own in kinds if own == args.preset or own.startswith(f"{args.preset}-")]
    for done, (recipe, preset) in enumerate(sweeps):
        spent = (time.perf_counter() - started) / 60
        left = f", about {spent / done * (len(sweeps) - done):.0f} min left" if done else ""
        console.rule(f"{recipe}, {preset}: sweep {done + 1} of {len(sweeps)}, {spent:.0f} min so far{left}")
        try:
            run_sweep(argparse.Namespace(**vars(args) | {"recipe": recipe, "preset": preset}))
        except (RuntimeError, subprocess.CalledProcessError) as error:
            console.print(f"{recipe}: {error}", style="red", highlight=False)
            failed.append(f"{recipe} {preset}")
    if failed:
        raise SystemExit(f"these sweeps failed, and go on where they stopped when started again: {', '.join(failed)}")


def run_sweep(args: argparse.Namespace) -> None:
    """Tune, train, analyse, store, and bring the README up to date."""
    import tables

    from lit_scale.cost import write_json

    console = Console()
    preset = PRESETS[args.recipe][args.preset]
    preset = replace(preset, flags=[*preset.flags, *args.flags])
    folder = args.runs / f"{args.recipe}.{args.preset}"
    sweep = Sweep(args.recipe, args.preset, preset, folder, console, args.jobs or preset.jobs)
    started = time.perf_counter()
    tuned: dict[bool, dict[int, float]] = {}
    tried = tuned_before(sweep) if args.rates else []
    for baseline, tune_steps in () if args.rates else ((True, preset.tune_steps), (False, preset.technique_steps[:1])):
        tuned[baseline], runs_tried = tuned_rates(sweep, baseline, tune_steps)
        tried += runs_tried

    def rates(baseline: bool, steps: int) -> list[float]:
        if args.rates:
            return args.rates
        found = tuned[baseline]
        return [found[min(found, key=lambda length: abs(length - steps))]]

    seeds = range(1, args.seeds + 1)
    lengths = {True: preset.baseline_steps, False: preset.technique_steps}
    runs = [
        Run(baseline, steps, lr, seed)
        for baseline in (True, False)
        for steps in lengths[baseline]
        for lr in rates(baseline, steps)
        for seed in seeds
    ]
    records = sweep.make_all(runs, "baseline and technique") | sweep.other_rates(lengths, list(seeds))
    plain = plain_prices(records.values())
    points = [
        {
            "name": run.name,
            "baseline": run.baseline,
            "steps": run.steps,
            "lr": run.lr,
            "seed": run.seed,
            "recipe": record["recipe"],
            "loss": record["metrics"][preset.metric],
            "metrics": record["metrics"] | {name: record[name] for name in preset.accuracies},
            **{name: record.get(name) for name in tables.REFERENCES},
            **costs(record, plain),
            "step_kinds": record["step_kinds"],
            "charges": record["charges"],
            "stages": record["stages"],
        }
        for run, record in sorted(records.items(), key=lambda item: item[0].name)
    ]
    headline, by_length = analyse(points, preset.technique_steps[0], preset.technique_steps, preset.accuracies)
    untrained = sweep.make(Run(True, 1, rates(True, 1)[0], 1)) if preset.accuracies else {}
    own = next(record for run, record in records.items() if not run.baseline)
    references = {name: [p[name] for p in points if p[name] is not None] for name in tables.REFERENCES}
    result = {
        "recipe": args.recipe,
        "technique": own["technique"],
        "preset": args.preset,
        "date": date.today().isoformat(),
        "command": command("savings", sys.argv[1:]),
        "seeds": list(seeds),
        "metric": preset.metric,
        "saving": {clock: headline[clock] for clock in (*CLOCKS, "sparse_flops") if clock in headline},
        "headline_steps": headline["steps"],
        "loss": headline["loss"],
        **{name: statistics.mean(values) if values else None for name, values in references.items()},
        "by_length": by_length,
        "after_one_step": {name: untrained[name] for name in preset.accuracies},
        "tuning": tried,
        "plain_seconds": plain,
        "points": points,
        "flags": preset.flags,
        "parameters": own["parameters"],
        "hparams": own["hparams"],
        "hardware": own["hardware"],
        "versions": own["versions"],
        "jobs": sweep.jobs,
        "sweep_seconds": time.perf_counter() - started,
    }
    path = args.out / f"{args.recipe}.{args.preset}.json"
    write_json(path, result)
    tables.plot_saving(result, path.with_suffix(".png"))
    tables.plot_overview(tables.stored(args.out, "saving"), args.out / "overview.png")
    tables.update_readme(args.out)
    report(result, console)
    console.print(f"written: {path}, {path.with_suffix('.png')}", highlight=False)


def command(script: str, args: list[str]) -> str:
    """The command line for the record, without where this machine keeps its runs."""
    kept = [arg for before, arg in zip(["", *args], args, strict=False) if not {before, arg} & {"--runs", "--out"}]
    kept = [arg for arg in kept if not arg.startswith(("--runs=", "--out="))]
    return shlex.join(["python", f"benchmarks/{script}.py", *kept])


def report(result: dict[str, Any], console: Console) -> None:
    """The sweep as a table: every point, then the savings."""
    import tables

    table = Table(title=f"{result['recipe']}, preset {result['preset']}: means over {len(result['seeds'])} seeds")
    for name in ("run", "steps", "lr", "quality", "reference s", "TFLOPs", "wall s"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for key in sorted({(not p["baseline"], p["steps"], p["lr"]) for p in result["points"]}):
        own = [p for p in result["points"] if (not p["baseline"], p["steps"], p["lr"]) == key]
        mean = {name: statistics.mean(p[name] for p in own) for name in CLOCKS}
        table.add_row(
            "baseline" if own[0]["baseline"] else result["technique"],
            f"{own[0]['steps']:,}",
            f"{own[0]['lr']:g}",
            tables.quality(own),
            f"{mean['reference_seconds']:.0f}",
            f"{mean['flops'] / 1e12:.1f}",
            f"{mean['wall_seconds']:.0f}",
        )
    console.print(table)
    for entry in result["by_length"]:
        for clock in (*CLOCKS, "sparse_flops") if "sparse_flops" in entry else CLOCKS:
            console.print(f"{entry['steps']} steps, {clock}: {describe(Saving(**entry[clock]))}", highlight=False)
        for name, one in entry.get("at_equal", {}).items():
            console.print(f"{entry['steps']} steps, {name}: {describe(Saving(**one), name)}", highlight=False)


def describe(one: Saving, equal: str = "loss") -> str:
    """A saving in words."""
    if one.estimate is None:
        return f"no saving can be told: {one.reason}"
    if one.low is None or one.high is None:
        return f"{one.estimate:.0%} saved, no interval: {one.reason}"
    return f"{one.estimate:.0%} saved at equal {equal}, 95% interval {one.low:.0%} to {one.high:.0%}"


if __name__ == "__main__":
    main()
