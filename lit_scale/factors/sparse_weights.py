"""Sparse weights: the base class of techniques that train only some of a network's weights.

A technique chooses which weights are active, at the start and possibly later. This class finds the layers, keeps
inactive weights and their optimizer state at exactly 0 (:mod:`lit_scale.factors.weights`), makes layers compute only
active neurons and heads (:mod:`lit_scale.factors.units`), saves the masks, and reports the step kind.
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
    """Refuse an argument that is not one of the known values.

    Raises:
        ValueError: If it is not; the message lists the known values.

    Example:
        >>> one_of("grow", "anywhere", ("gradient", "random"))
        Traceback (most recent call last):
        ValueError: grow='anywhere': choose one of 'gradient', 'random'
    """
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")


class SparseWeights(Technique):
    """A technique that trains a share of the weights and keeps the others at 0.

    Each layer is a *part*, divided into cells: single weights, square tiles of weights, or units, which are whole
    neurons and attention heads. A subclass chooses the first active cells by score (:meth:`first_scores`), at random by
    default. It may change them (:meth:`set_active`) in :meth:`after_step` or in
    :meth:`~lit_scale.technique.Technique.decide`. If it needs the gradient of inactive weights, it sets
    ``dense_gradient`` in ``decide``.

    Inactive weights are 0 after each optimizer step, and so are their averages, their entries in the optimizer's state,
    and their gradients before clipping. Inactive units are not computed, which saves time. Inactive single weights and
    tiles would save FLOPs only with kernels for sparse matrices; the remaining FLOPs are reported as ``sparse_flops``.

    Args:
        density: Share of the weights, or of the units of each layer, that is active, in (0, 1].
        granularity: ``"unit"``, ``"weight"`` (single weights), ``"block"`` (square tiles of weights), or ``"2:4"`` (two
            of each group of four).
        distribution: ``"uniform"``: equal density in all layers; ``"erk"``: the Erdos-Renyi-kernel rule (Evci et al.
            2020, section 3). By default ``"erk"`` for ``"weight"`` and ``"block"``, else ``"uniform"``.
        units: Which units can be left out: ``"all"`` that are found, ``"neurons"``, or ``"heads"``.
        tile: Side of a tile for ``"block"``, in weights.
        layers: Dotted paths of weight matrices, or of modules that hold them, for all granularities but ``"unit"``; by
            default all matrices inside the blocks.
        seed: Seed of the random choices, which are a function of (seed, step, layer).
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Attributes:
        parts: The layers, from ``setup`` on; ``part.active`` (cells,) is the mask of a layer.
        dense_gradient: Whether the gradients of inactive weights are computed in the current step.

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
        self._everything = False  # whether all units are computed
        self._ended = False  # training has ended; steps are only replayed by the clock
        self._off = False  # whether the clock times a dense step
        self._masks: WeightMasks

    # -- what a subclass overrides ------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {name: getattr(self, name) for name in self._names.split()}

    def first_scores(self, part: Cells | UnitGroup) -> Tensor:
        """Scores (cells,) of a part in a new run; the cells with the highest become active. Called in ``setup``."""
        return -self.random(part, 0, "first")

    def after_step(self, trainer: Trainer) -> None:
        """Called after every optimizer step of training, before weights are averaged or saved.

        Change masks here, with :meth:`set_active`.
        """

    # -- what a subclass uses -----------------------------------------------------------------------------------------

    def set_active(self, trainer: Trainer, part: Cells | UnitGroup, active: Tensor) -> None:
        """Change which cells of a part are active.

        Weights and averages of inactive cells are set to 0. The optimizer's state is set to 0 for inactive cells and
        for newly active ones. Newly active cells keep the weights they have, which are 0.

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
        """Compute all units, which a step that needs all gradients must do, or only the active ones."""
        if self.granularity == "unit" and everything != self._everything:
            self._everything = everything
            for part in cast(list[UnitGroup], self.parts):
                part.show(None if everything else part.active)

    def generator(self, part: Cells | UnitGroup, step: int, what: str) -> torch.Generator:
        """A generator for a random choice, a function of (seed, step, part, what), so equal on all ranks.

        Args:
            part: One of :attr:`parts`.
            step: The optimizer step.
            what: A name that distinguishes this choice from others in the step.
        """
        return torch.Generator().manual_seed(derive_seed(self.seed, step, part.name, what))

    def random(self, part: Cells | UnitGroup, step: int, what: str) -> Tensor:
        """Random numbers in [0, 1), (cells,), from :meth:`generator`."""
        return torch.rand(len(part.active), generator=self.generator(part, step, what))

    # -- the layers ---------------------------------------------------------------------------------------------------

    def _find(self, pl_module: LightningModule) -> list[Cells | UnitGroup]:
        """The layers that become sparse, as parts."""
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
        """Number of active cells of each part."""
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
        """Find the layers and choose the first active cells; a checkpoint replaces them later."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return  # masked weights are 0, so the plain network computes the same function
        goes_on = {part.name: part.active.cpu() for part in self.parts} if trainer.global_step else {}
        self.parts, self.dense_gradient, self._masks = self._find(pl_module), False, WeightMasks(pl_module)
        for part, count in zip(self.parts, self._counts(self.parts), strict=True):
            first = highest_cells(self.first_scores(part), count, in_fours=self.granularity == "2:4")
            part.active = goes_on.get(part.name, first)
            if isinstance(part, Cells):  # in setup, so that hooks registered later get the masked gradients
                self.undo_later(part.parameter.register_hook(partial(self._sparse, part.parameter)).remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the weights; by now a checkpoint is loaded and the device is known."""
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
        """Decide and log; then start to count the vectors that each matrix is multiplied with."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for part in self.parts:
            if isinstance(part, Cells):
                part.begin()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Set the gradients of inactive weights to 0, before gradients are clipped."""
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
        """Mask a parameter's gradient, for callbacks that measure it during the backward pass; None: no change."""
        mask = self._masks.masks.get(parameter)  # there are none before training starts
        return None if mask is None or self._off or self.dense_gradient else gradient * mask

    def _mask(self, part: Cells | UnitGroup) -> None:
        for parameter, mask in part.masks():
            self._masks.set(parameter, mask)

    def _after_step(self, trainer: Trainer) -> None:
        """Called after a step of any optimizer, before weights are averaged or saved."""
        if self._off:
            return
        self._masks.zero_weights()
        self._masks.zero_codes(trainer.optimizers)
        if not self._ended:
            self.after_step(trainer)

    # -- state and the clock ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks, eight entries per byte, equal on all ranks."""
        return {"masks": {part.name: pack_bits(part.active) for part in self.parts}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the masks of a checkpoint."""
        masks = state_dict["masks"]
        if self.parts and (other := {part.name for part in self.parts} ^ masks.keys()):
            raise ValueError(f"the checkpoint's masks are of other layers: {', '.join(sorted(other))}; use its model")
        for part in self.parts:
            part.active = unpack_bits(masks[part.name], len(part.active))

    def is_plain(self) -> bool:
        """Whether all weights are active."""
        return self._off or self.density == 1.0

    def plain_step_kind(self) -> dict[str, Any] | None:
        """All weights are active."""
        return {"density": 1.0}

    def step_kind(self) -> dict[str, Any]:
        """The share of active weights."""
        return {"density": 1.0 if self._off else self.density}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Use all weights or the active ones only, as in a step of this kind."""
        self._off = kind["density"] != self.density
        self.show(everything=self._off)

    def skipped_flops(self) -> int:
        """FLOPs that only kernels for sparse matrices would save: in the forward pass and both gradients."""
        products = 2 if self.dense_gradient else 3  # the gradient of all weights is a dense product, which saves none
        return sum(part.skipped(products) for part in self.parts if isinstance(part, Cells))
