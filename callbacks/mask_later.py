"""Mask later: masked positions skip the first blocks (Liao et al., Findings of EMNLP 2022, arXiv 2211.04898).

    kept    = the positions that are not masked
    x[kept] <- first blocks(x[kept]); the masked positions keep their embeddings
    x       <- last blocks(x), all positions; the loss is computed at the masked ones

A higher masking rate makes a step cheaper, so the paper masks more tokens than usual. The trained network computes
another function than one in which all blocks see the masks, so evaluation leaves them out of the same blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_scale.factors.token_choice import Count, TokenChoice
from lit_scale.factors.tokens import highest

__all__ = ["MaskLater"]


class MaskLater(TokenChoice):
    """Lets masked positions skip the first blocks and join for the last ones.

    Evaluation does the same. Checkpoints carry a mark, so strict loading into a network without this callback fails,
    and the trained network refuses to run without it. For text without masks, call
    :func:`lit_scale.factors.tokens.release_tokens` to let all tokens run through all blocks again.

    Batches are dicts with ``input_ids`` (B, T) and ``positions`` (B, M), the indices of the masked positions, distinct
    and equally many in each sample. T - M tokens are kept.

    Args:
        before: Number of blocks, or fraction of all (rounded down), at the front that run on the masked positions too.
            By default 0 (Liao et al.).
        after: Number of blocks, or fraction of all, at the end that run on the masked positions. By default a quarter
            (ours; "a few layers" in Liao et al.).
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Raises:
        ValueError: At construction, in ``setup``, or at the first batch before it is trained, if an argument is out of
            range or a batch lacks an entry.
        RuntimeError: If the trained network runs without this callback, or its weights are loaded strictly into a
            network without it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[MaskLater(after=2)], logger=False)
    """

    lasting = True
    kept = "unmasked"

    def __init__(self, *, before: Count = 0, after: Count = 0.25, blocks: str | None = None) -> None:
        super().__init__(before=before, after=after, blocks=blocks)

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {"before": self.before, "after": self.after, "blocks": self.blocks}

    def choose(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> tuple[Tensor, int]:
        """Positions that are not masked, (B, T - M), and T."""
        ids, masked = self.entry(batch, "input_ids"), self.entry(batch, "positions")
        scores = torch.ones_like(ids).scatter_(1, masked, 0)
        return highest(scores, ids.shape[1] - masked.shape[1]), ids.shape[1]

    def positions(self, x: Tensor, place: int) -> Tensor | None:
        """Kept positions of the batch; the network refuses to run if none were given."""
        if self.chosen is None and self.kept == "unmasked":  # kept is 1.0 while the clock times a plain step
            raise RuntimeError(
                "the masked positions of this network join late, and it was not given them: run it through a "
                "Trainer with callbacks=[MaskLater()], or call release_tokens to let all tokens run through all "
                "blocks from now on"
            )
        return super().positions(x, place)
