"""The recipe runner: LightningCLI's flags plus ``--baseline``, ``--compare`` and ``--ckpt_path``, a table and a plot."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from lit_scale.cost import CostMeter, write_json
from lit_scale.guards import FiniteGuard, NonFiniteError, PreemptionGuard, SafeCheckpointIO, StepSeed, check_writable
from lit_scale.technique import Technique

__all__ = ["RecipeCLI", "run_recipe"]

_LINKS = (("seed_everything", "data.seed", "parse"),
          ("data.sequence_length", "model.max_length", "parse"),
          ("data.vocab_size", "model.vocab_size", "instantiate"))
_VALIDATIONS = 10  # points on the curve of a run, unless --trainer.val_check_interval says otherwise


class RecipeCLI(LightningCLI):
    """LightningCLI without subcommands, for one model, one data module and one technique.

    Groups of flags: ``--trainer.*``, ``--model.*``, ``--data.*`` and the technique's own, named after its class in
    snake case. What the data decides (seed, length, vocabulary) is linked to the model and is no flag of the model.
    """

    def __init__(
        self,
        model: type[LightningModule],
        data: type[LightningDataModule],
        technique: type[Technique],
        defaults: dict[str, Any],
        args: list[str],
    ) -> None:
        self.technique = technique
        self.group = snake_case(technique)
        self.recipe_defaults = defaults
        super().__init__(
            model,
            data,
            save_config_callback=None,  # the run's folder gets a config.yaml without a logger as well
            seed_everything_default=1,
            parser_kwargs={"description": None, "default_env": False},
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the technique's group, the recipe's own flags, links and defaults."""
        parser.add_class_arguments(self.technique, self.group)
        parser.add_argument("--baseline", action="store_true", help="the same run without the technique")
        parser.add_argument("--compare", action="store_true", help="both runs, then a table side by side")
        parser.add_argument("--ckpt_path", type=str, default=None, help="checkpoint to resume from")
        names = {name: set(inspect.signature(kind).parameters) for name, kind in self._parts().items()}
        for source, target, when in _LINKS:
            part, argument = target.split(".")
            owner, _, name = source.partition(".")
            known = not name or hasattr(self.datamodule_class, name) or name in names.get(owner, ())
            if argument in names[part] and known:
                parser.link_arguments(source, target, apply_on=when)
        parser.set_defaults(self.recipe_defaults)

    def _parts(self) -> dict[str, type]:
        return {"model": self.model_class, "data": self.datamodule_class}

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from other flags, and see early whether the output folder can be written."""
        trainer = self.config.trainer
        if trainer.val_check_interval is None and trainer.max_steps > 0:
            batches = trainer.max_steps * trainer.accumulate_grad_batches
            trainer.val_check_interval = max(1, batches // _VALIDATIONS)
            trainer.check_val_every_n_epoch = None
        check_writable(trainer.default_root_dir)
        self.parser.save(
            self.config, Path(trainer.default_root_dir, "config.yaml"), overwrite=True, skip_validation=True
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The user's Trainer, with the technique, the clock and the guards."""
        root = Path(self.config.trainer.default_root_dir)
        self.meter = CostMeter(
            recipe=Path(sys.argv[0]).stem,
            technique=self.group,
            baseline=self.config.baseline,
            extra={"command": shlex.join(["python", *sys.argv])},
        )
        callbacks = [
            *(self._get(self.config_init, "trainer").callbacks or []),
            *([] if self.config.baseline else [self._get(self.config_init, self.group)]),
            self.meter,
            FiniteGuard(),
            StepSeed(self.config.seed_everything or 0),
            PreemptionGuard(root / "checkpoints", resume_command=_resume_command()),
            ModelCheckpoint(root / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False),
        ]
        if self.config.trainer.enable_progress_bar is not False:
            callbacks.append(RichProgressBar(leave=True))
        plugins = [*(self._get(self.config_init, "trainer").plugins or []), SafeCheckpointIO()]
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)


