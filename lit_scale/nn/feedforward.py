"""The position-wise feed-forward sublayer."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them (Devlin et al. 2019, appendix A.2), applied to each position.

    Args:
        width: Channels of the residual stream.
        hidden: Channels between the two maps (four times the width in the paper).

    Example:
        >>> import torch
        >>> FeedForward(width=32, hidden=128)(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` of shape (..., C) to the same shape."""
        return self.down(F.gelu(self.up(x)))
