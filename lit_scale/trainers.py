"""What Lightning does not declare of a Trainer: its callbacks, and whether a step's logs are written."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

__all__ = ["callbacks_of", "writes_logs"]

Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a Trainer that are of one class, in their order.

    Args:
        trainer: The Trainer.
        kind: The class; subclasses count too, so ``Callback`` gives all of them.

    Example:
        >>> from lightning.pytorch.callbacks import Timer
        >>> trainer = Trainer(max_time={"hours": 1}, accelerator="cpu", logger=False)
        >>> [type(callback).__name__ for callback in callbacks_of(trainer, Timer)]
        ['Timer']
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def writes_logs(trainer: Trainer) -> bool:
    """Whether what is logged during this training step reaches the logger: every ``log_every_n_steps`` steps.

    Example:
        >>> writes_logs(Trainer(log_every_n_steps=1, accelerator="cpu", logger=False))
        True
    """
    anything: Any = trainer
    every: int = anything.log_every_n_steps
    return bool(every) and (trainer.global_step + 1) % every == 0
