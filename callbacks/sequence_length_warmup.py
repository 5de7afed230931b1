"""Sequence-length warm-up: short sequences first, full ones at the end (Li et al., NeurIPS 2022, arXiv 2108.06084).

Attention over T tokens costs T^2, and long sequences are what makes the gradients of early training vary most, so that
short ones allow larger rates and batches. The paper truncates and throws the rest away; here a sequence is cut into
pieces, so that no token is lost and every step has as many as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lit_scale.factors.sizes import SizeByStages

__all__ = ["SequenceLengthWarmup"]


class SequenceLengthWarmup(SizeByStages):
    """Trains on short sequences first, with tokens per step kept constant.

    With :class:`~lit_scale.datamodules.TextDataModule` sequences are cut before they are masked. Batches of any other
    data module are cut on the device: every tensor whose second axis is as long as the first tensor's (input ids,
    labels, masks) becomes (B T / L, L). Validation always sees full sequences.

    Args:
        stages: (start, length) pairs; starts are fractions of the run, ascending from 0 and below 1; lengths ascend to
            full length and divide it, as a fraction of it (float) or in tokens (int).

    Raises:
        ValueError: At construction or before the first step, if the stages do not ascend to full length, or a length
            does not divide it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> warmup = SequenceLengthWarmup(stages=[(0.0, 0.125), (0.2, 0.5), (0.6, 1.0)])
        >>> trainer = Trainer(max_steps=1_000, callbacks=[warmup], logger=False)
    """

    def __init__(
        self, stages: Sequence[tuple[float, int | float]] = ((0.0, 0.125), (0.2, 0.25), (0.4, 0.5), (0.6, 1.0))
    ) -> None:
        super().__init__(stages)

    def resolve(self, size: int | float, full: int) -> int:
        """Tokens of a sequence."""
        length = size if isinstance(size, int) else size * full
        if length < 1 or full % length:
            divisors = ", ".join(str(n) for n in range(1, full + 1) if full % n == 0)
            raise ValueError(
                f"stages={self.stages}: {size} is {length:g} of {full} tokens, and sequences are cut into equal "
                f"pieces; use one of {divisors}"
            )
        return int(length)

    def size_of(self, batch: Any) -> int:
        """Tokens of a sequence of the batch."""
        for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
            if isinstance(leaf, Tensor) and leaf.ndim >= 2:
                return int(leaf.shape[1])
        raise ValueError("the batch holds no sequences: no tensor of two axes (B, T)")

    def shrink(self, batch: Any, size: int) -> Any:
        """The batch with its sequences cut."""
        full = self._sizes[-1]

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                return leaf
            if leaf.ndim == 1:  # something of each sample
                return leaf.repeat_interleave(full // size, 0)
            if leaf.shape[1] != full:
                raise ValueError(
                    f"the batch holds a tensor of shape {tuple(leaf.shape)}, which cannot be cut along with sequences "
                    f"of {full} tokens; let TextDataModule make the batches"
                )
            return leaf.reshape(-1, size, *leaf.shape[2:])

        return tree_map(cut, dict(batch) if isinstance(batch, Mapping) else batch)
