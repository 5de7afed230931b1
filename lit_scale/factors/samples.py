"""Samples: the base class of techniques that train on part of a batch.

The module must have a method ``per_sample_loss(batch) -> (B,)``, and its ``training_step`` must return the mean of
these losses.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_scale.batches import Plan, count_samples
from lit_scale.seeds import derive_seed
from lit_scale.technique import Technique
from lit_scale.wrapping import wrap

__all__ = [
    "SampleChoice",
    "round_share",
]

Step = Callable[[Any], Any]

_LESSON = """{technique} needs the losses of single samples, but {module} has no method per_sample_loss(batch) \
that returns them; add one, and let training_step return its mean:

    def per_sample_loss(self, batch):
        images, labels = batch
        logits = self(images)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")  # (B,)

    def training_step(self, batch, batch_idx):
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss
"""


class SampleChoice(Technique):
    """A technique that trains on part of the samples of a batch.

    A subclass defines what a training step does with its batch (:meth:`train`). For loaders that take a plan it can
    also define how many samples a batch has (:meth:`samples`). All ranks train the same number of samples. Random
    choices are a function of (seed, rank, batch counter).

    Raises:
        ValueError: In ``setup``, if the module has no ``per_sample_loss``; the message shows an example. At the first
            batch, if losses are to be weighted and the module's ``training_step`` does not call ``per_sample_loss``.
    """

    factor = "samples"
    weighs = False  # whether losses are weighted in some steps; then every step must call per_sample_loss
    trained = (0, False)  # number of samples that the latest step trained, and whether their losses were weighted
    _loader: Any = None  # the loader, if it takes a plan
    _ended = False  # training has ended; steps are only replayed by the clock
    _weights: Tensor | None = None  # weights of the samples that are being trained, (b,)
    _asked = False  # whether the current training step has called per_sample_loss

    # -- what a subclass overrides ------------------------------------------------------------------------------------

    @abstractmethod
    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """Make the training step and return its output.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            step: The module's own step; call it once, with the same number of samples on all ranks.
            batch: The whole batch.
        """

    def samples(self, number: int, count: int) -> int:
        """Number of samples that the loader takes for a batch instead of ``count``.

        Args:
            number: Number of the batch since the run began.
            count: Samples of the batch without the technique.
        """
        return count

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the training step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not callable(getattr(pl_module, "per_sample_loss", None)):
            raise ValueError(_LESSON.format(technique=type(self).__name__, module=type(pl_module).__name__))
        self.detach(trainer, pl_module)
        self._ended = False

        def step(method: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self.train(trainer, pl_module, lambda own: own_step(method, own, *args, **kwargs), batch)

        def own_step(method: Callable[..., Any], own: Any, *args: Any, **kwargs: Any) -> Any:
            self.trained, self._asked = (count_samples(own), self._weights is not None), False
            output = method(own, *args, **kwargs)
            if self.weighs and output is not None and not self._asked:
                raise ValueError(
                    f"{type(pl_module).__name__}.training_step did not call self.per_sample_loss(batch), whose losses "
                    f"{type(self).__name__} has to weight; let it return self.per_sample_loss(batch).mean()"
                )
            return output

        self.undo_later(
            wrap(pl_module, "training_step", step, outermost=True), wrap(pl_module, "per_sample_loss", self._weigh)
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the plan in a loader that takes one."""
        loader: Any = trainer.train_dataloader
        if type(self).samples is not SampleChoice.samples and getattr(loader, "takes_plan", False):
            self._loader, before = loader, loader.plan
            loader.plan = functools.partial(self._plan, before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the plan from the loader; from now on steps are only replayed."""
        self._ended = True
        if self._loader is not None:
            self._loader.plan = None

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore loader and module."""
        super().detach(trainer, pl_module)
        if self._loader is not None:
            self._loader.plan = None
        self._loader, self._weights = None, None

    def _plan(self, before: Plan | None, number: int) -> tuple[int | None, int]:
        size, count = (None, self._loader.batch_size) if before is None else before(number)
        return size, self.samples(number, count)

    # -- what subclasses use ------------------------------------------------------------------------------------------

    def number(self, trainer: Trainer) -> int:
        """The number of the current batch since the run began."""
        if self._loader is None:
            return trainer.fit_loop.total_batch_idx
        position = self._loader.state_dict()
        return position["epoch"] * position["length"] + position["batches"] - 1

    def generator(self, trainer: Trainer, seed: int) -> torch.Generator:
        """A CPU generator for the current batch, seeded by (seed, rank, batch counter)."""
        counter = trainer.fit_loop.total_batch_idx
        return torch.Generator().manual_seed(derive_seed(seed, trainer.global_rank, counter))

    def weighted(self, step: Step, batch: Any, weights: Tensor) -> Any:
        """Make the module's own step, with the losses of its samples multiplied by ``weights`` (b,).

        The subclass must set ``weighs = True``, so that a module whose step does not call ``per_sample_loss`` is
        refused at the first batch.
        """
        self._weights = weights
        try:
            return step(batch)
        finally:
            self._weights = None

    def _weigh(self, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        losses = method(*args, **kwargs)
        self._asked = True
        if self._weights is None:
            return losses
        if losses.shape != self._weights.shape:
            raise ValueError(
                f"per_sample_loss returned {tuple(losses.shape)} for {len(self._weights)} samples; return one loss each"
            )
        return losses * self._weights.to(losses)


def round_share(share: float, count: int) -> int:
    """A share of ``count`` samples, rounded to a whole number of at least 1.

    Example:
        >>> round_share(0.1, 160), round_share(0.1, 3)
        (16, 1)
    """
    return max(1, math.floor(share * count + 0.5))
