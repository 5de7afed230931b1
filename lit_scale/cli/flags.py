"""The flags of a recipe and the objects made from them: a LightningCLI for a model, a data module and techniques."""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, RichProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from lit_scale.cli.console import say
from lit_scale.cli.folder import LAST, OF_COMPARISON, OF_RUN, LastCheckpoint, is_inside, resume_command, set_aside
from lit_scale.cost import CostMeter
from lit_scale.guards import (
    FiniteGuard,
    PreemptionGuard,
    SafeCheckpointIO,
    StepSeed,
    check_writable,
    load_checkpoint,
)
from lit_scale.technique import Technique, snake_case, trained_with

__all__ = ["FIRST", "Recipe", "RecipeCLI"]

_LINKS = (
    ("seed_everything", "data.seed", "parse"),
    ("data.sequence_length", "model.max_length", "parse"),
    ("data.vocab_size", "model.vocab_size", "instantiate"),
    ("data.image_size", "model.image_size", "parse"),
    ("data.num_classes", "model.num_classes", "instantiate"),
)
_REFERENCES = ("unigram_entropy", "chance_accuracy")  # baselines without learning, if the data module has them
_VALIDATIONS = 10  # points on the curve of a run, unless --trainer.val_check_interval says otherwise
FIRST = "first"  # folder of the preliminary run, and the default of the flag for its checkpoint


@dataclass(frozen=True)
class Recipe:
    """The arguments of :func:`run_recipe`.

    Attributes:
        name: Name of the default folder and of the record.
        description: One line for ``--help``.
        command: The command line, without the flags.
        model: Class of the LightningModule.
        data: Class of the data module.
        techniques: Classes of the techniques.
        defaults: Defaults by flag.
        tasks: Values that ``--task`` accepts.
        first: A preliminary run without the technique: the technique's flag for its last checkpoint, and the flags in
            which it differs.
    """

    name: str
    description: str
    command: list[str]
    model: type[LightningModule]
    data: type[LightningDataModule]
    techniques: tuple[type[Technique], ...]
    defaults: dict[str, Any]
    tasks: tuple[str, ...] = ()
    first: tuple[str, Mapping[str, Any]] | None = None

    @property
    def side(self) -> str:
        """Name of the run with techniques, and of its folder: the technique's name, or ``all_in_one`` for several."""
        return snake_case(self.techniques[0]) if len(self.techniques) == 1 else "all_in_one"


