"""Blocks: find the repeated blocks of any network and choose which of them run.

The network is never rebuilt: the list that holds the blocks is *gated*, so that iterating over it, indexing, slicing
and ``len`` see only the active blocks. Parameter names and shapes stay as they are, a skipped block has no gradient,
and the gated network computes what a network of only those blocks would. Which blocks are active travels inside the
``state_dict``, under ``<path of the list>._extra_state``, while some are switched off; with all of them active the
``state_dict`` is the plain network's. So a checkpoint from the middle of a run either evaluates at the depth it was
trained to, or is refused by torch's own strict loading; it is never read as something it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["BlockList", "BlockStack", "find_blocks"]

_KEY = "_extra_state"  # torch's own name for state of a module that is neither parameter nor buffer


class _Gate(nn.Module):
    """Mixin over a ModuleList or Sequential that shows only the active ones of its children."""

    _active: tuple[int, ...]

    def _shown(self) -> list[nn.Module]:
        children = list(self._modules.values())
        return cast(list[nn.Module], [children[i] for i in self._active])

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._shown())

    def __len__(self) -> int:
        return len(self._active)

    def __getitem__(self, index: Any) -> Any:
        return self._shown()[index]

    def __reduce__(self) -> Any:  # the class of a foreign list is made at run time, so pickle needs its recipe
        return _new_gated, (type(self)._plain,), self.__dict__  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if len(self._active) < len(self._modules):
            destination[prefix + _KEY] = torch.tensor(self._active)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        active = state_dict.pop(prefix + _KEY, None)
        self._active = tuple(range(len(self._modules))) if active is None else tuple(active.tolist())
        super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def _gated(plain: type[nn.Module]) -> type[nn.Module]:
    return plain if issubclass(plain, _Gate) else type(f"Gated{plain.__name__}", (_Gate, plain), {"_plain": plain})


def _new_gated(plain: type[nn.Module]) -> nn.Module:
    gated = _gated(plain)
    return gated.__new__(gated)


class BlockList(_Gate, nn.ModuleList):
    """A ``ModuleList`` that can be gated from the start, so that ``load_from_checkpoint`` alone restores its depth."""

    def __init__(self, modules: Iterable[nn.Module] | None = None) -> None:
        self._active = ()
        super().__init__(modules)
        self._active = tuple(range(len(self._modules)))


BlockList._plain = BlockList  # type: ignore[attr-defined]


@dataclass
class BlockStack:
    """The repeated blocks of a network, all of them, in order; some of them active.

    Attributes:
        path: Dotted path of the list inside the network.
        container: The gated list.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), num_layers=4)
        >>> stack = find_blocks(encoder)
        >>> stack.activate([0, 1])
        >>> stack, len(encoder.layers)
        (BlockStack(layers: 2 of 4 TransformerEncoderLayer active), 2)
    """

    path: str
    container: nn.Module

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, whether active or not."""
        return cast(list[nn.Module], list(self.container._modules.values()))

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the blocks that run, ascending."""
        return cast(tuple[int, ...], getattr(self.container, "_active", tuple(range(len(self)))))

    def __len__(self) -> int:
        return len(self.container._modules)

    def activate(self, indices: Iterable[int]) -> None:
        """Let only these blocks run; parameters of the others keep their values and get no gradient.

        Args:
            indices: Indices into all blocks, at least one.

        Raises:
            ValueError: If there is none, or one that the network does not have.
        """
        chosen = tuple(sorted(set(indices)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(self):
            raise ValueError(f"cannot activate blocks {chosen} of {self.path!r}, which has {len(self)}")
        self.container.__class__ = _gated(type(self.container))
        self.container._active = chosen  # type: ignore[assignment]

    def release(self) -> None:
        """Give a foreign list its own class back if all of its blocks are active; otherwise leave it gated."""
        plain = getattr(type(self.container), "_plain", None)
        if plain is not None and len(self.active) == len(self):
            self.container.__class__ = plain

    def copy(self, source: int, target: int) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Copy parameters and buffers from one block to another.

        Returns:
            The pairs (source, target) of parameters, for whoever keeps more state per parameter.
        """
        one, other = self.blocks[source], self.blocks[target]
        with torch.no_grad():
            for (_, a), (_, b) in zip(_tensors(one), _tensors(other), strict=True):
                b.copy_(a)
        return list(zip(one.parameters(), other.parameters(), strict=True))

    def __repr__(self) -> str:
        kind = type(self.blocks[0]).__name__
        return f"BlockStack({self.path}: {len(self.active)} of {len(self)} {kind} active)"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _is_stack(module: nn.Module) -> bool:
    """At least two children of one class, each with parts of its own and the same parameters in name and shape."""
    blocks = list(module._modules.values())
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(blocks) < 2 or None in blocks:
        return False
    if len({type(block) for block in blocks}) > 1 or not any(True for _ in blocks[0].children()):  # type: ignore[union-attr]
        return False
    shapes = [[(name, p.shape) for name, p in block.named_parameters()] for block in blocks]  # type: ignore[union-attr]
    return bool(shapes[0]) and all(shape == shapes[0] for shape in shapes)


def _candidates(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Stacks inside ``module``, outermost only: experts inside a block are part of the block."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if _is_stack(child):
            yield below, child
        else:
            yield from _candidates(child, below)


def _describe(candidates: Sequence[tuple[str, nn.Module]]) -> str:
    return ", ".join(
        f"{path!r} ({len(m._modules)} x {type(next(iter(m.children()))).__name__})" for path, m in candidates
    )


def find_blocks(model: nn.Module, path: str | None = None) -> BlockStack:
    """Find the one list of repeated blocks in a network, or take the one at ``path``.

    A stack is a ``ModuleList`` or ``Sequential`` of at least two children of one class whose parameters agree in name
    and shape and that have parts of their own; stacks inside a stack's blocks do not count.

    Args:
        model: Any network; a LightningModule around one will do.
        path: Dotted path of the list, needed when the network has none or several (T5, Swin).

    Returns:
        The stack, gated, with all blocks active unless some had been switched off before.

    Raises:
        ValueError: If ``path`` leads nowhere or not to blocks that are alike, or if without it none or several fit;
            the message names the candidates.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32)
        >>> find_blocks(vit)
        BlockStack(blocks: 12 of 12 Block active)
    """
    candidates = list(_candidates(model))
    listing = f"; candidates: {_describe(candidates)}" if candidates else ""
    if path is not None:
        try:
            container = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"blocks={path!r}: {type(model).__name__} has no such part{listing}") from None
        if not _is_stack(container):
            raise ValueError(
                f"blocks={path!r} is a {type(container).__name__}, not a ModuleList or Sequential of at least two "
                f"blocks of one class with equal parameters{listing}"
            )
        candidates = [(path, container)]
    if not candidates:
        raise ValueError(
            f"found no repeated blocks in {type(model).__name__}: no ModuleList or Sequential of at least two blocks "
            "of one class with equal parameters; keep the blocks in a ModuleList, or name the list with blocks='...'"
        )
    if len(candidates) > 1:
        raise ValueError(
            f"found several lists of blocks in {type(model).__name__}; choose one with blocks='...'{listing}"
        )
    stack = BlockStack(*candidates[0])
    stack.activate(stack.active)
    return stack
