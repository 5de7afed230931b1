"""Units: compute only some neurons and attention heads of a network.

    x -> act(x @ in[rows].T) @ out[:, columns].T

A unit consists of rows of the input matrices and columns of the output matrix: the matrices of the linear layers before
and after it. The network is not rebuilt. Its linear layers gather the rows and columns of the shown units in the
forward pass, so the products are shorter, in backward too. Parameters keep their names and shapes, and weights of
hidden units get a gradient of exactly 0. If these weights are 0, the plain network computes the same function.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_scale.factors.blocks import BlockStack

__all__ = ["UnitGroup", "UnitKind", "find_units"]

UnitKind = Literal["all", "neurons", "heads"]


class _Shown:
    """Indices of the rows or columns of a matrix that are used; None for all."""

    index: Tensor | None = None


def _into(linear: nn.Linear, shown: _Shown, x: Tensor) -> Tensor:
    """Forward of an input layer of units."""
    if shown.index is None:
        return F.linear(x, linear.weight, linear.bias)
    bias = None if linear.bias is None else linear.bias.index_select(0, shown.index)
    return F.linear(x, linear.weight.index_select(0, shown.index), bias)


def _out_of(linear: nn.Linear, shown: _Shown, x: Tensor) -> Tensor:
    """Forward of the output layer of units."""
    weight = linear.weight if shown.index is None else linear.weight.index_select(1, shown.index)
    return F.linear(x, weight, linear.bias)


class UnitGroup:
    """The neurons of a feed-forward layer, or the heads of an attention.

    Attributes:
        active: Mask of the active units, (units,).

    Args:
        name: Dotted path of the output layer.
        kind: What a unit is, for messages: ``"neurons"`` or ``"heads"``.
        ins: The input layers of the units.
        out: The output layer of the units.
        rows: For each input layer, the rows of each unit, (units, rows per unit).
        columns: The columns of the output layer for each unit, (units, columns per unit).
        owner: The module whose attributes ``sizes`` depend on the number of shown units.
        sizes: Names of these attributes, with their value per unit.

    Example:
        >>> up, down = nn.Linear(2, 3), nn.Linear(3, 2)
        >>> each = torch.arange(3)[:, None]
        >>> group = UnitGroup("down", "neurons", [up], down, [each], each)
        >>> group.attach()
        >>> group.show(torch.tensor([True, False, True]))
        >>> up(torch.ones(1, 2)).shape, down(up(torch.ones(1, 2))).shape
        (torch.Size([1, 2]), torch.Size([1, 2]))
        >>> group.release()
    """

    def __init__(
        self,
        name: str,
        kind: str,
        ins: Sequence[nn.Linear],
        out: nn.Linear,
        rows: Sequence[Tensor],
        columns: Tensor,
        owner: nn.Module | None = None,
        sizes: dict[str, int] | None = None,
    ) -> None:
        self.name, self.kind = name, kind
        self.ins, self.out, self.rows, self.columns = list(ins), out, list(rows), columns
        self.owner, self.sizes = owner, sizes or {}
        self.active = torch.ones(len(columns), dtype=torch.bool)
        self._shown = [_Shown() for _ in self.ins], _Shown()
        self._attached: list[tuple[nn.Linear, Any]] = []  # layers, and the forward that each got from this group

    @property
    def key(self) -> nn.Parameter:
        """The parameter that identifies the group when blocks are copied."""
        return cast(nn.Parameter, self.out.weight)

    # -- computing some of them ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Replace the forward of the layers, so that :meth:`show` can choose the units that are computed."""
        into, out_of = self._shown
        for linear, forward, shown in [
            *((one, _into, shown) for one, shown in zip(self.ins, into, strict=True)),
            (self.out, _out_of, out_of),
        ]:
            own = partial(forward, linear, shown)
            vars(own)["before"] = vars(linear).get("forward")
            vars(linear)["forward"] = own
            self._attached.append((linear, own))

    def release(self) -> None:
        """Restore the layers' earlier forward; groups that share a layer can be released in any order."""
        self.show(None)
        for linear, own in reversed(self._attached):
            forward: Any = vars(linear).get("forward")
            if forward is own and own.before is None:
                del vars(linear)["forward"]
            elif forward is own:
                vars(linear)["forward"] = own.before
            while forward is not None:  # a group that was attached later must restore what this group would have
                before: Any = vars(forward).get("before") if isinstance(forward, partial) else None
                if before is own:
                    vars(forward)["before"] = own.before
                forward = before
        self._attached = []

    def show(self, units: Tensor | None) -> None:
        """Compute only the units of a mask (units,); None for all."""
        into, out_of = self._shown
        device = self.out.weight.device
        for shown, index in zip([*into, out_of], [*self.rows, self.columns], strict=True):
            shown.index = None if units is None else index[units].flatten().sort().values.to(device)
        count = len(self.active) if units is None else int(units.sum())
        for attribute, each in self.sizes.items():
            setattr(self.owner, attribute, count * each)

    # -- their weights ------------------------------------------------------------------------------------------------

    def magnitude(self) -> Tensor:
        """2-norm of the input weights of each unit times the 2-norm of its output weights, (units,).

        Up to the activation, the product measures what a unit adds to the residual stream. It is 0 for a unit that has
        just grown.
        """
        into, out_of = self._squares([one.weight.detach() for one in self.ins], self.out.weight.detach())
        return (into * out_of).sqrt()

    def growth(self) -> Tensor | None:
        """2-norm of the gradient of all weights of each unit, (units,); None if the layer did not run."""
        gradients = [one.weight.grad for one in self.ins if one.weight.grad is not None]
        if self.out.weight.grad is None or len(gradients) < len(self.ins):
            return None
        into, out_of = self._squares(gradients, self.out.weight.grad)
        return (into + out_of).sqrt()

    def _squares(self, into: Sequence[Tensor], out_of: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares over the rows and over the columns of each unit, both (units,)."""
        sums = [v.square().sum(1).cpu()[rows].sum(1) for v, rows in zip(into, self.rows, strict=True)]
        return torch.stack(sums).sum(0), out_of.square().sum(0).cpu()[self.columns].sum(1)

    def masks(self) -> list[tuple[nn.Parameter, Tensor]]:
        """All parameters of the units with masks: input weights (R, 1), input biases (R,), output weights (1, C)."""
        found: list[tuple[nn.Parameter, Tensor]] = []
        for linear, rows in zip(self.ins, self.rows, strict=True):
            mask = self._spread(rows, linear.out_features)
            found.append((cast(nn.Parameter, linear.weight), mask[:, None]))
            found += [(linear.bias, mask)] if linear.bias is not None else []
        return [*found, (self.key, self._spread(self.columns, self.out.in_features)[None])]

    def _spread(self, index: Tensor, size: int) -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[index[self.active].flatten()] = True
        return mask

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """New input weights for all units, (R, inputs) per layer: normal, with the root mean square of active ones."""
        drawn = []
        for linear, rows in zip(self.ins, self.rows, strict=True):
            mine = linear.weight.detach()[rows[self.active].flatten().to(linear.weight.device)]
            normal = torch.randn(linear.weight.shape, generator=generator).to(mine)
            drawn.append(normal * mine.square().mean().sqrt())
        return drawn

    @torch.no_grad()
    def fill(self, units: Tensor, drawn: Sequence[Tensor]) -> None:
        """Set the input weights of the units of a mask (units,) to the drawn ones; output weights are not changed."""
        for linear, rows, new in zip(self.ins, self.rows, drawn, strict=True):
            index = rows[units].flatten().to(new.device)
            linear.weight[index] = new[index]


# -- finding them -----------------------------------------------------------------------------------------------------


def find_units(stack: BlockStack, kind: UnitKind = "all") -> list[UnitGroup]:
    """The units of a network's blocks.

    Neurons are the channels between two linear layers, where the first may be two parallel ones (gated), if their
    number differs from that of the channels outside. Heads are those of lit_scale's attention, of timm's ``Attention``,
    and of Hugging Face's attentions with BERT's structure; other attentions are left dense.

    Args:
        stack: The blocks.
        kind: Which units to find.

    Raises:
        ValueError: If there are none, if groups share some weights but not all, or if another module, such as a norm,
            has a weight for each neuron of a layer.
    """
    groups: list[UnitGroup] = []
    for label, block in zip(stack.container._modules, stack.blocks, strict=True):
        path = f"{stack.path}.{label}"
        groups += _heads(path, block) if kind != "neurons" else []
        groups += _neurons(path, block) if kind != "heads" else []
    found = [g for g in groups if all(p.requires_grad for p, _ in g.masks())]
    if not found:
        what = "attention heads" if kind == "heads" else "feed-forward neurons"
        raise ValueError(
            f"found no {what} to leave out in {stack!r}: neurons are searched between two trained nn.Linear, heads in "
            "the attention of lit_scale, timm or Hugging Face's BERT; use granularity='weight'"
        )
    return _unshared(stack, found)


def _unshared(stack: BlockStack, groups: Iterable[UnitGroup]) -> list[UnitGroup]:
    """The groups without duplicates, which shared blocks have; refuse groups that share only some of their weights."""
    kept: dict[frozenset[int], UnitGroup] = {}
    for group in groups:
        weights = [one.weight for one in [*group.ins, group.out]]
        mine = frozenset(map(id, weights))
        for theirs in kept:
            if mine != theirs and mine & theirs:
                shared = next(weight for weight in weights if id(weight) in theirs)
                named = stack.container.named_parameters(stack.path, remove_duplicate=False)
                first, second, *_ = [name for name, parameter in named if parameter is shared]
                raise ValueError(
                    f"{first!r} and {second!r} are one weight (tied), but other weights of their units are not, so "
                    "units cannot be left out of one without the other; share all layers of the units or none, or use "
                    "granularity='weight'"
                )
        kept.setdefault(mine, group)
    return list(kept.values())


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or any(
        hasattr(module, name) for name in ("qkv", "query", "q_proj")
    )


def _neurons(path: str, block: nn.Module) -> Iterator[UnitGroup]:
    """Groups of neurons of a block's feed-forward layers, found by the order and the widths of its linear layers.

    Queries, keys and values can have similar shapes, but there are three of them, or other layers beside them.
    Feed-forward layers have one or two input layers, and no other layer of the same parent lies between the sublayer
    before and the output layer.
    """
    attentions = [module for module in block.modules() if _is_attention(module)]
    inside = {id(part) for module in attentions for part in module.modules()}
    linears = [(name, m) for name, m in block.named_modules() if type(m) is nn.Linear and id(m) not in inside]
    widths = [{m.in_features, m.out_features} for m in block.modules() if isinstance(m, nn.Linear)]
    begin = 0  # first linear layer after the sublayer before
    for place, (name, down) in enumerate(linears):
        hidden, width = down.in_features, down.out_features
        ahead = sum(width in pair for pair in widths) - sum(hidden in pair for pair in widths)
        if ahead < 0:  # most layers have the width of the residual stream on one side, so this is an input layer
            continue
        before = linears[begin:place]
        ups = [one for one in before if _parent(one) == _parent(before[-1])]
        fits = [(up.in_features, up.out_features) == (width, hidden) for _, up in ups]
        if hidden == width or ahead > 0 or any(fits[-1:]):
            begin = place + 1
        if hidden == width or len(ups) not in (1, 2) or not all(fits) or _goes_on(ups, linears[place:]):
            continue
        _check_between(path, block, [*(up for up, _ in ups), name], hidden)
        each = torch.arange(hidden)[:, None]
        yield UnitGroup(f"{path}.{name}", "neurons", [up for _, up in ups], down, [each] * len(ups), each)


def _parent(named: tuple[str, nn.Linear]) -> str:
    return named[0].rpartition(".")[0]


def _goes_on(ups: Sequence[tuple[str, nn.Linear]], rest: Sequence[tuple[str, nn.Linear]]) -> bool:
    """Whether input layers like ``ups`` follow the output layer, without an output layer after them: LLaMA's gates."""
    up, down = ups[0], rest[0]
    more = list(takewhile(lambda one: _parent(one) == _parent(up) == _parent(down) and _alike(one, up), rest[1:]))
    return bool(more) and not any(_alike(one, down) for one in rest[len(more) + 1 : len(more) + 2])


def _alike(one: tuple[str, nn.Linear], other: tuple[str, nn.Linear]) -> bool:
    return one[1].weight.shape == other[1].weight.shape


def _check_between(path: str, block: nn.Module, names: Sequence[str], hidden: int) -> None:
    """Refuse a norm or another module that has a weight for each neuron."""
    common = names[0].split(".")
    while not all(name.split(".")[: len(common)] == common for name in names):
        common = common[:-1]
    for below, part in block.get_submodule(".".join(common)).named_modules():
        if not isinstance(part, nn.Linear) and any(p.shape == (hidden,) for p in part.parameters(recurse=False)):
            where = ".".join([path, *common, below])
            raise ValueError(f"{where} has weights for each of {hidden} neurons, so none can be left out; use 'heads'")


def _heads(path: str, block: nn.Module) -> Iterator[UnitGroup]:
    for name, module in block.named_modules():
        fused = getattr(module, "qkv", None)
        out = getattr(module, "out", None) or getattr(module, "proj", None)
        if isinstance(fused, nn.Linear) and isinstance(out, nn.Linear) and _is_resizable(module):
            heads, width = module.num_heads, module.head_dim
            columns = torch.arange(heads * width).view(heads, width)
            rows = torch.cat([columns + part * heads * width for part in range(3)], 1)
            sizes = {"num_heads": 1} | ({"attn_dim": width} if hasattr(module, "attn_dim") else {})
            yield UnitGroup(f"{path}.{name}", "heads", [fused], out, [rows], columns, module, sizes)
        out = getattr(getattr(module, "output", None), "dense", None)
        if not isinstance(out, nn.Linear):
            continue
        for child in module.children():
            parts = [part for part in map(child._modules.get, ("query", "key", "value")) if isinstance(part, nn.Linear)]
            width = getattr(child, "attention_head_size", None)
            only = {id(p) for part in parts for p in part.parameters()} == {id(p) for p in child.parameters()}
            if len(parts) == 3 and width and only and {part.out_features for part in parts} == {out.in_features}:
                columns = torch.arange(out.in_features).view(-1, width)
                sizes = {"num_attention_heads": 1, "all_head_size": width}
                yield UnitGroup(f"{path}.{name}", "heads", parts, out, [columns] * 3, columns, child, sizes)


def _is_resizable(module: nn.Module) -> bool:
    """Whether an attention with one matrix for queries, keys and values can run with fewer heads.

    A class declares it by an attribute ``resizable = True``: it has layers ``qkv`` and ``out``, and its forward reads
    ``num_heads`` and ``head_dim``. timm's ``Attention`` is recognized by its class.
    """
    if getattr(type(module), "resizable", False):
        return True
    timm = sys.modules.get("timm.layers.attention")
    if timm is None or type(module) is not timm.Attention or not hasattr(module, "attn_dim"):
        return False
    return getattr(module, "gate", None) is None and isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
