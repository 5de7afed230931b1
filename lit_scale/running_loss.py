"""The running loss of each token of a vocabulary: what tells the hard ones, without a forward pass of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RunningLoss", "running_loss"]

_UNSEEN = 10.0  # of a token that has not been predicted yet (Hou et al.'s code)


def running_loss(table: Tensor, sums: Tensor, counts: Tensor, beta: float) -> Tensor:
    """The moving average of each token's loss after a step: tokens that were not predicted keep theirs.

    Args:
        table: Averages before the step, (V,).
        sums: Sum of the losses of each token in this step, over all its occurrences, (V,).
        counts: Number of the occurrences, (V,).
        beta: Weight of the past.

    Example:
        >>> table, sums, counts = torch.tensor([10.0, 10.0]), torch.tensor([6.0, 0.0]), torch.tensor([3.0, 0.0])
        >>> running_loss(table, sums, counts, beta=0.5)
        tensor([ 6., 10.])
    """
    return torch.where(counts > 0, beta * table + (1 - beta) * (sums / counts.clamp(min=1)).to(table.dtype), table)


class RunningLoss:
    """Running averages of the tokens' losses, the same on all ranks.

    Args:
        size: Of the vocabulary, V.
        special_ids: Tokens whose score is infinite.
        beta: Weight of the past.
        device: Where it is kept.
        table: The averages (V,) to go on from.

    Example:
        >>> losses = RunningLoss(4, special_ids=[0], beta=0.5, device=torch.device("cpu"))
        >>> losses.note(torch.tensor([[2, -100]]), torch.tensor([[1.0, 7.0]]))
        >>> losses.table = losses.updated(ranks=1)
        >>> losses.scores(torch.tensor([[0, 1, 2]]))
        tensor([[    inf, 10.0000,  5.5000]])
    """

    def __init__(
        self, size: int, special_ids: Sequence[int], beta: float, device: torch.device, table: Tensor | None = None
    ) -> None:
        self.beta = beta
        self.table = (torch.full((size,), _UNSEEN) if table is None else table).to(device)
        self._bonus = torch.zeros_like(self.table)
        self._bonus[list(special_ids)] = math.inf
        self._seen = torch.zeros(2, size, dtype=torch.float64, device=device)  # sums and counts since the last step

    def note(self, labels: Tensor, losses: Tensor) -> None:
        """Add the losses of a batch, both of any one shape; labels below 0 do not count."""
        counted = (labels >= 0).flatten().to(self._seen.dtype)
        both = torch.stack([losses.detach().flatten().to(self._seen.dtype) * counted, counted])
        self._seen.index_add_(1, labels.clamp(min=0).flatten(), both)

    def updated(self, ranks: int) -> Tensor:
        """The averages after a step: with what all ranks have noted since the last one, which is then forgotten."""
        if ranks > 1:
            dist.all_reduce(self._seen)
        table = running_loss(self.table, self._seen[0], self._seen[1], self.beta)
        self._seen.zero_()
        return table

    def scores(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """Of each token of ``ids`` (B, T); minus infinity where ``seen`` (B, T) is 0."""
        scores = (self.table + self._bonus)[ids]
        return scores if seen is None else scores.masked_fill(seen == 0, -math.inf)
