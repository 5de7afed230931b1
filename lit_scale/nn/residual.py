"""Residual schemes: how the output of a sublayer is added to the residual stream.

A scheme is built once per sublayer, from the width and the dropout rate, and owns the parameters that it needs. It is
called with the stream and with the sublayer as a function. A new scheme (DeepNorm, Sub-LN, ReZero...) is a subclass.
"""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["PostNorm", "PreNorm", "Residual"]


class Residual(nn.Module):
    """A residual connection around one sublayer.

    Args:
        width: Channels of the residual stream.
        dropout: Dropout of the sublayer's output, before it is added.
    """

    #: Whether the stack needs one more normalisation after its last block.
    needs_final_norm: bool = False

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the output of ``sublayer`` to the stream ``x`` (B, T, C), and return the new stream."""
        raise TypeError(
            f"{type(self).__name__} does not say how the sublayer joins the stream; use PreNorm or PostNorm"
        )

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to the sublayer's output, if there is any."""
        return x if self.dropout is None else self.dropout(x)


class PreNorm(Residual):
    """x + f(LN(x)): the default; it trains deep stacks stably.

    Example:
        >>> import torch
        >>> PreNorm(width=8)(torch.zeros(1, 2, 8), lambda x: x + 1).unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """

    needs_final_norm = True

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Normalise, apply, add."""
        return x + self.drop(sublayer(self.norm(x)))


class PostNorm(Residual):
    """LN(x + f(x)): the wiring of Vaswani et al. 2017 and Devlin et al. 2019."""

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply, add, normalise."""
        return self.norm(x + self.drop(sublayer(x)))
