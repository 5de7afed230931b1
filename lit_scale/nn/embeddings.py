"""Token embeddings with learned or rotary positions."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

__all__ = ["Embedding", "Positions"]

Positions = Literal["learned", "rotary"]


def check_length(length: int, max_length: int) -> None:
    """Refuse a sequence with more tokens than ``max_length``."""
    if length > max_length:
        raise ValueError(
            f"a sequence of {length} tokens is longer than max_length={max_length}; cut it, or build the model with "
            f"max_length={length} or more"
        )


class Embedding(nn.Module):
    """Token embedding plus, if positions are learned, position embedding (Devlin et al. 2019, section 3).

    Args:
        vocab_size: Number of token ids.
        width: Channels of the residual stream.
        max_length: Longest sequence, in tokens.
        positions: ``"learned"`` adds an embedding per position; ``"rotary"`` leaves positions to the attention.
        dropout: Dropout of the sum.

    Raises:
        ValueError: If ``positions`` is neither of the two, or a sequence is longer than ``max_length``.

    Example:
        >>> Embedding(vocab_size=10, width=8, max_length=4)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, vocab_size: int, width: int, max_length: int, *, positions: Positions = "learned", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if positions not in get_args(Positions):
            raise ValueError(f"positions={positions!r}: choose 'learned' or 'rotary'")
        self.max_length = max_length
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(max_length, width)) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout) if dropout else None
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed ``input_ids`` (B, T) as (B, T, C)."""
        check_length(input_ids.shape[1], self.max_length)
        x = self.tokens(input_ids)
        if self.positions is not None:
            x = x + self.positions[: input_ids.shape[1]]
        return x if self.dropout is None else self.dropout(x)
