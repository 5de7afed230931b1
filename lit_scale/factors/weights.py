"""Weights: masks over parameters, kept after every step of any optimizer.

    weight <- mask * weight,  gradient <- mask * gradient,  slot <- mask * slot

A mask is a boolean tensor that broadcasts to its parameter and is true where the weight is active. Masked entries are
exactly 0 in the weights, in averages of weights, in gradients before clipping, and in the optimizer's slots (its state
per weight), quantized ones included. No shape changes: a checkpoint is that of the plain network.
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
        """Set the mask of a parameter, which the methods below apply."""
        self.masks[parameter] = mask.to(parameter.device)

    @torch.no_grad()
    def zero_weights(self, averages: Iterable[nn.Module] = (), only: Collection[nn.Parameter] | None = None) -> None:
        """Set masked weights of the network, and of averages of it, to 0.

        They are set, not multiplied by 0, because an optimizer may have left values there that are not finite.

        Args:
            averages: Networks with the same parameter names.
            only: The parameters to change; None for all that have a mask.
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
        """Set the gradients of masked weights to 0, so that gradient norms are those of the sparse network."""
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def zero_codes(self, optimizers: Iterable[Optimizer]) -> None:
        """Set the quantized slots of masked weights to the code of 0.

        Other slots stay 0 because the gradient is 0, but quantization on a CPU rounds 0 to a neighbouring level.
        """
        for optimizer in optimizers:
            for parameter, mask in self.masks.items():
                state = optimizer.state.get(parameter, {})
                if any(isinstance(slot, Tensor) and slot.dtype == torch.uint8 for slot in state.values()):
                    zero_slots([optimizer], parameter, mask)


@torch.no_grad()
def zero_slots(optimizers: Iterable[Optimizer], parameter: nn.Parameter, keep: Tensor) -> None:
    """Set entries of an optimizer's slots of a parameter to 0.

    Slots are tensors of the parameter's shape in ``optimizer.state[parameter]``, or stacks of such tensors (the two
    averages of AdEMAMix in bitsandbytes). bitsandbytes' 8-bit slots hold indices into a table, scaled by the largest
    value of each block; there the index of 0 is written. State that is not kept per entry, such as Adafactor's factors,
    is not changed.

    Args:
        optimizers: The optimizers of the run.
        parameter: The parameter.
        keep: Mask that broadcasts to the parameter, true where slots are not changed.

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
    """Pack a mask into bytes of eight entries each, for a checkpoint.

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])
    """
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Unpack the first ``count`` entries of a packed mask, as a mask (count,)."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count).astype(bool))


# -- which weights, and how many --------------------------------------------------------------------------------------


def find_matrices(
    module: nn.Module, stack: BlockStack | None, layers: Sequence[str] | None = None
) -> dict[str, tuple[nn.Parameter, nn.Module]]:
    """The weights that may be masked, by name, each with the module that owns it.

    Without ``layers`` these are the trained matrices inside the blocks: linear maps, convolutions, and projections of
    attention. Embeddings, norms, biases, and everything outside of blocks stay dense.

    Args:
        module: The network.
        stack: Its blocks; needed only without ``layers``.
        layers: Dotted paths of modules or of parameters.

    Raises:
        ValueError: If a path leads to no trained matrix, or two paths lead to the same weights.
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
    """Trained matrices below the paths, by name; shared ones have their first name."""
    found: dict[str, tuple[nn.Parameter, nn.Module]] = {}
    seen: set[int] = set()
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not any(not path or name == path or name.startswith(f"{path}.") for path in paths):
            continue
        path = name.rpartition(".")[0]
        owner, around = modules[path], modules[path.rpartition(".")[0]]
        if isinstance(around, nn.MultiheadAttention):  # it uses the projection's weight without calling the projection
            owner = around
        is_matrix = parameter.ndim >= 2 and name.endswith("weight") and parameter.requires_grad
        if is_matrix and id(parameter) not in seen and (embeddings or not isinstance(owner, nn.Embedding)):
            found[name] = parameter, owner
            seen.add(id(parameter))
    return found


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Densities of layers by the Erdos-Renyi-kernel rule: larger layers are sparser (Evci et al. 2020, section 3).

    The density of a layer is proportional to (sum of its dimensions) / (product of its dimensions). Layers whose
    density would exceed 1 are dense, and the others are solved again, so that the total density is as requested.

    Args:
        shapes: Shapes of the weights.
        density: Density of all layers together, in (0, 1].

    Returns:
        The density of each layer.

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
        # as in the authors' code, make the layer furthest above dense first: this lowers the densities of the others
        most = max(raw[layer] for layer in above)
        dense |= {layer for layer in above if raw[layer] == most}


def highest_cells(scores: Tensor, count: int, *, in_fours: bool = False) -> Tensor:
    """The cells with the highest scores, as a mask (cells,).

    Args:
        scores: Scores of all cells, (cells,).
        count: Number of cells; ignored with ``in_fours``, which takes half of them.
        in_fours: Whether to take two cells of each group of four.

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
    """A weight, divided into cells that are active or not: single weights or square tiles.

    Attributes:
        active: Mask of the active cells, (cells,).
        positions: Number of vectors that the matrix was multiplied with since :meth:`begin`, while it is watched.
        forward_only: Number of these vectors in passes without gradients, for example when samples are scored.

    Args:
        name: Name of the parameter.
        parameter: The weight; its first axis counts outputs, the others together count inputs.
        owner: The module whose forward uses it.
        side: Side of a tile; 1 for single weights.

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
        """The parameter that identifies the part when blocks are copied."""
        return self.parameter

    def magnitude(self) -> Tensor:
        """Sum of the weights' magnitudes of each cell, (cells,)."""
        return self._sums(self.parameter.detach())

    def growth(self) -> Tensor | None:
        """Sum of the gradients' magnitudes of each cell, (cells,); None if the layer did not run."""
        return None if self.parameter.grad is None else self._sums(self.parameter.grad)

    def masks(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameter with its mask, which has the parameter's shape."""
        tiles = self.active.view(self.grid)
        if self.side > 1:
            tiles = tiles.repeat_interleave(self.side, 0).repeat_interleave(self.side, 1)
        return [(self.parameter, tiles.view(self.parameter.shape))]

    def begin(self) -> None:
        """Set the counts of vectors to 0, for a new step."""
        self.positions = self.forward_only = 0

    def skipped(self, products: int) -> int:
        """FLOPs of the products of the counted vectors with inactive cells.

        Args:
            products: Products per vector, forward and backward; vectors of passes without gradients count one.
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
