"""Blocks: find the repeated blocks of any network and choose which of them run.

The network is not rebuilt. The list that holds the blocks is *gated*: iterating over it, indexing, slicing and ``len``
see only the active blocks. Names and shapes of parameters do not change, an inactive block gets no gradient, and the
gated network computes the same as a network of the active blocks only.

While some blocks are inactive, the ``state_dict`` has an additional key below the path of the list that names the
active ones. With all blocks active it is the ``state_dict`` of the plain network. So a checkpoint from the middle of a
run is either evaluated at the depth it was trained to, or refused by torch's strict loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_scale.wrapping import replace

__all__ = ["BlockList", "BlockStack", "block_lists", "count_blocks", "find_blocks"]

# Shown in torch's "Unexpected key(s)" when a plain network loads the state_dict of a partly active one.
# Only the first two words are part of the format; the rest may change.
_MARK = "active blocks"
_KEY = f"{_MARK}: resume with the technique that chose them, or call lit_scale's find_blocks on the model first"


class _Gate(nn.Module):
    """Mixin for a ModuleList or Sequential that shows only its active children."""

    _active: tuple[int, ...] | None = None  # None: all are active, and more may be appended

    def _shown(self) -> list[nn.Module]:
        children = cast(list[nn.Module], list(self._modules.values()))
        return children if self._active is None else [children[i] for i in self._active]

    def _hidden(self) -> list[nn.Module]:
        shown = self._shown()
        return [child for child in cast(list[nn.Module], self._modules.values()) if child not in shown]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._shown())

    def __len__(self) -> int:
        return len(self._shown())

    def __getitem__(self, index: Any) -> Any:
        found = self._shown()[index]
        if isinstance(found, list):
            return nn.Sequential(*found) if isinstance(self, nn.Sequential) else nn.ModuleList(found)
        return found

    def __setitem__(self, index: Any, module: nn.Module) -> None:
        names = list(self._modules)
        self._modules[names[index if self._active is None else self._active[index]]] = module

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if self._active is not None:
            raise RuntimeError("some of these blocks are switched off; activate all of them before adding more")
        super().add_module(name, module)

    # Code that runs the children through ``children()``, such as gradient checkpointing in torch and timm, must see the
    # active ones only. torch's own methods that use it to reach all children must reach the hidden ones too.

    def children(self) -> Iterator[nn.Module]:
        return iter(self._shown())

    def apply(self, fn: Any) -> Any:
        for child in self._hidden():
            child.apply(fn)
        return super().apply(fn)

    def train(self, mode: bool = True) -> Any:
        for child in self._hidden():
            child.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for child in self._hidden() if recurse else []:
            child._apply(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._active is not None:
            destination[prefix + _KEY] = torch.tensor(self._active)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        marks = [key for key in state_dict if key.startswith(prefix + _MARK)]
        active = state_dict.pop(marks[0]) if marks else None
        if active is not None and int(active.max()) >= len(self._modules):
            errors = args[-1]
            errors.append(f"active blocks {active.tolist()} of {prefix[:-1]!r}, which has only {len(self._modules)}")
        elif active is not None or any(key.startswith(prefix) for key in state_dict):  # not a load of other parts
            self._active = None if active is None else tuple(active.tolist())
        super()._load_from_state_dict(state_dict, prefix, *args)


_gated_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _gated(plain: type[nn.Module]) -> type[nn.Module]:
    """The gated form of a list class; it is made at run time, so ``__reduce__`` tells pickle how to make it."""
    if issubclass(plain, _Gate):
        return plain
    if plain not in _gated_classes:
        members = {"_plain": plain, "__reduce__": lambda self: (_new_gated, (plain,), self.__dict__)}
        _gated_classes[plain] = type(f"Gated{plain.__name__}", (_Gate, plain), members)
    return _gated_classes[plain]


def _new_gated(plain: type[nn.Module]) -> nn.Module:
    gated = _gated(plain)
    return gated.__new__(gated)


class BlockList(_Gate, nn.ModuleList):
    """A ``ModuleList`` that is gated from construction, so that ``load_from_checkpoint`` restores its active blocks."""


@dataclass
class BlockStack:
    """All repeated blocks of a network, in order, of which some or all are active.

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
        active = getattr(self.container, "_active", None)
        return tuple(range(len(self))) if active is None else cast(tuple[int, ...], active)

    def __len__(self) -> int:
        return len(self.container._modules)

    def activate(self, indices: Iterable[int]) -> None:
        """Run only these blocks; parameters of the others keep their values and get no gradient.

        Args:
            indices: Indices into all blocks, at least one.

        Raises:
            ValueError: If ``indices`` is empty or names a block that the network does not have.
        """
        chosen = tuple(sorted(set(indices)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(self):
            raise ValueError(f"cannot activate blocks {chosen} of {self.path!r}, which has {len(self)}")
        self.container.__class__ = _gated(type(self.container))
        self.container._active = None if len(chosen) == len(self) else chosen  # type: ignore[assignment]

    def release(self) -> None:
        """Restore the original class of the list if all of its blocks are active; otherwise keep it gated."""
        plain = getattr(type(self.container), "_plain", None)
        if plain is not None and len(self.active) == len(self):
            self.container.__class__ = plain
            self.container.__dict__.pop("_active", None)

    def copy(self, source: int, target: int) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Copy all parameters and buffers of one block to another.

        Returns:
            Pairs (source, target) of parameters, so that callers can copy other per-parameter state.
        """
        one, other = self.blocks[source], self.blocks[target]
        buffers = dict(one.named_buffers())
        parameters = dict(one.named_parameters())
        pairs = [(parameters[name], parameter) for name, parameter in other.named_parameters()]
        with torch.no_grad():
            for name, buffer in other.named_buffers():
                buffer.copy_(buffers[name])
            for a, b in pairs:
                b.copy_(a)
        return [(a, b) for a, b in pairs if a is not b]  # without parameters that blocks share

    def cut(self, index: int) -> Callable[[], None]:
        """Stop the gradient at the input of a block, so that nothing below it is trained.

        Returns:
            A function that removes the stop.
        """
        block = self.blocks[index]
        return replace(block, "forward", partial(_cut_forward, block.forward))

    def __repr__(self) -> str:
        kind = type(self.blocks[0]).__name__
        return f"BlockStack({self.path}: {len(self.active)} of {len(self)} {kind} active)"


def _cut_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Forward of a block whose inputs are detached."""
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    return forward(*args, **kwargs)


def count_blocks(depth: int | float, total: int, what: str = "depth") -> int:
    """Convert a depth, a number of blocks (int) or a fraction of all (float), to a number of blocks.

    Args:
        depth: The depth.
        total: Number of blocks of the network.
        what: The argument's name, for the error message.

    Raises:
        ValueError: It is not a whole number of blocks.

    Example:
        >>> count_blocks(3, total=8), count_blocks(0.25, total=8)
        (3, 2)
    """
    blocks = depth if isinstance(depth, int) else depth * total
    if abs(blocks - round(blocks)) > 1e-6:
        raise ValueError(
            f"{what}: {depth} of {total} blocks is {blocks:g}, not a whole number; "
            f"give a fraction that divides {total}, or a number of blocks"
        )
    return round(blocks)


def _is_stack(module: nn.Module) -> bool:
    """Whether a list has at least two children of one class whose parameters agree in name and shape.

    The first child may have additional parameters, as in T5.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module._modules) < 2:
        return False
    blocks = list(module._modules.values())
    if None in blocks or len({type(block) for block in blocks}) > 1:
        return False
    first, *others = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    return bool(others[0]) and others[0].items() <= first.items() and all(other == others[0] for other in others)


def _candidates(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Outermost stacks whose blocks have submodules, with their paths; experts inside a block belong to the block."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if _is_stack(child) and any(True for block in child.children() for _ in block.children()):
            yield below, child
        else:
            yield from _candidates(child, below)


def block_lists(model: nn.Module) -> list[nn.Module]:
    """All lists of repeated blocks in a network, outermost ones only; the result may be empty."""
    return list({id(part): part for _, part in _candidates(model)}.values())


def _describe(candidates: Sequence[tuple[str, nn.Module]]) -> str:
    return ", ".join(
        f"{path!r} ({len(m._modules)} x {type(next(iter(m.children()))).__name__})" for path, m in candidates
    )


def find_blocks(model: nn.Module, path: str | None = None) -> BlockStack:
    """Find the one list of repeated blocks in a network, or take the one at ``path``.

    A stack is a ``ModuleList`` or ``Sequential`` of at least two children of one class whose parameters agree in name
    and shape; the first child may have additional ones, as in T5. Without ``path``, only stacks whose blocks have
    submodules count, and stacks inside blocks are ignored.

    Args:
        model: Any network, or a LightningModule that contains one.
        path: Dotted path of the list, needed when the network has none or several (T5, Swin).

    Returns:
        The stack, gated, with all blocks active unless some were inactive before.

    Raises:
        ValueError: If there is no stack at ``path``, or if without a path none or several are found; the message
            lists the candidates.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32)
        >>> find_blocks(vit)
        BlockStack(blocks: 12 of 12 Block active)
    """
    candidates = list({id(part): (path, part) for path, part in _candidates(model)}.values())  # some have two paths
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
