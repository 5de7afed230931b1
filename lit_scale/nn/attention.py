"""Multi-head self-attention and rotary positions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_scale.nn.embeddings import check_length

__all__ = ["Attention", "RotaryPositions"]


class RotaryPositions(nn.Module):
    """Rotary position encoding (Su et al. 2021, equation 34): rotates pairs of channels by position times frequency.

    Args:
        head_width: Channels of one head; must be even.
        max_length: Longest sequence, in tokens.
        num_heads: Heads for which the tables are expanded; 1 broadcasts to any number of heads, but is slower on a CPU.
        base: Base of the geometric sequence of frequencies (10,000 in the paper, section 3.3).

    Raises:
        ValueError: If ``head_width`` is odd, or a sequence is longer than ``max_length``.

    Example:
        >>> rotary = RotaryPositions(head_width=8, max_length=16)
        >>> rotary(torch.ones(2, 16, 3, 8)).shape
        torch.Size([2, 16, 3, 8])
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, max_length: int, *, num_heads: int = 1, base: float = 10_000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"rotary positions turn pairs of channels, but width / num_heads = {head_width} is odd")
        frequencies = base ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.outer(torch.arange(max_length), frequencies)[:, None].repeat(1, num_heads, 1)  # (T, H, D/2)
        # The pairs are (i, i + D/2); the minus sign of the rotation is folded into sin to save a negation a step.
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False)  # (T, H, D)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], -1), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate queries or keys ``x`` (B, T, H, D) by their ``positions`` (B, T), by default 0 to T - 1."""
        length = x.shape[1]
        check_length(length, self.cos.shape[0])
        cos, sin = self.cos[:, : x.shape[2]], self.sin[:, : x.shape[2]]  # some heads may be inactive
        if positions is None:
            cos, sin = cos[:length], sin[:length]  # (T, H, D)
        else:
            cos, sin = cos[positions], sin[positions]  # (B, T, H, D)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))  # in place: both products are new


class Attention(nn.Module):
    """Bidirectional or causal multi-head self-attention (Vaswani et al. 2017, section 3.2.2) through torch's kernels.

    Args:
        width: Channels of the residual stream.
        num_heads: Heads; ``width`` must be a multiple.
        dropout: Dropout of the attention weights.
        rotary: Position encoding of queries and keys, if any.
        causal: Whether a position attends only to itself and earlier positions.

    Raises:
        ValueError: If ``width`` is not a multiple of ``num_heads``.

    Example:
        >>> attention = Attention(width=32, num_heads=4)
        >>> attention(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    resizable = True  # it runs with fewer heads if num_heads is lowered; see lit_scale.factors.units

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        rotary: RotaryPositions | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.dropout = dropout
        self.causal = causal
        self.rotary = rotary
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Attend over ``x`` (B, T, C); ``mask`` is boolean, broadcastable to (B, H, T, T), true to attend.

        If ``x`` holds only some tokens of each sequence, ``positions`` (B, T), ascending, are their positions in it.
        """
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(2)  # each (B, T, H, D); unbinding here saves a copy of the gradients
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        if self.causal and mask is not None:  # the kernel accepts only one of the two
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        x = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None,
        )
        return self.out(x.transpose(1, 2).flatten(2))
