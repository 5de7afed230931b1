"""Tokens: run a span of a network's blocks on some positions of the sequence only.

    x -> block ... block -> x[kept] -> block ... block -> x with x[kept] replaced -> block ... block

The network is not rebuilt. The blocks of the span get a forward that selects the kept positions of their arguments, and
the last block puts the results back into the full sequence.

Which dimension of an argument holds the positions follows from its number of dimensions, never from sizes alone, since
a head can be as wide as a sequence is long. It is dimension 1 of the first argument (B, T, C) and of other 2- and
3-dimensional tensors, and the last two dimensions of 4-dimensional masks and of boolean masks (B, T, T). Tuples, lists,
dicts and keyword arguments are searched too. A block that computes position indices itself must take an argument
``positions`` (B, K), through which it gets the kept positions.
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

# Shown in torch's "Unexpected key(s)" when a plain network loads the weights of one whose masked positions join late.
# Only the first three words are part of the format; the rest may change.
_MARK = "masks join late"
_KEY = f"{_MARK}: evaluate with the technique that was trained with, see lit_scale's docs/mask_later"
_FOREIGN_SEQUENCES = ("encoder_", "memory", "cross_")  # prefixes of arguments that hold another sequence, of an encoder


# -- choosing ---------------------------------------------------------------------------------------------------------


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the highest scores, in ascending order; among equal scores the earlier positions are taken.

    Args:
        scores: Scores, (B, T).
        count: Number of positions per row, K.

    Returns:
        Positions, (B, K), int64.

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
    """Scores that order the positions of each sample at random, as a function of the seed only.

    They are computed with integer arithmetic, so they are the same on every device, compiled or not, and no random
    generator is used.

    Args:
        seed: A scalar in [0, 2**32), int64, on the device of the result.
        size: Number of samples, B.
        length: Number of positions, T, below 2**20.

    Returns:
        Scores, (B, T), int64, all different within a row.

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
    """Indices (B K,) of kept positions (B, K) into a sequence that is flattened to (B T, ...)."""
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
    """The kept positions of an argument of a block, which is not the main sequence."""
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
            f"a block gets a tensor {tuple(value.shape)}, whose first axis is neither 1 nor the batch; give tensors "
            "for all samples as (1, T, ...), and masks of queries and keys as (B or 1, 1, T, T)"
        )
    return _take_sequence(value, kept)


class TokenSpan:
    """Consecutive blocks of a network that run on chosen positions only; other positions skip them unchanged.

    The span is active until :meth:`remove`. Blocks that were compiled one by one stay compiled: positions are selected
    and put back outside of them.

    Args:
        stack: The blocks of the network.
        indices: Indices of the blocks that form the span, ascending.
        choose: Called with the sequence (B, T, C) that enters the span; returns the kept positions (B, K), ascending,
            or ``None`` to keep all.

    Raises:
        ValueError: If the span is empty or names blocks that the network does not have, or if a block expects
            (T, B, C). When the span runs, if its input is not (B, T, C), or if the positions of an argument cannot be
            selected.

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
        self.kept: Tensor | None = None  # (B, K), positions that the current forward pass keeps
        self.full: Tensor | None = None  # (B, T, C), the sequence that entered the span
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
        """Restore the blocks' own forward."""
        for block, name, own, override in self._overrides:
            if block.__dict__.get(name) is not override:
                continue  # wrapped again since; without a choice it passes everything through
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
        """Choose positions of the sequence that enters the span."""
        if not isinstance(x, Tensor) or x.ndim != 3:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"tokens can be dropped from (batch, tokens, channels), but the blocks get {shape}")
        self.kept, self.full = self.choose(x), x

    def clear(self) -> None:
        """Release the sequence of the last pass, which a backward pass that recomputes blocks needs until then."""
        self.kept = self.full = None

    def put_back(self, x: Tensor) -> Tensor:
        """The full sequence with the results ``x`` (B, K, C) in it."""
        assert self.full is not None
        assert self.kept is not None
        flat = self.full.flatten(0, 1)
        rows = _rows(self.kept, self.full.shape[1])
        return flat.index_copy(0, rows, x.flatten(0, 1).to(flat.dtype)).view_as(self.full)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the network starts without a sequence: tensors of a pass belong to its graph and cannot be copied
        return self.__dict__ | {"kept": None, "full": None}


def _everything(x: Tensor) -> None:
    """Keep all positions: the choice of a removed span."""


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
    """Forward of a block in a span.

    Args:
        span: The span.
        first: Whether it is the first block of the span.
        last: Whether it is the last block of the span.
        leave: Indices and names of arguments that are passed unchanged.
        place: Index of the argument ``positions``; None if the block has none.
        inner: The block's own forward.
        *args: Arguments of the block.
        **kwargs: Keyword arguments of the block.
    """
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
    """Mark in the ``state_dict`` that masked positions skip a span of blocks.

    A network that was trained this way has a far higher loss if masked positions run through all blocks. With the mark,
    strict loading into a plain network fails, with an error that names the reason.

    Args:
        stack: The blocks of the network.
        span: First block of the span, and the one after its last; None removes the mark.
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
    """The span that masked positions of this network skip, if it is marked."""
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
    """Remove all spans and marks from a network, so that every token runs through every block.

    Use it for a network that was trained with :class:`MaskLater` before training on text without masks, as in
    fine-tuning.

    Args:
        stack: The blocks of the network, from :func:`lit_scale.factors.blocks.find_blocks`.
    """
    for span in list(stack.container.__dict__.get("_token_spans", ())):
        span.remove()
    mark_late(stack, None)
