"""The folder of a run: the files in it, and how a later run treats them.

A run owns its folder. Files of an earlier run are moved into a subfolder ``earlier-1``, ``earlier-2``..., so that they
are neither overwritten nor mixed up. They stay if the new run resumes from a checkpoint of the earlier one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from lit_scale.cli.console import say

__all__ = ["LAST", "OF_COMPARISON", "OF_RUN", "LastCheckpoint", "is_inside", "resume_command", "set_aside"]

LAST = Path("checkpoints", "last.ckpt")
OF_RUN = ("config.yaml", "result.json", "result.png", "checkpoints")  # files of a run
OF_COMPARISON = ("comparison.json", "comparison.png")


class LastCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt``, the newest state, after each validation and at the end of training."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="last", save_top_k=1, enable_version_counter=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop._should_accumulate():  # a checkpoint cannot hold gradients of an unfinished step
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # again, even if the last step was validated: the cost meter measures its prices only at the end
            trainer.save_checkpoint(os.path.join(str(self.dirpath), "last.ckpt"), weights_only=False)


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move the files of an earlier run into a subfolder, and print a line about it.

    Args:
        folder: Folder of both runs.
        names: Names of the files and folders of a run.

    Returns:
        The subfolder, or None if there was neither a result nor a checkpoint.
    """
    found = [folder / name for name in names if (folder / name).exists()]
    if not any(path.suffix in (".json", ".png") or any(path.glob("*.ckpt")) for path in found):
        return None
    taken = [int(path.name.rpartition("-")[2]) for path in folder.glob("earlier-*") if path.name[8:].isdecimal()]
    target = folder / f"earlier-{max(taken, default=0) + 1}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    say(Console(), f"{folder} held another run; it is now in {target}")
    return target


def resume_command(command: list[str]) -> str:
    """The command line with ``--ckpt_path {path}`` in place of its own."""
    args = list(command)
    while "--ckpt_path" in args:
        del args[args.index("--ckpt_path") : args.index("--ckpt_path") + 2]
    return shlex.join(arg for arg in args if not arg.startswith("--ckpt_path=")) + " --ckpt_path {path}"


def is_inside(path: str | Path, folder: Path) -> bool:
    """Whether a path is below a folder, at any depth."""
    return folder.resolve() in Path(path).resolve().parents
