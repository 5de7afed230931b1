"""Sparse weights: the base of techniques that train only some of a network's weights.

A technique says which weights are active, at the start and perhaps later. This base finds the layers, keeps inactive
weights at exactly 0 wherever they are kept (:mod:`lit_scale.factors.weights`), lets layers multiply only with active
neurons and heads (:mod:`lit_scale.factors.units`), saves the masks, and reports the step kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.factors.blocks import find_blocks
from lit_scale.factors.units import UnitGroup, UnitKind, find_units
from lit_scale.factors.weights import (
    Cells,
    WeightMasks,
    erk_densities,
    find_matrices,
    highest_cells,
    pack_bits,
    unpack_bits,
    zero_slots,
)
from lit_scale.seeds import derive_seed
from lit_scale.technique import Technique, averages

__all__ = ["Granularity", "SparseWeights", "one_of"]

Granularity = Literal["unit", "weight", "block", "2:4"]


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse an argument that is none of its known values.

    Raises:
        ValueError: With the values to choose from.

    Example:
        >>> one_of("grow", "anywhere", ("gradient", "random"))
        Traceback (most recent call last):
        ValueError: grow='anywhere': choose one of 'gradient', 'random'
    """
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")


class SparseWeights(Technique):
    """A technique that trains a share of the weights, the others being 0.

    Each layer is a *part*, cut into cells: single weights, square tiles of them, or units, which are whole neurons and
    attention heads. A subclass chooses the first active cells by score (:meth:`first_scores`), at random by default.
    It may change them (:meth:`set_active`) in :meth:`after_step`, or in
    :meth:`~lit_scale.technique.Technique.decide`. Where it needs the gradient of inactive weights, it sets
    ``dense_gradient`` in ``decide``.

    Inactive weights are 0 after each optimizer step, in averages of the weights, in the optimizer's slots, and in the
    gradients before these are clipped. Inactive units are not computed, which saves time; single weights and tiles save
    FLOPs only on kernels for sparse matrices, reported as ``sparse_flops``.

    Args:
        density: Share of the weights, or of the units of each layer, that is active, in (0, 1].
        granularity: ``"unit"``; or single weights, square tiles of them (``"block"``), two of each four (``"2:4"``).
        distribution: All layers alike (``"uniform"``), or by the Erdos-Renyi-kernel rule (``"erk"``), which is the
            default for weights and blocks (Evci et al. 2020, section 3).
        units: Which units: ``"all"`` that are found, ``"neurons"``, or ``"heads"``.
        tile: Side of the tiles of ``"block"``.
        layers: Dotted paths of the matrices, or of parts that hold them, for all but ``"unit"``; by default all inside
            of blocks.
        seed: Of the random choices, which are a function of (seed, step, layer).
        blocks: Dotted path of the list of blocks, needed only where it cannot be found.

    Attributes:
        parts: The layers, from ``setup`` on; ``part.active`` (cells,) are their masks.
        dense_gradient: Whether the current step takes the gradients of inactive weights too.

    Raises:
        ValueError: At construction or in ``setup``, for arguments that do not fit each other or the model.

    Example:
        >>> class MagnitudePruning(SparseWeights):
        ...     def first_scores(self, part):
        ...         return part.magnitude()
        >>> pruning = MagnitudePruning(density=0.2, granularity="weight")
        >>> trainer = Trainer(max_steps=1_000, callbacks=[pruning], accelerator="cpu", logger=False)
    """

    factor = "weights"
    _names: ClassVar[str] = "density granularity distribution units tile layers seed blocks"

    def __init__(
        self,
        density: float = 0.5,
        *,
        granularity: Granularity = "unit",
        distribution: Literal["uniform", "erk"] | None = None,
        units: UnitKind = "all",
        tile: int = 16,
        layers: list[str] | None = None,
        seed: int = 0,
        blocks: str | None = None,
    ) -> None:
        self.density: float = density
        self.granularity: Granularity = granularity
        self.distribution = distribution or ("erk" if granularity in ("weight", "block") else "uniform")
        self.units, self.tile, self.layers, self.seed, self.blocks = units, tile, layers, seed, blocks
        one_of("granularity", granularity, ("unit", "weight", "block", "2:4"))
        one_of("distribution", self.distribution, ("uniform", "erk"))
        one_of("units", units, ("all", "neurons", "heads"))
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density={density} is not a share of the weights in (0, 1], such as 0.5")
        if granularity == "2:4" and density != 0.5:
            raise ValueError(f"density={density} with granularity='2:4': two of four are 0.5")
        if granularity in ("unit", "2:4") and self.distribution == "erk":
            raise ValueError(f"distribution='erk' does not go with granularity={granularity!r}; use 'uniform'")
        if granularity == "unit" and layers is not None:
            raise ValueError("layers names matrices; with granularity='unit' choose by units='neurons' or 'heads'")
        if tile < 2:
            raise ValueError(f"tile={tile}: the side of a tile is at least 2; for single weights use 'weight'")
        self.parts: list[Cells | UnitGroup] = []
        self.dense_gradient = False
        self._everything = False  # all units are computed
        self._ended = False  # training has; steps are only replayed
        self._off = False  # the clock prices a dense step
        self._masks: WeightMasks

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {name: getattr(self, name) for name in self._names.split()}

    def first_scores(self, part: Cells | UnitGroup) -> Tensor:
        """Scores (cells,) of a part in a new run, the highest of which become active; called in ``setup``."""
        return -self.random(part, 0, "first")

    def after_step(self, trainer: Trainer) -> None:
        """Called behind every optimizer step of training, before weights are averaged or saved.

        This is the place to change masks with :meth:`set_active`.
        """

    # -- what a subclass uses -----------------------------------------------------------------------------------------

    def set_active(self, trainer: Trainer, part: Cells | UnitGroup, active: Tensor) -> None:
        """Change which cells of a part are active.

        Weights and averages become 0 where cells are inactive, and the optimizer's slots also where cells are new. New
        cells begin with the weights they have: 0 for those that were inactive.

        Args:
            trainer: The Trainer, once training has started.
            part: One of :attr:`parts`.
            active: The mask, (cells,).
        """
        before = dict(part.masks())
        part.active = active
        self._mask(part)
        for parameter, mask in part.masks():
            zero_slots(trainer.optimizers, parameter, self._masks.masks[parameter] & before[parameter].to(mask.device))
        self._masks.zero_weights(averages(trainer), only=before.keys())
        if isinstance(part, UnitGroup) and not self._everything:
            part.show(part.active)

    def show(self, everything: bool) -> None:
        """Compute all units, as a step that needs the gradient of all of them must, or only the active ones."""
        if self.granularity == "unit" and everything != self._everything:
            self._everything = everything
            for part in cast(list[UnitGroup], self.parts):
                part.show(None if everything else part.active)

    def generator(self, part: Cells | UnitGroup, step: int, what: str) -> torch.Generator:
        """Of a random choice: the same on all ranks, and whenever the run was resumed.

        Args:
            part: One of :attr:`parts`.
            step: The optimizer step.
            what: Tells this choice from the others of the step.
        """
        return torch.Generator().manual_seed(derive_seed(self.seed, step, part.name, what))

    def random(self, part: Cells | UnitGroup, step: int, what: str) -> Tensor:
        """Random numbers in [0, 1), (cells,), by :meth:`generator`."""
        return torch.rand(len(part.active), generator=self.generator(part, step, what))

    # -- the layers ---------------------------------------------------------------------------------------------------

    def _find(self, pl_module: LightningModule) -> list[Cells | UnitGroup]:
        """The layers that become sparse, each with what it is cut into."""
        stack = None if self.layers is not None else find_blocks(pl_module, self.blocks)
        if self.granularity == "unit":
            assert stack is not None
            return list(find_units(stack, self.units))
        found = find_matrices(pl_module, stack, self.layers)
        if not found:
            raise ValueError("no trained matrix inside of the network's blocks; name some with layers=[...]")
        side = self.tile if self.granularity == "block" else 1
        parts = [Cells(name, parameter, owner, side) for name, (parameter, owner) in found.items()]
        for part in parts:
            by_rows = isinstance(part.owner, nn.Linear | nn.MultiheadAttention | nn.modules.conv._ConvNd)
            if self.granularity == "2:4" and not by_rows:
                raise ValueError(f"granularity='2:4': {part.name} is of a {type(part.owner).__name__}, not a Linear")
            if self.granularity == "2:4" and part.grid[1] % 4:
                raise ValueError(f"granularity='2:4' needs inputs in fours, but {part.name} has {part.grid[1]}")
        return list(parts)

    def _counts(self, parts: list[Cells | UnitGroup]) -> list[int]:
        """How many cells of each part are active."""
        densities = [self.density] * len(parts)
        if self.distribution == "erk":
            densities = erk_densities([cast(Cells, part).parameter.shape for part in parts], self.density)
        counts = [round(density * len(part.active)) for density, part in zip(densities, parts, strict=True)]
        for part, count in zip(parts, counts, strict=True):
            if count < 1:
                what = f"{len(part.active)} {part.kind if isinstance(part, UnitGroup) else 'weights or tiles'}"
                least = f"{1 / len(part.active):.2g}"
                raise ValueError(
                    f"density={self.density} leaves none of the {what} of {part.name}; give {least} or more"
                )
        return counts

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layers and choose the first active cells; a checkpoint brings its own."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return  # what is masked is 0: the plain network is the sparse one
        goes_on = {part.name: part.active.cpu() for part in self.parts} if trainer.global_step else {}
        self.parts, self.dense_gradient, self._masks = self._find(pl_module), False, WeightMasks(pl_module)
        for part, count in zip(self.parts, self._counts(self.parts), strict=True):
            first = highest_cells(self.first_scores(part), count, in_fours=self.granularity == "2:4")
            part.active = goes_on.get(part.name, first)
            if isinstance(part, Cells):  # in setup, so that hooks registered later get the masked gradient
                self.undo_later(part.parameter.register_hook(partial(self._sparse, part.parameter)).remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the weights, now that a checkpoint has been read and the device is known."""
        self.dense_gradient = self._ended = self._everything = False
        self._masks = WeightMasks(pl_module)
        for part in self.parts:
            if isinstance(part, Cells):
                part.active = part.active.to(part.parameter.device)
                self.undo_later(part.watch().remove)
            else:
                part.attach()
                self.undo_later(part.release)
                part.show(part.active)
            self._mask(part)
        self._masks.zero_weights(averages(trainer))
        for optimizer in trainer.optimizers:
            self.undo_later(optimizer.register_step_post_hook(lambda *_: self._after_step(trainer)).remove)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide and log; then count the vectors that each matrix is multiplied with."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for part in self.parts:
            if isinstance(part, Cells):
                part.begin()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of inactive weights, before gradients are clipped."""
        if not self._off:
            self._masks.zero_gradients()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on steps are only replayed."""
        self._ended = True

    def on_copy(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Give copied weights the mask of their originals."""
        parts = {part.key: part for part in self.parts}
        for source, target in pairs:
            if source in parts and target in parts:
                part = parts[target]
                part.active = parts[source].active.clone()
                self._mask(part)
                if isinstance(part, UnitGroup) and not self._everything:
                    part.show(part.active)
        self._masks.zero_weights()

    def _sparse(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """The gradient of the sparse network, for what takes its norm before all of it is there; None leaves it."""
        mask = self._masks.masks.get(parameter)  # none before training starts
        return None if mask is None or self._off or self.dense_gradient else gradient * mask

    def _mask(self, part: Cells | UnitGroup) -> None:
        for parameter, mask in part.masks():
            self._masks.set(parameter, mask)

    def _after_step(self, trainer: Trainer) -> None:
        """Behind the optimizer, whichever it is, and before anybody averages or saves the weights."""
        if self._off:
            return
        self._masks.zero_weights()
        self._masks.zero_codes(trainer.optimizers)
        if not self._ended:
            self.after_step(trainer)

    # -- state and the clock ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks, eight entries a byte, the same on all ranks."""
        return {"masks": {part.name: pack_bits(part.active) for part in self.parts}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the masks of a checkpoint."""
        masks = state_dict["masks"]
        if self.parts and (other := {part.name for part in self.parts} ^ masks.keys()):
            raise ValueError(f"the checkpoint's masks are of other layers: {', '.join(sorted(other))}; use its model")
        for part in self.parts:
            part.active = unpack_bits(masks[part.name], len(part.active))

    def is_plain(self) -> bool:
        """All weights are active."""
        return self._off or self.density == 1.0

    def plain_step_kind(self) -> dict[str, Any] | None:
        """All weights are active."""
        return {"density": 1.0}

    def step_kind(self) -> dict[str, Any]:
        """The share of active weights."""
        return {"density": 1.0 if self._off else self.density}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Compute all units and mask nothing, or train the sparse network, as in an earlier step."""
        self._off = kind["density"] != self.density
        self.show(everything=self._off)

    def skipped_flops(self) -> int:
        """FLOPs that only a kernel for sparse matrices would leave out: forward, and both gradients."""
        products = 2 if self.dense_gradient else 3  # the gradient of all weights is a dense product
        return sum(part.skipped(products) for part in self.parts if isinstance(part, Cells))