class RecipeCLI(LightningCLI):
    """LightningCLI without subcommands, for one model, one data module, and one or more techniques.

    Groups of flags: ``--trainer.*``, ``--model.*``, ``--data.*``, and one group per technique, named after its
    class in snake case.
    Arguments of the model that follow from the data (length, vocabulary, image size, classes) are linked to the data
    and are not flags; so is the data's seed to ``--seed_everything``. With ``--compare`` and without ``arm`` it only
    reads the flags.

    Args:
        recipe: The recipe.
        args: The flags.
        arm: The run to make, of several: ``"baseline"``, the recipe's ``side``, or ``"first"``; None for a single run.
    """

    def __init__(self, recipe: Recipe, args: list[str], arm: str | None = None) -> None:
        self.recipe, self.arguments, self.arm = recipe, args, arm
        self.needs_first = False  # whether the preliminary run is needed: no other checkpoint was given
        differing = recipe.first[1] if recipe.first and arm == FIRST else {}
        super().__init__(
            recipe.model,
            recipe.data,
            save_config_callback=None,  # take_folder writes config.yaml instead
            parser_kwargs={
                "description": recipe.description,
                "usage": "%(prog)s [--baseline | --compare] [--ckpt_path FILE] [--config FILE] [--GROUP.FLAG VALUE]",
                "default_env": False,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            auto_configure_optimizers=False,  # the model has its own flags
            args=[*args, *(f"--{name}={value}" for name, value in differing.items())],
            run=False,
        )

    # -- flags --------------------------------------------------------------------------------------------------------

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, which the data and the guards share; a recipe always has one."""
        parser.add_argument("--seed_everything", type=int, default=1, help="seed of weights, data and dropout")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add each technique's group, the recipe's own flags, links and defaults."""
        for technique in self.recipe.techniques:
            parser.add_class_arguments(technique, snake_case(technique))
        what = "technique" if len(self.recipe.techniques) == 1 else "techniques"
        parser.add_argument("--baseline", action="store_true", help=f"the same run without the {what}")
        parser.add_argument("--compare", action="store_true", help="both runs, then a table side by side")
        parser.add_argument("--ckpt_path", type=str, default=None, help="checkpoint to resume from")
        if self.recipe.tasks:
            parser.add_argument("--task", choices=self.recipe.tasks, default=None, help="another model on other data")
        parts = {"model": self.recipe.model, "data": self.recipe.data}
        names = {name: set(inspect.signature(kind).parameters) for name, kind in parts.items()}
        for source, target, when in _LINKS:
            part, argument = target.split(".")
            owner, _, name = source.partition(".")
            known = not name or hasattr(self.recipe.data, name) or name in names.get(owner, ())
            if argument in names[part] and known:
                parser.link_arguments(source, target, apply_on=when)
        parser.set_defaults(
            {
                "trainer.default_root_dir": f"runs/{self.recipe.name}",
                "trainer.logger": False,
                "trainer.enable_model_summary": False,
            }
            | ({self.recipe.first[0]: FIRST} if self.recipe.first else {})
            | self.recipe.defaults
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the flags. The recipe's ``max_steps`` applies only if no other limit of the run is given."""
        steps = self.recipe.defaults.get("trainer.max_steps", -1)
        parser.set_defaults({"trainer.max_steps": -1})
        asks = ("-h", "--help", "--print_config")
        try:
            given = parser.parse_args([arg for arg in args if arg.partition("=")[0] not in asks]).trainer
        except ArgumentError as error:
            raise _with_hint(error, parser) from None
        if given.max_steps == -1 and given.max_time is None and (given.max_epochs is None or given.max_epochs < 0):
            parser.set_defaults({"trainer.max_steps": steps})
        self.config = config = parser.parse_args(args)
        root, first = Path(config.trainer.default_root_dir), self.recipe.first
        if first is not None and config[first[0]] == FIRST:
            config[first[0]] = str(root / FIRST / LAST)
            self.needs_first = not (config.baseline or self.arm == "baseline")
        if self.arm is not None:
            config.trainer.default_root_dir = str(root / self.arm)
            config.compare, config.baseline = False, self.arm in ("baseline", FIRST)
        if config.ckpt_path is None or config.compare:
            return
        of_first = self.needs_first and self.arm is None and is_inside(config.ckpt_path, root / FIRST)
        if of_first or (self.arm is not None and not is_inside(config.ckpt_path, root / self.arm)):
            config.ckpt_path = None  # it belongs to another run of the comparison, which resumes from it

    def before_instantiate_classes(self) -> None:
        """Set flags that follow from others, and refuse early what cannot work."""
        trainer, ckpt_path = self.config.trainer, self.config.ckpt_path
        if trainer.val_check_interval is None and trainer.check_val_every_n_epoch == 1:
            trainer.val_check_interval, trainer.check_val_every_n_epoch = _validation_times(trainer)
        if trainer.accumulate_grad_batches < 1:
            raise ValueError(f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be at least 1")
        if ckpt_path is not None and not Path(ckpt_path).exists():
            raise ValueError(f"ckpt_path={ckpt_path!r} does not exist")
        if trainer.default_root_dir is None or "://" in str(trainer.default_root_dir):
            raise ValueError(f"trainer.default_root_dir={trainer.default_root_dir!r}: give a local folder")
        check_writable(trainer.default_root_dir)

    def take_folder(self) -> None:
        """Claim the folder when training starts: move an earlier run aside, and write ``config.yaml``."""
        root, ckpt_path = Path(self.config.trainer.default_root_dir), self.config.ckpt_path
        if ckpt_path is None or not is_inside(ckpt_path, root / "checkpoints"):
            set_aside(root, OF_RUN)
        if self.arm is not None:
            set_aside(root.parent, OF_COMPARISON)
        config = self.config.clone()
        config.ckpt_path = None
        (root / "config.yaml").write_text(self.parser.dump(config, skip_none=False, skip_validation=True))

    # -- objects ------------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Create the model, the data, the techniques and the Trainer; nothing with ``--compare``."""
        if not self.config.compare:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the user's Trainer, with the techniques, the cost meter and the guards."""
        config = self._get(self.config_init, "trainer")
        checkpoints, bar = Path(config.default_root_dir, "checkpoints"), Console().is_terminal
        command = [*self.recipe.command, *self.arguments]
        techniques = [self._get(self.config_init, snake_case(technique)) for technique in self.recipe.techniques]
        self.meter = CostMeter(
            recipe=self.recipe.name,
            technique=self.recipe.side,
            baseline=self.config.baseline,
            extra={"command": shlex.join(command)},
        )
        callbacks = [
            LambdaCallback(on_train_start=lambda trainer, _: self.take_folder() if trainer.is_global_zero else None),
            *_listed(config.callbacks),
            *([] if self.config.baseline else techniques),
            self.meter,
            FiniteGuard(),
            StepSeed(self.config.seed_everything),
            PreemptionGuard(checkpoints, resume_command=resume_command(command)),
            *([] if config.enable_checkpointing is False else [LastCheckpoint(checkpoints)]),
            *([] if config.enable_progress_bar is False else [_ProgressBar() if bar else _Lines()]),
        ]
        plugins = [*_listed(config.plugins), SafeCheckpointIO()]
        bars = {} if bar else {"enable_progress_bar": False}
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **bars, **kwargs)

    def train(self) -> dict[str, Any]:
        """Fit, validate unless the last step was validated, test if there is a test set, and return the record."""
        ckpt_path = self.config.ckpt_path
        if ckpt_path is not None:
            _check_checkpoint(self, load_checkpoint(ckpt_path))
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=ckpt_path)
        ledger = self.meter.ledger
        if not ledger.counts:
            raise ValueError("the run made no step: raise trainer.max_steps, max_epochs or max_time")
        for name in _REFERENCES:
            if (value := getattr(self.datamodule, name, None)) is not None:
                self.meter.extra[name] = value
        if self.trainer.limit_val_batches and not (
            ledger.curve and ledger.curve[-1]["step"] == self.trainer.global_step
        ):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if getattr(self.datamodule, "test_set", None) is not None and self.trainer.limit_test_batches:
            [tested] = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self.meter.extra["test"] = tested
        self.meter.write(self.trainer, self.model)
        return self.meter.record(self.trainer, self.model)


class _Lines(Callback):
    """Prints a line for each validation, if there is no terminal for a progress bar."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero:
            of = f" of {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
            own = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            told = ", ".join(f"{name} {float(value):.4f}" for name, value in own.items())
            say(Console(), f"step {trainer.global_step:,}{of}: {told}")


class _ProgressBar(RichProgressBar):
    def __init__(self) -> None:
        super().__init__(refresh_rate=10)  # per second

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1
        return f"Epoch {current_epoch}" + (f"/{epochs - 1}" if epochs > 0 else "")  # not "0/-2" if steps limit the run


# -- small decisions --------------------------------------------------------------------------------------------------


def _with_hint(error: ArgumentError, parser: LightningArgumentParser) -> ArgumentError:
    """Add to the message the flags that resemble an unknown one."""
    unknown = re.findall(r"(?:^|\s)(--[^\s=]+)", error.message.partition("unrecognized arguments:")[2])
    options = [option for action in parser._actions for option in action.option_strings]
    near = [match for flag in unknown for match in difflib.get_close_matches(flag, options, n=1, cutoff=0.75)]
    if "unrecognized arguments:" in error.message:
        hint = f"did you mean {', '.join(near)}?" if near else "--help lists all flags"
        return ArgumentError(None, f"{error.message}; {hint}")
    return error


def _validation_times(trainer: Any) -> tuple[int | float | str, int | None]:
    """``val_check_interval`` and ``check_val_every_n_epoch`` for about ten validations, under any limit of the run."""
    if trainer.max_steps > 0:
        return max(1, trainer.max_steps // _VALIDATIONS) * trainer.accumulate_grad_batches, None  # never inside a step
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        epochs = trainer.max_epochs / _VALIDATIONS
        return min(1.0, epochs), max(1, int(epochs))
    if trainer.max_time is not None:
        seconds = max(1, int((Timer(trainer.max_time).time_remaining() or 0) / _VALIDATIONS))
        return f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}", 1
    return 1.0, 1


def _check_checkpoint(cli: RecipeCLI, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run, from which Lightning would resume a mixture of both."""
    techniques = trained_with(checkpoint)
    for name in (technique.__name__ for technique in cli.recipe.techniques):
        if cli.config.baseline and name in techniques:
            raise ValueError(f"the checkpoint was trained with {name}: leave out --baseline, or start a new run")
        if not cli.config.baseline and name not in techniques:
            raise ValueError(f"the checkpoint was trained without {name}: add --baseline, or start a new run")
    now = cli.model.hparams
    saved = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if not key.startswith("_")}
    differing = [
        f"{key} (was {saved[key]!r}, is {now[key]!r})" for key in saved if key in now and saved[key] != now[key]
    ]
    if differing:
        raise ValueError(
            f"the checkpoint's model has other hyperparameters: {', '.join(differing)}. "
            "Resume with the flags it was trained with, or start a new run"
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
