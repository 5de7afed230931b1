"""Tokens: let a span of a network's blocks run on some positions of the sequence only.

    x -> block ... block -> x[kept] -> block ... block -> x with x[kept] replaced -> block ... block

The network is not rebuilt: the blocks of the span get a forward that takes the kept positions out of their arguments,
and the last of them puts the results back into the full sequence. Positions are told by their place in an argument's
shape, never by size alone, since a head may be as wide as a sequence is long: of the first argument (B, T, C) and of
other 2- and 3-dimensional tensors dimension 1, of 4-dimensional masks the last two; in tuples and keyword arguments
too. Blocks that number positions by themselves take an argument ``positions`` (B, K) and are told the kept ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_scale.factors.blocks import BlockStack

__all__ = [
    "TokenSpan",
    "highest",
    "late_span",
    "mark_late",
    "random_scores",
    "release_tokens",
]

Choose = Callable[[Tensor], Tensor | None]

# Read in torch's "Unexpected key(s)", where a network that knows nothing of it is given the weights of one whose masked
# positions join late. Only the first three words are the format; the rest may be worded anew.
_MARK = "masks join late"
_KEY = f"{_MARK}: evaluate with the technique that was trained with, see lit_scale's docs/mask_later"
_FOREIGN_SEQUENCES = ("encoder_", "memory", "cross_")  # arguments that hold another sequence than the block's own


# -- choosing ---------------------------------------------------------------------------------------------------------


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the highest scores, in ascending order; of equal ones the earlier.

    Args:
        scores: (B, T).
        count: How many of each row, K.

    Returns:
        (B, K), int64.

    Example:
        >>> highest(torch.tensor([[3.0, 1.0, 5.0, 3.0]]), 2)
        tensor([[0, 2]])
    """
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash (Wellons' lowbias32): each bit depends on all bits of the input."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_scores(seed: Tensor, size: int, length: int) -> Tensor:
    """Scores whose order is a random permutation of the positions for each sample: a function of the seed alone.

    All of it is integer arithmetic, so it is the same on every device, compiled or not, and no generator moves.

    Args:
        seed: A scalar in [0, 2**32), int64, on the device of the result.
        size: Samples, B.
        length: Positions, T, below 2**20.

    Returns:
        (B, T), int64, no two equal in a row.

    Example:
        >>> highest(random_scores(torch.tensor(7), 2, 100), 4)
        tensor([[15, 32, 59, 60],
                [ 1, 64, 65, 89]])
    """
    row = _mix(_mix(seed + 1) + torch.arange(size, device=seed.device)[:, None])  # (B, 1)
    place = torch.arange(length, device=seed.device)
    return (_mix(_mix(place + 1) ^ row) << 20) + place


# -- taking and putting back ------------------------------------------------------------------------------------------


def _rows(kept: Tensor, length: int) -> Tensor:
    """Indices of kept positions (B, K) into a sequence whose first two dimensions are one  # (B * K,)."""
    return (kept + torch.arange(kept.shape[0], device=kept.device)[:, None] * length).flatten()


def _take_sequence(x: Tensor, kept: Tensor) -> Tensor:
    """Kept positions of ``x`` (B or 1, T, ...)."""
    if x.shape[0] == 1:
        return x[0].index_select(0, kept.flatten()).unflatten(0, kept.shape)
    return x.flatten(0, 1).index_select(0, _rows(kept, x.shape[1])).unflatten(0, kept.shape)


def _take_mask(mask: Tensor, kept: Tensor, length: int) -> Tensor:
    """Kept rows and columns of ``mask`` (B or 1, ..., T or 1, T or 1)."""
    index = kept.view(kept.shape[0], *[1] * (mask.ndim - 2), kept.shape[1])  # (B, ..., 1, K)
    mask = mask.expand(kept.shape[0], *mask.shape[1:])
    if mask.shape[-1] == length:
        mask = mask.gather(-1, index.expand(*mask.shape[:-1], -1))
    if mask.shape[-2] == length:
        mask = mask.gather(-2, index.mT.expand(*mask.shape[:-2], -1, mask.shape[-1]))
    return mask


def _take(value: Any, kept: Tensor, length: int) -> Any:
    """What a block gets in place of an argument other than the stream."""
    if isinstance(value, tuple | list):
        return type(value)([_take(item, kept, length) for item in value])
    if isinstance(value, dict):
        return {name: _take(item, kept, length) for name, item in value.items()}
    if not isinstance(value, Tensor) or value.ndim not in (2, 3, 4):
        return value
    if value.ndim == 4 or (value.ndim == 3 and value.dtype == torch.bool and value.shape[1] == value.shape[2]):
        return _take_mask(value, kept, length)
    if value.shape[1] != length:
        return value
    if value.shape[0] not in (1, kept.shape[0]):
        raise ValueError(
            f"a block gets a tensor {tuple(value.shape)}, of which no samples' positions can be taken; give what is "
            "the same for all samples as (1, T, ...), and masks of queries and keys as (B or 1, 1, T, T)"
        )
    return _take_sequence(value, kept)


class TokenSpan:
    """Consecutive blocks of a network that run on chosen positions only; the others pass them by unchanged.

    It lasts until :meth:`remove`. Blocks compiled one by one are left compiled: taking and putting back happen around
    them.

    Args:
        stack: The blocks of the network.
        indices: Which of them form the span, ascending.
        choose: Called with the sequence (B, T, C) that enters the span; returns the kept positions (B, K), ascending,
            or ``None`` where all are kept.

    Raises:
        ValueError: If the span is empty or has blocks that the network does not have, or a block puts time before the
            batch; when it runs, if what enters is not (B, T, C), or an argument's positions cannot be told.

    Example:
        >>> from lit_scale.factors.blocks import find_blocks
        >>> from lit_scale.nn import Encoder
        >>> encoder = Encoder(depth=4, width=8, num_heads=2)
        >>> span = TokenSpan(find_blocks(encoder), [1, 2], lambda x: torch.tensor([[0, 3]]))
        >>> encoder(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
        >>> span.remove()
    """

    def __init__(self, stack: BlockStack, indices: Sequence[int], choose: Choose) -> None:
        if not indices or indices[0] < 0 or indices[-1] >= len(stack):
            raise ValueError(
                f"a span of blocks {tuple(indices)} does not fit into {stack.path!r}, which has {len(stack)}"
            )
        blocks = [stack.blocks[index] for index in indices]
        for block in blocks:
            if any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in block.modules()):
                raise ValueError(
                    f"the blocks of {stack.path!r} take (tokens, batch, channels); build them with batch_first=True"
                )
        self.choose = choose
        self.kept: Tensor | None = None  # (B, K), of the forward pass at work
        self.full: Tensor | None = None  # (B, T, C), what entered
        self._overrides: list[tuple[nn.Module, str, Any, Any]] = []
        self._spans: list[TokenSpan] = stack.container.__dict__.setdefault("_token_spans", [])
        self._spans.append(self)
        for place, block in enumerate(blocks):
            self._override(block, place == 0, place == len(blocks) - 1)

    def _override(self, block: nn.Module, first: bool, last: bool) -> None:
        name = "forward" if block._compiled_call_impl is None else "_compiled_call_impl"
        own, inner = block.__dict__.get(name), getattr(block, name)
        parameters = list(inspect.signature(block.forward).parameters)
        foreign = [p for p in parameters if p.startswith(_FOREIGN_SEQUENCES)]
        leave: frozenset[Any] = frozenset([*foreign, *map(parameters.index, foreign)])  # by name and by place
        place = parameters.index("positions") if "positions" in parameters else None
        override = partial(_run, self, first, last, leave, place, inner)
        block.__dict__[name] = override
        self._overrides.append((block, name, own, override))

    def remove(self) -> None:
        """Give the blocks their own forward back."""
        for block, name, own, override in self._overrides:
            if block.__dict__.get(name) is not override:
                continue  # somebody has wrapped it since; it lets everything pass
            if own is None:
                del block.__dict__[name]
            else:
                block.__dict__[name] = own
        self._overrides = []
        self.choose = _everything
        self.clear()
        if self in self._spans:
            self._spans.remove(self)

    def begin(self, x: Tensor) -> None:
        """Choose the positions of the sequence that enters."""
        if not isinstance(x, Tensor) or x.ndim != 3:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"tokens can be dropped from (batch, tokens, channels), but the blocks get {shape}")
        self.kept, self.full = self.choose(x), x

    def clear(self) -> None:
        """Let go of the sequence of the last pass; a backward pass that recomputes blocks needs it."""
        self.kept = self.full = None

    def put_back(self, x: Tensor) -> Tensor:
        """The full sequence with the results ``x`` (B, K, C) in it."""
        assert self.full is not None
        assert self.kept is not None
        flat = self.full.flatten(0, 1)
        rows = _rows(self.kept, self.full.shape[1])
        return flat.index_copy(0, rows, x.flatten(0, 1).to(flat.dtype)).view_as(self.full)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the network starts between two passes: what is in flight belongs to a graph and cannot be copied
        return self.__dict__ | {"kept": None, "full": None}


