"""Training code that all models share: optimizer, learning-rate schedule, evaluation, and checks at resume."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim.lr_scheduler import LambdaLR

from lit_scale.factors.optimizers import create_optimizer
from lit_scale.progress import progress
from lit_scale.schedules import warmup_cosine
from lit_scale.technique import check_techniques

__all__ = ["Scheduled", "check_warmup"]


def check_warmup(warmup: float) -> None:
    """Refuse a warm-up that is not a fraction of the run.

    Example:
        >>> check_warmup(1.5)
        Traceback (most recent call last):
        ValueError: warmup=1.5 is not a fraction of the run in [0, 1)
    """
    if not 0.0 <= warmup < 1.0:
        raise ValueError(f"warmup={warmup} is not a fraction of the run in [0, 1)")


class Scheduled(LightningModule):
    """Base class: an optimizer by name, and a learning rate that warms up and decays to zero at the end of the run.

    It reads the hyperparameters ``optimizer``, ``lr``, ``weight_decay``, ``beta2`` and ``warmup``, which the module
    must have saved with ``save_hyperparameters``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from torch import nn
        >>> class Line(Scheduled):
        ...     def __init__(self, optimizer="adamw", lr=0.1, weight_decay=0.0, beta2=0.99, warmup=0.1):
        ...         super().__init__()
        ...         self.save_hyperparameters()
        ...         self.net = nn.Linear(1, 1)
        >>> line = Line()
        >>> line.trainer = Trainer(max_steps=10, accelerator="cpu", logger=False)
        >>> type(line.configure_optimizers()["optimizer"]).__name__
        'AdamW'
    """

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The named optimizer with decay groups; warm-up, then cosine decay to zero at the end of the run."""
        own = self.hparams
        options: dict[str, Any] = {}
        if "adam" in own["optimizer"] or own["optimizer"] in {"lamb", "lamb8bit", "muon"}:
            options["betas"] = (0.9, own["beta2"])
        if own["optimizer"] in {"adam", "adamw"}:  # Lightning cannot clip gradients for a fused one under AMP
            mixed = self._trainer is not None and isinstance(self.trainer.precision_plugin, MixedPrecision)
            options["fused"] = not mixed
        optimizer = create_optimizer(self, own["optimizer"], lr=own["lr"], weight_decay=own["weight_decay"], **options)
        schedule = LambdaLR(optimizer, lambda _: warmup_cosine(progress(self.trainer), own["warmup"]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def evaluation_step(self, batch: Any, batch_idx: int, split: str) -> None:
        """Update and log the metrics of a held-out split, such as ``val/loss``; a subclass defines this."""
        raise TypeError(f"{type(self).__name__} does not say how it is evaluated; define evaluation_step")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The metrics of the validation split."""
        self.evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same metrics of the test split, which is used for reporting only."""
        self.evaluation_step(batch, batch_idx, "test")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume without a technique that the checkpoint was trained with, or with another optimizer."""
        if self._trainer is None:
            return
        check_techniques(self._trainer, checkpoint)
        own = self.hparams["optimizer"]
        saved = checkpoint.get("hyper_parameters", {}).get("optimizer", own)
        if self._trainer.state.fn == "fit" and saved != own:  # torch would load the state, and fail at the first step
            raise ValueError(
                f"optimizer={own!r} cannot go on with the state of the checkpoint's {saved!r}; resume with the same "
                "one, or start a new run"
            )
