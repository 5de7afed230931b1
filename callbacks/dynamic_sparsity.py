"""Dynamic sparsity: a sparse network from the start, whose connections move (RigL, Evci et al. 2020, algorithm 1).

    every T steps, in each layer: drop the share a/2 (1 + cos(pi t / t_end)) of the weights that is smallest, then
    grow as many where the dense gradient is largest (RigL), or anywhere (SET, Mocanu et al. 2018)

By single weights it saves FLOPs on paper and no time; by whole neurons and heads the products become really shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.cost import charge
from lit_scale.factors.blocks import find_blocks
from lit_scale.factors.units import UnitGroup, UnitKind, find_units
from lit_scale.factors.weights import (
    Cells,
    WeightMasks,
    erk_densities,
    find_matrices,
    pack_bits,
    unpack_bits,
    zero_slots,
)
from lit_scale.progress import progress
from lit_scale.schedules import number_or_share
from lit_scale.seeds import derive_seed
from lit_scale.technique import Technique, averages

__all__ = ["DynamicSparsity", "drop_and_grow", "drop_share", "swap_in_fours"]

Granularity = Literal["unit", "weight", "block", "2:4"]
_EVERY = 100  # steps between two updates in RigL, or in a short run this share of it
_EVERY_OF_SHORT = 0.1


def drop_share(done: float, drop: float, until: float) -> float:
    """Share of the active weights that is exchanged: half a cosine from ``drop`` to 0 at ``until``.

    Example:
        >>> [round(drop_share(p, drop=0.3, until=0.75), 3) for p in (0.0, 0.375, 0.75, 1.0)]
        [0.3, 0.15, 0.0, 0.0]
    """
    return drop / 2 * (1 + math.cos(math.pi * done / until)) if done < until else 0.0


def drop_and_grow(active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
    """Drop the ``count`` active cells that are smallest, and grow as many where the growth score is largest.

    What was just dropped may grow again (Evci et al. 2020, section 3: all that is not kept).

    Args:
        active: Before, (cells,).
        magnitude: Of the weights, (cells,).
        growth: Scores, (cells,).
        count: How many; at most the active ones.

    Returns:
        Active cells afterwards, (cells,), as many as before.

    Example:
        >>> active, magnitude = torch.tensor([True, True, False, False]), torch.tensor([3.0, 1.0, 0.0, 0.0])
        >>> drop_and_grow(active, magnitude, torch.tensor([9.0, 2.0, 1.0, 5.0]), count=1)
        tensor([ True, False, False,  True])
    """
    kept = active.clone()
    kept[magnitude.masked_fill(~active, math.inf).topk(count, largest=False).indices] = False
    grown = growth.masked_fill(kept, -math.inf).topk(count).indices
    kept[grown] = True
    return kept


def swap_in_fours(active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
    """The same where two of each four in a row stay active: the smallest are dropped, and their own four grows another.

    Example:
        >>> active = torch.tensor([True, True, False, False])
        >>> swap_in_fours(active, torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([9.0, 2.0, 1.0, 5.0]), count=1)
        tensor([ True, False, False,  True])
    """
    fours, rows = active.view(-1, 4).clone(), torch.arange(len(active) // 4, device=active.device)
    smallest = magnitude.view(-1, 4).masked_fill(~fours, math.inf).min(1)
    largest = growth.view(-1, 4).masked_fill(fours, -math.inf).max(1)
    chosen = smallest.values.topk(min(count, len(fours)), largest=False).indices
    fours[rows[chosen], smallest.indices[chosen]] = False
    fours[rows[chosen], largest.indices[chosen]] = True
    return fours.flatten()


class DynamicSparsity(Technique):
    """Trains a share of the network's weights, and moves that share to where it is needed.

    With ``granularity="unit"`` whole feed-forward neurons and attention heads are left out: their layers multiply
    shorter matrices, in forward and backward. A unit whose weights are all 0 has no gradient, so at a step that grows
    all units are present, those that are inactive with new random weights leading in and zeros leading out, which
    leaves the function as it is; the score is the norm of their gradient, and a grown unit keeps these weights. With
    the other granularities grown weights are 0, and nothing is saved but theoretical FLOPs, reported as
    ``sparse_flops``.

    Args:
        density: Share of the weights, or of the units of each layer, that is active, in (0, 1].
        granularity: ``"unit"``; or single weights, square tiles of them (``"block"``), two of each four (``"2:4"``).
        grow: Where the ``"gradient"`` is largest (RigL), or at ``"random"`` (SET).
        distribution: All layers alike (``"uniform"``), or by the Erdos-Renyi-kernel rule (``"erk"``), which is the
            default for weights and blocks (Evci et al. 2020, section 3).
        drop: Share of the active ones that is exchanged by the first update (0.3 in RigL); it falls to 0 at ``until``.
            With 0 the first choice, at random, lasts: a network that is smaller from the start.
        every: Optimizer steps from update to update (int), or a share of the run (float); by default 100 as in RigL, or
            a tenth of the run where that is less.
        until: Share of the run with updates (0.75 in RigL).
        units: Which units: ``"all"`` that are found, ``"neurons"``, or ``"heads"``.
        tile: Side of the tiles of ``"block"``.
        layers: Dotted paths of the matrices, or of parts that hold them, for all but ``"unit"``; by default all inside
            of blocks.
        seed: Of the random choices, which are a function of (seed, step, layer).
        blocks: Dotted path of the list of blocks, needed only where it cannot be found.

    Raises:
        ValueError: At construction or in ``setup``, for arguments that do not fit each other or the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[DynamicSparsity(density=0.5)], logger=False)
    """

    factor = "weights"

    def __init__(
        self,
        density: float = 0.5,
        *,
        granularity: Granularity = "unit",
        grow: Literal["gradient", "random"] = "gradient",
        distribution: Literal["uniform", "erk"] | None = None,
        drop: float = 0.3,
        every: int | float | None = None,
        until: float = 0.75,
        units: UnitKind = "all",
        tile: int = 16,
        layers: list[str] | None = None,
        seed: int = 0,
        blocks: str | None = None,
    ) -> None:
        self.density, self.granularity, self.grow = density, granularity, grow
        self.distribution = distribution or ("erk" if granularity in ("weight", "block") else "uniform")
        self.drop, self.until = drop, until
        self.every = None if every is None else number_or_share(every)
        self.units, self.tile, self.layers, self.seed, self.blocks = units, tile, layers, seed, blocks
        self._check_arguments()
        self._interval = 1  # optimizer steps from update to update
        self._decided_at = -1
        self._due = False  # an update follows the step at work
        self._dense = False  # that step took the dense gradient
        self._everything = False  # all units are present
        self._ended = False  # training has; steps are only replayed
        self._off = False  # the clock prices a dense step
        self._growth: dict[str, Tensor] = {}  # scores of the step at work, by layer
        self._drawn: dict[str, list[Tensor]] = {}  # weights leading into units that may grow
        self._handles: list[Any] = []
        self._parts: list[Cells | UnitGroup] = []
        self._masks: WeightMasks

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        for name, value, known in (
            ("granularity", self.granularity, ("unit", "weight", "block", "2:4")),
            ("grow", self.grow, ("gradient", "random")),
            ("distribution", self.distribution, ("uniform", "erk")),
            ("units", self.units, ("all", "neurons", "heads")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density={self.density} is not a share of the weights in (0, 1], such as 0.5")
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"drop={self.drop} is not a share of the active weights in [0, 1)")
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"until={self.until} is not a share of the run in (0, 1]")
        if self.every is not None and not (self.every >= 1 if isinstance(self.every, int) else 0 < self.every < 1):
            raise ValueError(f"every={self.every!r} is neither a number of steps nor a share of the run in (0, 1)")
        if self.granularity == "2:4" and self.density != 0.5:
            raise ValueError(f"density={self.density} with granularity='2:4': two of four are 0.5")
        if self.granularity in ("unit", "2:4") and self.distribution == "erk":
            raise ValueError(f"distribution='erk' does not go with granularity={self.granularity!r}; use 'uniform'")
        if self.granularity == "unit" and self.layers is not None:
            raise ValueError("layers names matrices; with granularity='unit' choose by units='neurons' or 'heads'")
        if self.tile < 2:
            raise ValueError(f"tile={self.tile}: the side of a tile is at least 2; for single weights use 'weight'")

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        names = "density granularity grow distribution drop every until units tile layers seed blocks"
        return {name: getattr(self, name) for name in names.split()}

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
        """How many cells or units of each layer are active."""
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
        """Find the layers and draw the first masks; a checkpoint brings its own."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return  # what is masked is 0: the plain network is the sparse one
        goes_on = {part.name: part.active.cpu() for part in self._parts} if trainer.global_step else {}
        self._parts, self._due, self._masks = self._find(pl_module), False, WeightMasks(pl_module)
        for part, count in zip(self._parts, self._counts(self._parts), strict=True):
            scores = self._random(part, 0, "first")
            if self.granularity == "2:4":
                chosen = scores.view(-1, 4).argsort(1)[:, :2] + 4 * torch.arange(len(scores) // 4)[:, None]
            else:
                chosen = scores.argsort()[:count]
            first = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, chosen.flatten(), True)
            part.active = goes_on.get(part.name, first)
            if isinstance(part, Cells):  # from setup on, so that whoever listens to gradients later hears these
                self._handles.append(part.parameter.register_hook(partial(self._sparse, part.parameter)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the weights, now that a checkpoint has been read and the device is known."""
        self._decided_at, self._due, self._ended, self._everything = -1, False, False, False
        self._interval = self._steps_between(trainer)
        self._masks = WeightMasks(pl_module)
        for part in self._parts:
            if isinstance(part, Cells):
                part.active = part.active.to(part.parameter.device)
                self._handles.append(part.watch())
            else:
                part.attach()
                part.show(part.active)
            self._mask(part)
        self._masks.zero_weights(averages(trainer))
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after_step(trainer)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide, once per optimizer step, whether an update follows it."""
        step = trainer.global_step
        if step != self._decided_at:
            self._decided_at = step
            moves = self.drop > 0 and self.density < 1
            if moves and step > 0 and step % self._interval == 0 and progress(trainer) < self.until:
                with charge(trainer, "mask update"):
                    self._prepare(True)
            else:
                self._prepare(False)
        for part in self._parts:
            if isinstance(part, Cells):
                part.begin()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the scores from the dense gradient, then let it be that of the sparse network, before it is clipped."""
        if self._off:
            return
        if self._growing:
            self._growth = {part.name: score for part in self._parts if (score := part.growth()) is not None}
            if self.granularity == "unit":
                self._masks.zero_weights()
                self._show(everything=False)
        self._masks.zero_gradients()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on steps are only replayed."""
        self._ended = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a plain model behind."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave a plain model behind."""
        self._detach()

    # -- the technique ------------------------------------------------------------------------------------------------

    @property
    def _growing(self) -> bool:
        """The step at work needs the dense gradient."""
        return self._due and self.grow == "gradient"

    def _steps_between(self, trainer: Trainer) -> int:
        if isinstance(self.every, int):
            return self.every
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != math.inf:
            limits.append(-(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches) * trainer.max_epochs)
        if self.every is not None and not limits:
            raise ValueError(f"every={self.every}: the run's steps cannot be told ahead; give a number of steps")
        share = self.every or _EVERY_OF_SHORT
        steps = max(1, round(share * min(limits))) if limits else _EVERY
        return steps if self.every is not None else min(_EVERY, steps)

    def _random(self, part: Cells | UnitGroup, step: int, what: str) -> Tensor:
        return torch.rand(len(part.active), generator=self._generator(part, step, what))

    def _generator(self, part: Cells | UnitGroup, step: int, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, step, part.name, what))

    def _prepare(self, due: bool) -> None:
        """Before a step that an update follows: draw what may grow, and let all units be present for its gradient."""
        self._due, self._growth, self._drawn = due, {}, {}
        self._dense = self._growing
        if self.granularity != "unit":
            return
        if due:
            for part in cast(list[UnitGroup], self._parts):
                self._drawn[part.name] = part.draw(self._generator(part, self._decided_at, "weights"))
                if self._growing:
                    part.fill(~part.active, self._drawn[part.name])
        self._show(everything=self._growing)

    def _show(self, everything: bool) -> None:
        if everything != self._everything:
            self._everything = everything
            for part in cast(list[UnitGroup], self._parts):
                part.show(None if everything else part.active)

    def _sparse(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """The gradient of the sparse network, for what takes its norm before all of it is there; None leaves it."""
        mask = self._masks.masks.get(parameter)  # none before training starts
        return None if mask is None or self._off or self._growing else gradient * mask

    def _mask(self, part: Cells | UnitGroup) -> None:
        for parameter, mask in part.masks():
            self._masks.set(parameter, mask)

    def _after_step(self, trainer: Trainer) -> None:
        """Behind the optimizer, whichever it is, and before anybody averages or saves the weights."""
        if self._off:
            return
        due, self._due = self._due, False
        self._masks.zero_weights()
        self._masks.zero_codes(trainer.optimizers)
        if due and not self._ended:
            with charge(trainer, "mask update"):
                share = drop_share(progress(trainer), self.drop, self.until)
                for part in self._parts:
                    if self.grow == "random" or part.name in self._growth:
                        self._update(trainer, part, share)
                self._masks.zero_weights(averages(trainer))
        self._growth, self._drawn = {}, {}

    def _update(self, trainer: Trainer, part: Cells | UnitGroup, share: float) -> None:
        """Algorithm 1, lines 8 to 14, for one layer."""
        old, before = part.active, dict(part.masks())
        growth = self._growth.get(part.name)
        if growth is None:
            growth = self._random(part, trainer.global_step, "growth").to(old.device)
        count = int(share * int(old.sum()))
        if isinstance(part, UnitGroup):  # gradients of active units, in and out, do not compare with those of new ones
            count, growth = min(count, int((~old).sum())), growth.masked_fill(old, -1.0)
        rule = swap_in_fours if self.granularity == "2:4" else drop_and_grow
        part.active = rule(old, part.magnitude(), growth, count)
        self._mask(part)
        for parameter, mask in part.masks():
            zero_slots(trainer.optimizers, parameter, self._masks.masks[parameter] & before[parameter].to(mask.device))
        if isinstance(part, UnitGroup):
            part.fill(part.active & ~old, self._drawn[part.name])
            part.show(part.active)

    def on_copy(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Let copied weights have the mask of their originals."""
        parts = {part.key: part for part in self._parts}
        for source, target in pairs:
            if source in parts and target in parts:
                part = parts[target]
                part.active = parts[source].active.clone()
                self._mask(part)
                if isinstance(part, UnitGroup) and not self._everything:
                    part.show(part.active)
        self._masks.zero_weights()
        self._prepare(self._due)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.granularity == "unit":
            for part in cast(list[UnitGroup], self._parts):
                part.release()

    # -- state and the clock ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks, eight entries a byte, the same on all ranks."""
        return {"masks": {part.name: pack_bits(part.active) for part in self._parts}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the masks of a checkpoint."""
        masks = state_dict["masks"]
        if self._parts and (other := {part.name for part in self._parts} ^ masks.keys()):
            raise ValueError(f"the checkpoint's masks are of other layers: {', '.join(sorted(other))}; use its model")
        for part in self._parts:
            part.active = unpack_bits(masks[part.name], len(part.active))

    def is_plain(self) -> bool:
        """Nothing is left out."""
        return self._off or self.density == 1.0

    def plain_step_kind(self) -> dict[str, Any]:
        """All weights are there."""
        return {"density": 1.0, "growing": False}

    def step_kind(self) -> dict[str, Any]:
        """The density, and whether the dense gradient is needed."""
        return {"density": 1.0 if self._off else self.density, "growing": self._growing}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Let all units be present, or not, as in an earlier step."""
        self._off = kind["density"] != self.density
        self._prepare(kind["growing"])
        if self._off and self.granularity == "unit":
            self._show(everything=True)

    def skipped_flops(self) -> int:
        """FLOPs that only a kernel for sparse matrices would leave out: forward, and both gradients."""
        products = 2 if self._dense else 3  # the dense gradient of the weights is needed where some grow
        return sum(p.skipped(products) for p in self._parts if isinstance(p, Cells))
