"""The Transformer encoder: a block with a configurable residual scheme, and a stack of such blocks."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lit_scale.factors.blocks import BlockList
from lit_scale.nn.attention import Attention, RotaryPositions
from lit_scale.nn.feedforward import FeedForward
from lit_scale.nn.residual import PreNorm, Residual

__all__ = ["Encoder", "EncoderBlock", "normal_init", "residual_init"]

Initialisation = Callable[[nn.Module, int], None]


def normal_init(module: nn.Module, depth: int, *, std: float = 0.02) -> None:
    """Draw weights from N(0, std^2) and set biases to zero (Devlin et al. 2019 and Radford et al. 2019).

    Norms are not touched: torch initialises them as the identity.

    Args:
        module: A block, or any part of a model; its whole subtree is initialised.
        depth: Number of blocks of the stack; unused here, but part of the signature of initialisations.
        std: Standard deviation (0.02 in the reference code of both papers).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)


def residual_init(module: nn.Module, depth: int, *, std: float = 0.02) -> None:
    """As :func:`normal_init`, but the last linear map of each sublayer is smaller by 1 / sqrt(2 depth).

    The residual stream is a sum over two sublayers per block. With this factor, the variance of the sum is that of a
    single sublayer (Radford et al. 2019, section 2.3).

    Args:
        module: A block; its whole subtree is initialised.
        depth: Number of blocks of the stack.
        std: Standard deviation of all other weights (0.02 in the reference code).

    Example:
        >>> block = EncoderBlock(width=256, num_heads=4)
        >>> residual_init(block, depth=8, std=0.04)
        >>> round(block.attention.out.weight.std().item(), 3), round(block.attention.qkv.weight.std().item(), 2)
        (0.01, 0.04)
    """
    normal_init(module, depth, std=std)
    for part in module.modules():
        last = part.out if isinstance(part, Attention) else part.down if isinstance(part, FeedForward) else None
        if last is not None:
            nn.init.normal_(last.weight, std=std / (2 * depth) ** 0.5)


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward, each added to the residual stream by a residual scheme.

    Args:
        width: Channels of the residual stream.
        num_heads: Attention heads.
        hidden: Channels inside the feed-forward sublayer; ``None`` is four times the width.
        dropout: Dropout of attention weights and of both sublayers' outputs.
        rotary: Position encoding of queries and keys, if any; shared by all blocks.
        causal: Whether a position attends only to itself and earlier positions.
        residual: Class of the residual scheme.

    Example:
        >>> import torch
        >>> EncoderBlock(width=32, num_heads=4)(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        hidden: int | None = None,
        dropout: float = 0.0,
        rotary: RotaryPositions | None = None,
        causal: bool = False,
        residual: type[Residual] = PreNorm,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, dropout=dropout, rotary=rotary, causal=causal)
        self.feedforward = FeedForward(width, hidden or 4 * width)
        self.attention_residual = residual(width, dropout)
        self.feedforward_residual = residual(width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Map ``x`` (B, T, C) to the same shape; ``mask`` and ``positions`` as in :meth:`Attention.forward`."""
        x = self.attention_residual(x, partial(self.attention, mask=mask, positions=positions))
        return self.feedforward_residual(x, self.feedforward)


class Encoder(nn.Module):
    """A stack of encoder blocks; some may be inactive (:class:`~lit_scale.factors.blocks.BlockList`).

    Args:
        depth: Number of blocks.
        width: Channels of the residual stream.
        num_heads: Attention heads.
        hidden: Channels inside the feed-forward sublayer; ``None`` is four times the width.
        max_length: Longest sequence, in tokens; used for rotary positions only.
        rotary: Whether queries and keys have rotary positions.
        dropout: Dropout inside the blocks.
        causal: Whether a position attends only to itself and earlier positions.
        residual: Class of the residual scheme.
        init: Function that initialises a block in place, called with each block and the depth.

    Raises:
        ValueError: If ``depth`` is below 1, ``width`` is not a multiple of ``num_heads``, or with ``rotary`` the width
            of a head is odd.

    Example:
        >>> import torch
        >>> encoder = Encoder(depth=2, width=32, num_heads=4, max_length=16)
        >>> encoder(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        *,
        hidden: int | None = None,
        max_length: int = 512,
        rotary: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        residual: type[Residual] = PreNorm,
        init: Initialisation = normal_init,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth}: an encoder needs at least one block")
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        positions = RotaryPositions(width // num_heads, max_length, num_heads=num_heads) if rotary else None
        block = partial(
            EncoderBlock,
            width,
            num_heads,
            hidden=hidden,
            dropout=dropout,
            rotary=positions,
            causal=causal,
            residual=residual,
        )
        self.blocks = BlockList([block() for _ in range(depth)])
        self.norm = nn.LayerNorm(width) if residual.needs_final_norm else nn.Identity()
        for one in self.blocks:
            init(one, depth)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the active blocks and the final norm over ``x`` (B, T, C)."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)
