"""What a run keeps in its folder, and what may go on from it.

A run owns its folder. What another run left there is not overwritten, nor taken for this one's: it moves into a
subfolder ``earlier-1``, ``earlier-2``..., unless a checkpoint of that very run is named to go on from.
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
OF_RUN = ("config.yaml", "result.json", "result.png", "checkpoints")  # what a run leaves
OF_COMPARISON = ("comparison.json", "comparison.png")


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``: the newest state, saved after each validation and when training has ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="last", save_top_k=1, enable_version_counter=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop._should_accumulate():  # no file holds the gradients of an unfinished step
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # once more where the last step was validated: the clock has its prices only now
            trainer.save_checkpoint(os.path.join(str(self.dirpath), "last.ckpt"), weights_only=False)


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move what another run left into a subfolder of its own, and say so.

    Args:
        folder: Where both runs write.
        names: Files and folders of a run.

    Returns:
        The subfolder, or None if there was no result and no checkpoint.
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
    """The command line, resuming from ``{path}``."""
    args = list(command)
    while "--ckpt_path" in args:
        del args[args.index("--ckpt_path") : args.index("--ckpt_path") + 2]
    return shlex.join(arg for arg in args if not arg.startswith("--ckpt_path=")) + " --ckpt_path {path}"


def is_inside(path: str | Path, folder: Path) -> bool:
    """Whether a path lies somewhere below a folder."""
    return folder.resolve() in Path(path).resolve().parents
