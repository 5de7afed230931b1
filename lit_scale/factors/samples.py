"""Samples: training steps on part of a batch.

Techniques that choose samples ask a module for one method, ``per_sample_loss(batch) -> (B,)``, of which its
``training_step`` returns the mean.
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
    """A technique that trains on part of the samples it is given.

    A subclass says what a training step does with its batch (:meth:`train`), and, where a loader can be asked ahead, of
    how many samples it chooses (:meth:`samples`). All ranks take equally many. Random choices are a function of
    (seed, rank, batch counter).

    Raises:
        ValueError: In ``setup``, if the module has no ``per_sample_loss``; the message holds one. With the first batch,
            where losses are to be weighed and the module's ``training_step`` does not ask for them.
    """

    factor = "samples"
    weighs = False  # losses, in some step; so that every step has to ask for them
    trained = (0, False)  # how many samples the latest step has trained, and whether it has weighed them
    _loader: Any = None  # one that can be asked ahead
    _ended = False  # training has; steps are only replayed
    _weights: Tensor | None = None  # of the samples that are trained right now, (b,)
    _asked = False  # the training step has asked for their losses

    # -- what a subclass says -----------------------------------------------------------------------------------------

    @abstractmethod
    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """What the training step returns.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            step: The module's own step; call it once, with a batch of as many samples on all ranks.
            batch: All samples.
        """

    def samples(self, number: int, count: int) -> int:
        """How many samples the loader takes for a batch, by its number since the run began, in place of ``count``."""
        return count

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand around the training step."""
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
                    f"{type(self).__name__} has to weigh; let it return self.per_sample_loss(batch).mean()"
                )
            return output

        self.undo_later(
            wrap(pl_module, "training_step", step, outermost=True), wrap(pl_module, "per_sample_loss", self._weigh)
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the loader for more samples, if it can be asked."""
        loader: Any = trainer.train_dataloader
        if type(self).samples is not SampleChoice.samples and getattr(loader, "takes_plan", False):
            self._loader, before = loader, loader.plan
            loader.plan = functools.partial(self._plan, before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the loader as it was; from now on steps are only replayed."""
        self._ended = True
        if self._loader is not None:
            self._loader.plan = None

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave loader and module as they were."""
        super().detach(trainer, pl_module)
        if self._loader is not None:
            self._loader.plan = None
        self._loader, self._weights = None, None

    def _plan(self, before: Plan | None, number: int) -> tuple[int | None, int]:
        size, count = (None, self._loader.batch_size) if before is None else before(number)
        return size, self.samples(number, count)

    # -- what subclasses use ------------------------------------------------------------------------------------------

    def number(self, trainer: Trainer) -> int:
        """The number of the batch at work, since the run began."""
        if self._loader is None:
            return trainer.fit_loop.total_batch_idx
        position = self._loader.state_dict()
        return position["epoch"] * position["length"] + position["batches"] - 1

    def generator(self, trainer: Trainer, seed: int) -> torch.Generator:
        """Of this batch's random choices, the same on every device and whenever the run was resumed."""
        counter = trainer.fit_loop.total_batch_idx
        return torch.Generator().manual_seed(derive_seed(seed, trainer.global_rank, counter))

    def weighted(self, step: Step, batch: Any, weights: Tensor) -> Any:
        """The module's own step, with the losses of its samples multiplied by ``weights`` (b,).

        For a subclass with ``weighs = True``: a module that goes around its losses is refused with the first batch.
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
    """A share of so many samples: a whole number, at least one.

    Example:
        >>> round_share(0.1, 160), round_share(0.1, 3)
        (16, 1)
    """
    return max(1, math.floor(share * count + 0.5))
