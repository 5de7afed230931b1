"""Selective backprop (Jiang et al. 2019, arXiv 1910.00762): back-propagate the samples with large losses only.

    one forward pass over the batch; sample i is kept with probability ~ percentile(loss_i)^(1 / keep - 1)

A step costs a third of a plain one for the losses, and ``keep`` for the rest: 17% less with half of the samples.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_scale.batches import count_samples, take_samples
from lit_scale.factors.samples import SampleChoice, Step, round_share
from lit_scale.factors.scores import sample_losses
from lit_scale.progress import progress

__all__ = ["SelectiveBackprop", "select_by_percentile"]


def select_by_percentile(losses: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Draw a share of the samples without replacement, rather those with large losses.

    Args:
        losses: (B,).
        keep: Share of the samples in (0, 1]; small ones prefer large losses more.
        generator: On the CPU.

    Returns:
        Indices, ascending.

    Example:
        >>> select_by_percentile(torch.tensor([0.1, 2.0, 0.3, 0.2]), 0.25, torch.Generator())
        tensor([1])
    """
    count = len(losses)
    order = losses.cpu().argsort(stable=True)  # what is not a number comes last, and is so met rather than passed by
    percentiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = torch.multinomial(percentiles ** (1 / keep - 1), round_share(keep, count), generator=generator)
    return order[chosen].sort().values.to(losses.device)


class SelectiveBackprop(SampleChoice):
    """Trains on the part of each batch that has large losses.

    Losses are those of a forward pass without dropout. Their gradients are not weighted, so that, other than with
    :class:`ImportanceSampling`, the network learns another distribution of samples, one of hard ones; the last part of
    the run therefore is plain, and so is every ``interrupt``-th batch. The module needs
    ``per_sample_loss(batch) -> (B,)``.

    Args:
        start: Fraction of the run at which choosing begins (0.5 in Composer, as the next three).
        end: Fraction at which it ends (0.9).
        keep: Share of the samples that is trained (0.5).
        interrupt: Every so many batches one is trained whole; 0 for none (2, which makes every second one plain).
        seed: Of the draws, which are a function of (seed, rank, batch counter).

    Raises:
        ValueError: At construction, or in ``setup``, if the module has no ``per_sample_loss``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[SelectiveBackprop(keep=0.5)], logger=False)
    """

    def __init__(
        self, start: float = 0.5, end: float = 0.9, *, keep: float = 0.5, interrupt: int = 2, seed: int = 0
    ) -> None:
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(f"start={start}, end={end}: must be fractions of the run with 0 <= start < end <= 1")
        if not 0.0 < keep < 1.0:
            raise ValueError(f"keep={keep} is not a share of the samples in (0, 1), such as 0.5")
        if interrupt < 0 or interrupt == 1:
            raise ValueError(f"interrupt={interrupt}: use 0 to choose from all batches, or at least 2")
        self.start, self.end, self.keep, self.interrupt, self.seed = start, end, keep, interrupt, seed
        self._due = False  # in this optimizer step
        self._chooses = False  # from the current batch

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {name: getattr(self, name) for name in ("start", "end", "keep", "interrupt", "seed")}

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whether the run is in the phase in which samples are chosen."""
        self._due = self.start <= progress(trainer) < self.end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose from this batch, unless it is one of those that are trained whole."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        interrupted = self.interrupt > 0 and (self.number(trainer) + 1) % self.interrupt == 0
        self._chooses = self._due and not interrupted

    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """Choose by loss, or make the plain step."""
        if not self._chooses or round_share(self.keep, count_samples(batch)) == count_samples(batch):
            return step(batch)
        losses = sample_losses(pl_module, batch)
        index = select_by_percentile(losses, self.keep, self.generator(trainer, self.seed))
        return step(take_samples(batch, index))

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """All samples are trained."""
        return not self._chooses

    def step_kind(self) -> dict[str, Any]:
        """Share of the samples that is trained."""
        return {"samples_kept": self.keep if self._chooses else 1.0}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Choose as an earlier step did."""
        self._chooses = kind["samples_kept"] < 1.0
