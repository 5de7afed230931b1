"""Masks that join later (Liao et al., Findings of EMNLP 2022, "Mask More and Mask Later", arXiv 2211.04898).

    kept    = the positions that are not masked
    x[kept] <- first blocks(x[kept]); the masked positions are still what the embedding made of them
    x       <- last blocks(x), with the masked positions, from which the loss is computed

What a step costs falls with the masking rate, so more is masked than usual. The trained network is another one than
without the technique, so evaluation leaves the masks out of the same blocks.
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
    """Lets masked positions skip the first blocks; they join for the last ones only.

    They join late in evaluation too. Checkpoints are marked, so that strict loading refuses them without this callback,
    and the trained network refuses to run without it. For text that has no masks,
    :func:`lit_scale.factors.tokens.release_tokens` lets all tokens through again.

    Batches are dicts with ``input_ids`` (B, T) and ``positions`` (B, M), the masked positions, equally many and
    distinct in each sample. They decide how many tokens are kept.

    Args:
        before: Blocks in front that run on the masks too, a number or a fraction of all (rounded down). By default none
            (Liao et al.).
        after: Blocks for which the masks join, a number or a fraction. By default the last quarter ("a few layers"
            gather in Liao et al.; the quarter is ours).
        blocks: Dotted path of the list of blocks, needed only where it cannot be found.

    Raises:
        ValueError: At construction, in ``setup`` or with the first batch, before anything is trained, if an argument is
            out of range or the batches lack what is needed.
        RuntimeError: When the trained network runs without this callback, or its weights are loaded into a network that
            knows nothing of it.

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
        """The positions that are not masked."""
        ids, masked = self.entry(batch, "input_ids"), self.entry(batch, "positions")
        scores = torch.ones_like(ids).scatter_(1, masked, 0)
        return highest(scores, ids.shape[1] - masked.shape[1]), ids.shape[1]

    def positions(self, x: Tensor, place: int) -> Tensor | None:
        """Those of the batch; nothing runs without having been told them."""
        if self.chosen is None and self.kept == "unmasked":  # and not where the clock prices a step with all tokens
            raise RuntimeError(
                "the masked positions of this network join late, so it has to be told them: run it through a "
                "Trainer with callbacks=[MaskLater()], or call release_tokens to let all tokens run through all "
                "blocks from now on"
            )
        return super().positions(x, place)
