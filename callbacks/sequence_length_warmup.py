"""Sequence-length warm-up: short sequences first, full ones at the end (Li et al., NeurIPS 2022, arXiv 2108.06084).

    a batch (B, T) becomes (B T / L, L); the length L grows to T by stages of the run

The cost of attention is quadratic in the length. The paper also finds that long sequences cause much of the gradient
variance early in training, so that short ones allow larger learning rates and batches. The paper truncates sequences
and discards the rest; here they are cut into pieces, so that every step has the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lit_scale.factors.sizes import SizeByStages

__all__ = ["SequenceLengthWarmup"]


class SequenceLengthWarmup(SizeByStages):
    """Trains on short sequences first, with a constant number of tokens per step.

    With :class:`~lit_scale.datamodules.TextDataModule` sequences are cut before they are masked. Batches of other data
    modules are cut on the device: every tensor (B, T, ...), such as ids, labels and masks, becomes (B T / L, L, ...),
    and tensors (B,) are repeated for each piece. Validation uses full sequences.

    Args:
        stages: (start, length) pairs; starts are fractions of the run, ascending from 0 and below 1; lengths ascend to
            full length and divide it, as a fraction of it (float) or in tokens (int). The default is ours: an eighth,
            doubled at 0.2, 0.4 and 0.6.

    Raises:
        ValueError: At construction or before the first step, if the stages do not ascend to full length or a length
            does not divide it; at the first short batch, if a tensor has another second axis.

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
        """Length of the sequences of a stage, in tokens."""
        length = size if isinstance(size, int) else size * full
        if length < 1 or full % length:
            divisors = ", ".join(str(n) for n in range(1, full + 1) if full % n == 0)
            raise ValueError(
                f"stages={self.stages}: {size} is {length:g} of {full} tokens, and sequences are cut into equal "
                f"pieces; use one of {divisors}"
            )
        return int(length)

    def size_of(self, batch: Any) -> int:
        """Length of the batch's sequences, in tokens."""
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
            if leaf.ndim == 1:  # one value per sample
                return leaf.repeat_interleave(full // size, 0)
            if leaf.shape[1] != full:
                raise ValueError(
                    f"the batch holds a tensor of shape {tuple(leaf.shape)}, which cannot be cut along with sequences "
                    f"of {full} tokens; let TextDataModule make the batches"
                )
            return leaf.reshape(-1, size, *leaf.shape[2:])

        return tree_map(cut, dict(batch) if isinstance(batch, Mapping) else batch)
