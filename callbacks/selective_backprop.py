"""Selective backprop (Jiang et al. 2019, arXiv 1910.00762): back-propagate mostly samples with large losses.

    one forward pass over the batch; sample i is kept with probability ~ percentile(loss_i)^(1 / keep - 1)

A step that chooses costs a third of a plain one for the losses and ``keep`` of one for the training: 17% less than a
plain step with ``keep=0.5``.
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
    """Draw a share of the samples without replacement, with preference for large losses.

    Args:
        losses: Losses, (B,).
        keep: Share of the samples, in (0, 1]; the smaller it is, the more large losses are preferred.
        generator: Random generator on the CPU.

    Returns:
        Indices of the chosen samples, ascending.

    Example:
        >>> select_by_percentile(torch.tensor([0.1, 2.0, 0.3, 0.2]), 0.25, torch.Generator())
        tensor([1])
    """
    count = len(losses)
    order = losses.cpu().argsort(stable=True)  # NaN comes last, so such samples are likely to be trained and noticed
    percentiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = torch.multinomial(percentiles ** (1 / keep - 1), round_share(keep, count), generator=generator)
    return order[chosen].sort().values.to(losses.device)


class SelectiveBackprop(SampleChoice):
    """Trains on a part of each batch, preferably samples with large losses.

    Losses are those of a forward pass without dropout. Their gradients are not weighted: unlike with
    :class:`ImportanceSampling`, the network learns a distribution with more hard samples. For this reason the last part
    of the run is plain, and so is every ``interrupt``-th batch. The module needs ``per_sample_loss(batch) -> (B,)``.

    Args:
        start: Fraction of the run at which choosing begins. The defaults of this and the next three are Composer's.
        end: Fraction of the run at which choosing ends.
        keep: Share of the samples that is trained, in (0, 1).
        interrupt: Every ``interrupt``-th batch is trained whole; 0 for none. With 2 every second batch is.
        seed: Seed of the draws, which are a function of (seed, rank, batch counter).

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
        self._due = False  # whether the run is between start and end
        self._chooses = False  # whether samples of the current batch are chosen

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {name: getattr(self, name) for name in ("start", "end", "keep", "interrupt", "seed")}

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set whether the run is in the phase in which samples are chosen."""
        self._due = self.start <= progress(trainer) < self.end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set whether to choose from this batch, or to train it whole."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        interrupted = self.interrupt > 0 and (self.number(trainer) + 1) % self.interrupt == 0
        self._chooses = self._due and not interrupted

    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """Choose samples by their losses, or make a plain step."""
        if not self._chooses or round_share(self.keep, count_samples(batch)) == count_samples(batch):
            return step(batch)
        losses = sample_losses(pl_module, batch)
        index = select_by_percentile(losses, self.keep, self.generator(trainer, self.seed))
        return step(take_samples(batch, index))

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """Whether all samples are trained."""
        return not self._chooses

    def step_kind(self) -> dict[str, Any]:
        """Share of the samples that is trained."""
        return {"samples_kept": self.keep if self._chooses else 1.0}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Choose samples or not, as in a step of this kind."""
        self._chooses = kind["samples_kept"] < 1.0
