"""Weights: masks over parameters that hold after every step of any optimizer.

    weight <- mask * weight,  gradient <- mask * gradient,  slot <- mask * slot

A mask is any boolean tensor that broadcasts to its parameter, true where the weight is active. What is masked is
exactly 0 wherever it is kept: in the weights, in the averages of weights, in their gradients before these are clipped,
and in the optimizer's slots, quantised ones included. Nothing changes shape: a checkpoint is that of the plain network.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.factors.blocks import BlockStack

__all__ = [
    "Cells",
    "WeightMasks",
    "erk_densities",
    "highest_cells",
    "find_matrices",
    "pack_bits",
    "unpack_bits",
    "zero_slots",
]


# -- masks and what must follow them ----------------------------------------------------------------------------------


class WeightMasks:
    """Masks over the parameters of a network.

    Args:
        module: The network.

    Example:
        >>> line = nn.Linear(2, 1, bias=False)
        >>> masks = WeightMasks(line)
        >>> masks.set(line.weight, torch.tensor([True, False]))
        >>> masks.zero_weights()
        >>> bool(line.weight[0, 1] == 0)
        True
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.masks: dict[nn.Parameter, Tensor] = {}

    def set(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Mask a parameter; it and whatever is kept for it are zeroed by the methods below."""
        self.masks[parameter] = mask.to(parameter.device)

    @torch.no_grad()
    def zero_weights(self, averages: Iterable[nn.Module] = (), only: Collection[nn.Parameter] | None = None) -> None:
        """Zero the masked weights here and in averages of the network.

        They are set to 0 and not multiplied by it, since an optimizer may have left something there that is not finite.

        Args:
            averages: Networks like this one.
            only: The parameters to zero in; None is all that have a mask.
        """
        masks = {p: mask for p, mask in self.masks.items() if only is None or p in only}
        for parameter, mask in masks.items():
            parameter.copy_(torch.where(mask, parameter, 0))
        for average in averages:
            others = dict(average.named_parameters())
            for parameter, mask in masks.items():
                other = others[self.names[parameter]]
                other.copy_(torch.where(mask.to(other.device), other, 0))

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Zero the gradients of masked weights, so that norms are those of the sparse network."""
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def zero_codes(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero what masked weights have in quantised slots.

        A gradient of 0 keeps the other slots at 0, but quantising on a CPU takes 0 for the number next to it.
        """
        for optimizer in optimizers:
            for parameter, mask in self.masks.items():
                state = optimizer.state.get(parameter, {})
                if any(isinstance(slot, Tensor) and slot.dtype == torch.uint8 for slot in state.values()):
                    zero_slots([optimizer], parameter, mask)


@torch.no_grad()
def zero_slots(optimizers: Iterable[Optimizer], parameter: nn.Parameter, keep: Tensor) -> None:
    """Zero an optimizer's slots of a parameter but for some entries.

    Slots are the tensors of the parameter's shape in ``optimizer.state[parameter]``, or several of them in one
    (AdEMAMix's two averages in bitsandbytes). Those that bitsandbytes holds in 8 bits are codes of a table, each scaled
    by the largest value of its block: zeroing writes the code of 0. What is not kept per entry, as Adafactor's factors,
    stays.

    Args:
        optimizers: Those of the run.
        parameter: The parameter.
        keep: Broadcastable to it, true where slots stay.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9); weight.sum().backward(); optimizer.step()
        >>> zero_slots([optimizer], weight, torch.tensor([True, False]))
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([1., 0.])
    """
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for name, slot in state.items():
            if not isinstance(slot, Tensor) or parameter.shape not in (slot.shape, slot.shape[1:]):
                continue
            zero = 0
            if slot.dtype == torch.uint8:  # state1 is read through qmap1, state2 through qmap2
                table = state[name.replace("state", "qmap")]
                zero = int(table.abs().argmin())
            slot.copy_(torch.where(keep.to(slot.device), slot, zero))


def pack_bits(mask: Tensor) -> Tensor:
    """A mask as bytes of eight entries each, for a checkpoint.

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])
    """
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` entries of a packed mask."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count).astype(bool))


# -- which weights, and how many --------------------------------------------------------------------------------------


def find_matrices(
    module: nn.Module, stack: BlockStack | None, layers: Sequence[str] | None = None
) -> dict[str, tuple[nn.Parameter, nn.Module]]:
    """The weights that may be masked, by name, with the part of the network that each belongs to.

    Without ``layers`` these are the matrices inside of blocks (linear maps, convolutions, attention's projections) that
    are trained; embeddings, norms, biases, and all that is not in a block stay dense.

    Args:
        module: The network.
        stack: Its blocks; needed only without ``layers``.
        layers: Dotted paths of parts of the network, or of parameters.

    Raises:
        ValueError: If a path leads nowhere or to no matrix, or two lead to the same weights.
    """
    if layers is None:
        assert stack is not None
        return _below(module, [f"{stack.path}.{name}" for name in stack.container._modules])
    found: dict[str, tuple[nn.Parameter, nn.Module]] = {}
    for path in layers:
        below = _below(module, [path], embeddings=True)
        if not below:
            known = ", ".join(map(repr, _below(module, [""])))
            raise ValueError(f"layers: {path!r} names no trained matrix; there are {known}")
        for name, (parameter, owner) in below.items():
            for other, (one, _) in found.items():
                if one is parameter:
                    raise ValueError(f"layers: {path!r} holds the weights of {other!r} again (tied); name one of them")
            found[name] = parameter, owner
    return found


def _below(
    module: nn.Module, paths: Iterable[str], embeddings: bool = False
) -> dict[str, tuple[nn.Parameter, nn.Module]]:
    """Trained matrices whose names begin with one of the paths; shared ones under their first name."""
    found: dict[str, tuple[nn.Parameter, nn.Module]] = {}
    seen: set[int] = set()
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not any(not path or name == path or name.startswith(f"{path}.") for path in paths):
            continue
        path = name.rpartition(".")[0]
        owner, around = modules[path], modules[path.rpartition(".")[0]]
        if isinstance(around, nn.MultiheadAttention):  # which multiplies with its projection without calling it
            owner = around
        is_matrix = parameter.ndim >= 2 and name.endswith("weight") and parameter.requires_grad
        if is_matrix and id(parameter) not in seen and (embeddings or not isinstance(owner, nn.Embedding)):
            found[name] = parameter, owner
            seen.add(id(parameter))
    return found


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Densities of layers by the Erdos-Renyi-kernel rule: sparse where a layer is large (Evci et al. 2020, section 3).

    Layer l has density proportional to (sum of its dimensions) / (product of its dimensions). Those that would be above
    1 are dense, and the rest is solved again, so that all layers together have the density asked for.

    Args:
        shapes: Of the weights.
        density: Of all of them together, in (0, 1].

    Example:
        >>> [round(d, 3) for d in erk_densities([(100, 100), (10, 10)], 0.2)]
        [0.192, 1.0]
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        sparse = [layer for layer in range(len(shapes)) if layer not in dense]
        left = density * sum(sizes) - sum(sizes[layer] for layer in dense)
        scale = left / sum(raw[layer] * sizes[layer] for layer in sparse) if sparse else 0.0
        above = {layer for layer in sparse if scale * raw[layer] > 1.0}
        if not above:
            return [1.0 if layer in dense else scale * raw[layer] for layer in range(len(shapes))]
        # as in the authors' code, the one furthest above first: the others' share shrinks with it
        most = max(raw[layer] for layer in above)
        dense |= {layer for layer in above if raw[layer] == most}


def highest_cells(scores: Tensor, count: int, *, in_fours: bool = False) -> Tensor:
    """The cells with the highest scores, as a mask (cells,).

    Args:
        scores: Of all cells, (cells,).
        count: How many; ``in_fours`` it is half of them.
        in_fours: Take two of each four in a row.

    Example:
        >>> highest_cells(torch.tensor([1.0, 3.0, 2.0, 0.0]), 1)
        tensor([False,  True, False, False])
        >>> highest_cells(torch.tensor([1.0, 3.0, 2.0, 0.0]), 2, in_fours=True)
        tensor([False,  True,  True, False])
    """
    lowest_first = -scores.cpu()
    if in_fours:
        chosen = lowest_first.view(-1, 4).argsort(1)[:, :2] + 4 * torch.arange(len(scores) // 4)[:, None]
    else:
        chosen = lowest_first.argsort()[:count]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill(0, chosen.flatten(), True)


class Cells:
    """A weight as a matrix of equal cells, each of which is active or not: single weights, or square tiles of them.

    Attributes:
        active: Which cells are, (cells,).
        positions: Vectors that the matrix was multiplied with since :meth:`begin`, while it is watched.
        forward_only: Those among them that no gradient was to be taken of, as where samples are only scored.

    Args:
        name: Of the parameter.
        parameter: Its first axis counts outputs; the others are taken as one, of inputs.
        owner: The part of the network that multiplies with it.
        side: Of a tile; 1 for single weights.

    Raises:
        ValueError: If the matrix cannot be cut into such tiles.

    Example:
        >>> line = nn.Linear(4, 4)
        >>> cells = Cells("weight", line.weight, line, side=2)
        >>> cells.active = torch.tensor([True, False, False, True])
        >>> cells.masks()[0][1].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """

    def __init__(self, name: str, parameter: nn.Parameter, owner: nn.Module, side: int = 1) -> None:
        outputs, inputs = parameter.shape[0], parameter[0].numel()
        if outputs % side or inputs % side:
            raise ValueError(f"tiles of {side} x {side} do not divide {name}, which is {outputs} x {inputs}")
        self.name, self.parameter, self.owner, self.side = name, parameter, owner, side
        self.grid = (outputs // side, inputs // side)
        self.active = torch.ones(math.prod(self.grid), dtype=torch.bool)
        self.begin()

    @property
    def key(self) -> nn.Parameter:
        """The parameter that identifies the cells when blocks are copied."""
        return self.parameter

    def magnitude(self) -> Tensor:
        """Sum of the weights' magnitudes of each cell, (cells,)."""
        return self._sums(self.parameter.detach())

    def growth(self) -> Tensor | None:
        """Sum of the gradients' magnitudes of each cell, (cells,); None where the layer did not run."""
        return None if self.parameter.grad is None else self._sums(self.parameter.grad)

    def masks(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameter's mask, in its shape."""
        tiles = self.active.view(self.grid)
        if self.side > 1:
            tiles = tiles.repeat_interleave(self.side, 0).repeat_interleave(self.side, 1)
        return [(self.parameter, tiles.view(self.parameter.shape))]

    def begin(self) -> None:
        """Count the vectors of a new step."""
        self.positions = self.forward_only = 0

    def skipped(self, products: int) -> int:
        """FLOPs of the products of the matrix with all those vectors that belong to inactive cells.

        Args:
            products: As many for each vector as forward and backward take; where there is no backward, it is one.
        """
        inactive = int((~self.active).sum()) * self.side**2
        return 2 * inactive * (products * (self.positions - self.forward_only) + self.forward_only)

    def watch(self) -> torch.utils.hooks.RemovableHandle:
        """Count the vectors that the matrix is multiplied with."""
        is_convolution = self.parameter.ndim > 2

        def count(owner: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
            out = output[0] if isinstance(output, tuple) else output
            vectors = out.numel() // (self.parameter.shape[0] if is_convolution else out.shape[-1])
            self.positions += vectors
            self.forward_only += 0 if torch.is_grad_enabled() else vectors

        return self.owner.register_forward_hook(count)

    def _sums(self, values: Tensor) -> Tensor:
        rows, columns = self.grid
        if self.side == 1:
            return values.abs().flatten()
        return values.abs().view(rows, self.side, columns, self.side).sum((1, 3)).flatten()
