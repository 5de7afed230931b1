"""The recipe runner: one run, a comparison (``--compare``) or a resumed run, each with a table and a plot."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console

from lit_scale.cli.console import fail, quiet, rank, say
from lit_scale.cli.flags import FIRST, Recipe, RecipeCLI
from lit_scale.cli.folder import LAST, is_inside
from lit_scale.cli.report import comparison_table, plot_curves, priced_alike, saving_line, stage_table
from lit_scale.cost import write_json
from lit_scale.technique import Technique, snake_case

__all__ = ["Recipe", "run_recipe"]


def run_recipe(
    model: type[LightningModule],
    data: type[LightningDataModule],
    *,
    technique: type[Technique] | Sequence[type[Technique]],
    defaults: dict[str, Any],
    tasks: Mapping[str, tuple[type[LightningModule], type[LightningDataModule], dict[str, Any]]] | None = None,
    args: Sequence[str] | None = None,
    first: tuple[str, Mapping[str, Any]] | None = None,
    name: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a recipe from the command line: train, report, and write ``result.json`` and ``result.png``.

    An error is one line on stderr; ``LIT_SCALE_TRACEBACK=1`` in the environment shows the traceback instead.

    Args:
        model: Class of the LightningModule; its arguments become flags ``--model.*``.
        data: Class of the data module; its arguments become ``--data.*``.
        technique: Class of the technique, or several classes; the arguments of each become a group named after it.
        defaults: Defaults that differ from those of the classes, by flag, for example ``{"trainer.max_steps": 700}``.
        tasks: Model, data and defaults of other tasks, by name; ``--task NAME`` trains one, in a separate folder.
        args: Command line; by default that of the process.
        first: For a technique that needs a trained model: its flag for that model's checkpoint, and the flags in which
            the run that trains the model differs. That run comes first, without the technique, in the subfolder
            ``first``, unless the flag is given.
        name: Name of the recipe; by default that of the calling file.

    Returns:
        The record of each run, by ``"baseline"`` or the technique's name (``"all_in_one"`` for several); empty on ranks
        other than 0.

    Raises:
        SystemExit: With code 1 for an error, 2 for flags that cannot be parsed, 130 or 143 after SIGINT or SIGTERM.
    """
    caller = sys._getframe(1)
    file = caller.f_code.co_filename
    techniques = (technique,) if isinstance(technique, type) else tuple(technique)
    name = name or (snake_case(techniques[0]) if file.startswith("<") else Path(file).stem)
    script = sys.argv[0] if args is None else file
    given = list(sys.argv[1:] if args is None else args)
    with quiet():
        try:
            if tasks and (task := _asked_task(given, tasks)) is not None:
                (model, data, defaults), name = tasks[task], f"{name}_{task}"
            description = (caller.f_globals.get("__doc__") or "").strip().partition("\n")[0]
            recipe = Recipe(
                name, description, [_python(), script], model, data, techniques, defaults, tuple(tasks or ()), first
            )
            return _run(recipe, given)
        except ArgumentError as error:
            fail(error, 2)
        except KeyboardInterrupt as error:
            fail(error, 130)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits with 1
                fail(error.__context__, 130)
            raise
        except Exception as error:
            fail(error, 1)


def _asked_task(args: list[str], tasks: Iterable[str]) -> str | None:
    """The task that ``--task`` names, or None; it is parsed first, because the other flags depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task")
    task = parser.parse_known_args(args)[0].task
    if task is not None and task not in tasks:
        raise ArgumentError(None, f"--task: expected one of {', '.join(map(repr, tasks))}. Got value: {task}")
    return task


def _run(recipe: Recipe, args: list[str]) -> dict[str, dict[str, Any]]:
    console = Console()
    cli = RecipeCLI(recipe, args)
    root, ckpt_path = Path(cli.config.trainer.default_root_dir), cli.config.ckpt_path
    if not cli.config.compare:
        if cli.needs_first and not (ckpt_path and (root / FIRST / LAST).exists()):
            _run_one(RecipeCLI(recipe, args, FIRST), console)
        return _run_one(cli, console)
    arms = ("baseline", *([FIRST] if cli.needs_first else []), recipe.side)
    resumed = next((n for n, arm in enumerate(arms) if ckpt_path and is_inside(ckpt_path, root / arm)), None)
    if ckpt_path is not None and resumed is None:
        raise ValueError(
            f"ckpt_path={ckpt_path!r}: --compare resumes from checkpoints below {root}/{{{','.join(arms)}}}"
        )
    records: dict[str, dict[str, Any]] = {}
    for number, arm in enumerate(arms):
        finished = root / arm / "result.json"
        if number < (resumed or 0) and finished.exists():
            records[arm] = json.loads(finished.read_text())  # done before a later run was interrupted
        else:
            records |= _run_one(RecipeCLI(recipe, args, arm), console)
    records.pop(FIRST, None)  # its cost is charged to the technique's run
    if rank() == 0:
        records["baseline"] = priced_alike(*records.values())
        plot_curves(records, root / "comparison.png")
        write_json(root / "comparison.json", records)
        console.print(comparison_table(records))
        say(console, f"written: {root / 'comparison.json'}, {root / 'comparison.png'}")
    return records


def _run_one(cli: RecipeCLI, console: Console) -> dict[str, dict[str, Any]]:
    """Make one run, and print and plot its report."""
    arm = cli.arm or ("baseline" if cli.config.baseline else cli.recipe.side)
    root = Path(cli.trainer.default_root_dir)
    if cli.trainer.is_global_zero:
        size = sum(parameter.numel() for parameter in cli.model.parameters())
        say(console, f"{cli.recipe.name} ({arm}): {size:,} parameters, {cli.trainer.strategy.root_device}, into {root}")
    record = cli.train()
    if not cli.trainer.is_global_zero:
        return {}
    plot_curves({arm: record}, root / "result.png")
    console.print(stage_table(record, arm))
    say(console, saving_line(record))
    say(console, f"written: {root / 'result.json'}, {root / 'result.png'}")
    return {arm: record}


def _python() -> str:
    """``python`` if that is the current interpreter, else the path of the current one."""
    found = shutil.which("python")
    # compare folders, not files: an environment's interpreter is a link to one without its packages
    same = found is not None and os.path.samefile(os.path.dirname(found), os.path.dirname(sys.executable))
    return "python" if same else sys.executable