def run_recipe(
    model: type[LightningModule],
    data: type[LightningDataModule],
    *,
    technique: type[Technique],
    defaults: dict[str, Any],
    args: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a recipe from the command line: train, report, and leave ``result.json`` and ``result.png`` behind.

    Args:
        model: The LightningModule's class; its arguments become ``--model.*``.
        data: The data module's class; ``--data.*``.
        technique: The technique's class; its arguments become a group named after it.
        defaults: Defaults that differ from the classes' own, by flag, e.g. ``{"trainer.max_steps": 700}``.
        args: Command line; that of the process by default.

    Returns:
        The record of each run, by ``"baseline"`` or the technique's name.

    Raises:
        SystemExit: With code 1 and one line of explanation for input that cannot work, 2 for unknown flags, 130 or
            143 after SIGINT or SIGTERM.
    """
    args = list(sys.argv[1:] if args is None else args)
    name = snake_case(technique)
    root = f"runs/{Path(sys.argv[0]).stem}"
    defaults = {"trainer.default_root_dir": root, "trainer.logger": False} | defaults
    console = Console()
    try:
        chosen = _Choice(args)
        records = {}
        for arm in ("baseline", name) if chosen.compare else (None,):
            records |= _run_arm(model, data, technique, defaults, args, arm, chosen, console)
    except (ValueError, OSError, NonFiniteError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
    if records and chosen.compare:
        console.print(comparison_table(records))
        folder = Path(chosen.root or defaults["trainer.default_root_dir"])
        plot_curves(records, folder / "comparison.png")
        write_json(folder / "comparison.json", records)
    return records


class _Choice:
    """The flags that decide how many runs there are, read before LightningCLI reads all of them."""

    def __init__(self, args: list[str]) -> None:
        from argparse import ArgumentParser

        parser = ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--compare", action="store_true")
        parser.add_argument("--ckpt_path")
        parser.add_argument("--trainer.default_root_dir", dest="root")
        known, _ = parser.parse_known_args(args)
        self.compare: bool = known.compare
        self.ckpt_path: str | None = known.ckpt_path
        self.root: str | None = known.root


def _run_arm(
    model: type[LightningModule],
    data: type[LightningDataModule],
    technique: type[Technique],
    defaults: dict[str, Any],
    args: list[str],
    arm: str | None,
    chosen: _Choice,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """One run; ``arm`` is None outside of a comparison."""
    import json

    if arm is not None:
        folder = Path(chosen.root or defaults["trainer.default_root_dir"], arm)
        resumes_here = chosen.ckpt_path is not None and folder.resolve() in Path(chosen.ckpt_path).resolve().parents
        if chosen.ckpt_path is not None and not resumes_here:
            if (folder / "result.json").exists() and arm == "baseline":  # finished before the other run was interrupted
                return {arm: json.loads((folder / "result.json").read_text())}
            args = [*args, "--ckpt_path=null"]
        args = [*args, f"--trainer.default_root_dir={folder}", *(["--baseline"] if arm == "baseline" else [])]
    cli = RecipeCLI(model, data, technique, defaults, args)
    ckpt_path = cli.config.ckpt_path
    if ckpt_path is not None and not Path(ckpt_path).exists():
        raise ValueError(f"ckpt_path={ckpt_path!r} does not exist")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    if (entropy := getattr(cli.datamodule, "unigram_entropy", None)) is not None:
        cli.meter.extra["unigram_entropy"] = entropy
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    record = cli.meter.record(cli.trainer, cli.model)
    if cli.trainer.is_global_zero:
        root = Path(cli.trainer.default_root_dir)
        name = "baseline" if cli.config.baseline else cli.group
        plot_curves({name: record}, root / "result.png")
        console.print(stage_table(record))
        console.print(saving_line(record), highlight=False)
        console.print(f"written: {root / 'result.json'}, {root / 'result.png'}", highlight=False)
        return {name: record}
    return {}


def _resume_command() -> str:
    """The command line of this process, resuming from ``{path}``."""
    args = list(sys.argv)
    for flag in ("--ckpt_path",):
        while flag in args:
            del args[args.index(flag) : args.index(flag) + 2]
        args = [arg for arg in args if not arg.startswith(f"{flag}=")]
    return shlex.join(["python", *args]).replace("{", "{{").replace("}", "}}") + " --ckpt_path {path}"


def snake_case(kind: type) -> str:
    """Name of a technique's group of flags, recipe and result files: ``ProgressiveStacking`` is progressive_stacking."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


# -- reports ----------------------------------------------------------------------------------------------------------


def full_cost(record: dict[str, Any], clock: str) -> float:
    """What the run's steps would have cost had all been like those of its last stage, the full model's."""
    last = record["stages"][-1]
    return float(record["steps"] * last[clock] / last["steps"])


def saving_line(record: dict[str, Any]) -> str:
    """One line: what the technique saved against as many steps of the full model, and what the loss means."""
    saved = {clock: 1 - record[clock] / full_cost(record, clock) for clock in ("flops", "reference_seconds")}
    line = (
        f"against {record['steps']} steps of the full model: {saved['flops']:.0%} fewer FLOPs, "
        f"{saved['reference_seconds']:.0%} fewer reference seconds (at equal loss: --compare, benchmarks/savings.py)"
    )
    loss, entropy = record["metrics"].get("val/loss"), record.get("unigram_entropy")
    if loss is not None and entropy:
        below = 1 - loss / entropy
        line += f"\nvalidation loss {loss:.3f} nats, {below:.0%} below the unigram entropy of {entropy:.3f}"
    return ("baseline: every step is the full model's" + line[line.find("\n") :]) if record["baseline"] else line


def stage_table(record: dict[str, Any]) -> Table:
    """What each stage trained, for how long, and how good the model was when it ended."""
    table = Table(title=f"{record['recipe']}: {'baseline' if record['baseline'] else record['technique']}")
    names = [name for name in record["stages"][0] if name not in _PRICED]
    for name in (*names, "from step", "steps", "tokens", "reference s", "TFLOPs", "val loss", "unigram"):
        table.add_column(name, justify="right")
    entropy = record.get("unigram_entropy")
    for stage in [*record["stages"], record | {"first_step": "", **dict.fromkeys(names, "all")}]:
        loss = stage["metrics"].get("val/loss")
        table.add_row(
            *(str(stage[name]) for name in names),
            str(stage["first_step"]),
            f"{stage['steps']:,}",
            f"{stage['tokens']:,}",
            f"{stage['reference_seconds']:.1f}",
            f"{stage['flops'] / 1e12:.2f}",
            "-" if loss is None else f"{loss:.3f}",
            "-" if entropy is None else f"{entropy:.3f}",
        )
    return table


_PRICED = {"steps", "samples", "tokens", "flops", "reference_seconds", "first_step", "metrics"}


def comparison_table(records: dict[str, dict[str, Any]]) -> Table:
    """The runs of a comparison side by side."""
    table = Table(title="equal steps, not equal loss: for the saving at equal loss run benchmarks/savings.py")
    table.add_column("")
    for name in records:
        table.add_column(name, justify="right")
    rows = {
        "steps": "{:,.0f}",
        "tokens": "{:,.0f}",
        "flops": "{:.3e}",
        "reference_seconds": "{:.1f}",
        "wall_seconds": "{:.1f}",
        "peak_memory_bytes": "{:,.0f}",
        "unigram_entropy": "{:.4f}",
    }
    for name, form in rows.items():
        table.add_row(name, *(form.format(r[name]) if name in r else "-" for r in records.values()))
    for metric in next(iter(records.values()))["metrics"]:
        table.add_row(metric, *(f"{r['metrics'].get(metric, float('nan')):.4f}" for r in records.values()))
    return table


def plot_curves(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Validation loss over reference seconds and over FLOPs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, clock, label in zip(axes, ("reference_seconds", "flops"), ("reference seconds", "FLOPs"), strict=True):
        for name, record in records.items():
            points = [(p[clock], p["metrics"]["val/loss"]) for p in record["curve"] if "val/loss" in p["metrics"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    entropy = next((r["unigram_entropy"] for r in records.values() if "unigram_entropy" in r), None)
    if entropy is not None:
        axes[0].axhline(entropy, color="grey", linestyle=":", label="unigram entropy")
    axes[0].set_ylabel("validation loss")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