def _everything(x: Tensor) -> None:
    """The choice of a span that has been removed."""


def _run(
    span: TokenSpan,
    first: bool,
    last: bool,
    leave: frozenset[Any],
    place: int | None,
    inner: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Forward of a block of a span."""
    names = list(kwargs)
    if first:
        span.begin(args[0] if args else kwargs[names[0]])
    kept, full = span.kept, span.full
    if kept is None or full is None:
        return inner(*args, **kwargs)
    length = full.shape[1]
    values = [v if i in leave else _take(v, kept, length) for i, v in enumerate(args) if i or not args]
    named = {k: v if k in leave else _take(v, kept, length) for k, v in kwargs.items() if args or k != names[0]}
    stream = args[0] if args else kwargs[names[0]]
    stream = _take_sequence(stream, kept) if first else stream
    if place is not None and len(args) <= place and named.get("positions") is None:
        named["positions"] = kept
    out = inner(stream, *values, **named) if args else inner(**{names[0]: stream}, **named)
    if not last:
        return out
    return (span.put_back(out[0]), *out[1:]) if isinstance(out, tuple) else span.put_back(out)


# -- masks that join late ---------------------------------------------------------------------------------------------


def mark_late(stack: BlockStack, span: tuple[int, int] | None) -> None:
    """Let the ``state_dict`` say that masked positions pass a span of blocks by, or with ``None`` no longer say it.

    Such a network is another one: evaluated with its masks in all blocks, its loss is far off. With the mark, strict
    loading into a network that knows nothing of it fails, and names the reason.

    Args:
        stack: The blocks of the network.
        span: First block of the span, and the one behind its last.
    """
    for handle in stack.container.__dict__.pop("_late_hooks", ()):
        handle.remove()
    stack.container.__dict__.pop("_late_span", None)
    if span is not None:
        hooks = (
            stack.container.register_state_dict_post_hook(_save_mark),
            stack.container.register_load_state_dict_pre_hook(_load_mark),
        )
        stack.container.__dict__.update(_late_span=span, _late_hooks=hooks)


def late_span(stack: BlockStack) -> tuple[int, int] | None:
    """The span that masked positions of this network pass by, if it is marked."""
    return stack.container.__dict__.get("_late_span")


def _save_mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict[prefix + _KEY] = torch.tensor(module._late_span)


def _load_mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + _MARK)]:
        span = tuple(state_dict.pop(key).tolist())
        if span != module._late_span:
            errors = rest[-1]
            errors.append(f"masks pass blocks {span} of {prefix[:-1]!r} by, but here they pass {module._late_span}")


def release_tokens(stack: BlockStack) -> None:
    """Take all spans and marks off a network: from now on every token runs through every block.

    Right for a network whose masks joined late when it goes on to text that has none, as in fine-tuning.

    Args:
        stack: The blocks of the network, from :func:`lit_scale.factors.blocks.find_blocks`.
    """
    for span in list(stack.container.__dict__.get("_token_spans", ())):
        span.remove()
    mark_late(stack, None)
