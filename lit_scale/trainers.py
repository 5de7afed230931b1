"""Typed access to two things of a Trainer that Lightning does not declare: its callbacks, and when logs are written."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

__all__ = ["callbacks_of", "writes_logs"]

Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a Trainer that are instances of a class, in their order.

    Args:
        trainer: The Trainer.
        kind: The class; instances of subclasses are included, so ``Callback`` gives all callbacks.

    Example:
        >>> from lightning.pytorch.callbacks import Timer
        >>> trainer = Trainer(max_time={"hours": 1}, accelerator="cpu", logger=False)
        >>> [type(callback).__name__ for callback in callbacks_of(trainer, Timer)]
        ['Timer']
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def writes_logs(trainer: Trainer) -> bool:
    """Whether values logged in the current training step reach the logger, which is every ``log_every_n_steps`` steps.

    Example:
        >>> writes_logs(Trainer(log_every_n_steps=1, accelerator="cpu", logger=False))
        True
    """
    anything: Any = trainer
    every: int = anything.log_every_n_steps
    return bool(every) and (trainer.global_step + 1) % every == 0
