"""Dynamic sparsity: train a sparse network and move its active weights (RigL, Evci et al. 2020, algorithm 1).

    every T steps, in each layer: drop the share a/2 (1 + cos(pi t / t_end)) of the active weights that is smallest,
    then grow as many where the dense gradient is largest (RigL), or at random (SET, Mocanu et al. 2018)

With single weights this saves theoretical FLOPs and no time. With whole neurons and heads the matrix products become
shorter, which saves time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.cost import charge
from lit_scale.factors.sparse_weights import Granularity, SparseWeights, one_of
from lit_scale.factors.units import UnitGroup, UnitKind
from lit_scale.factors.weights import Cells
from lit_scale.progress import progress, total_steps
from lit_scale.schedules import number_or_share

__all__ = ["DynamicSparsity", "drop_and_grow", "drop_share", "swap_in_fours"]

_EVERY = 100  # steps between two updates in RigL; in a short run, the share of the run below
_EVERY_OF_SHORT = 0.1


def drop_share(done: float, drop: float, until: float) -> float:
    """Share of the active weights that an update replaces: half a cosine from ``drop`` to 0 at ``until``.

    Example:
        >>> [round(drop_share(p, drop=0.3, until=0.75), 3) for p in (0.0, 0.375, 0.75, 1.0)]
        [0.3, 0.15, 0.0, 0.0]
    """
    return drop / 2 * (1 + math.cos(math.pi * done / until)) if done < until else 0.0


def drop_and_grow(active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
    """Drop the ``count`` smallest active cells, and grow as many where the growth score is largest.

    A cell that was just dropped may grow again (Evci et al. 2020, section 3: all that is not kept).

    Args:
        active: Mask before the update, (cells,).
        magnitude: Magnitudes of the weights, (cells,).
        growth: Growth scores, (cells,).
        count: Number of cells to replace, at most the number of active ones.

    Returns:
        Mask after the update, (cells,), with as many active cells as before.

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
    """Like :func:`drop_and_grow` for 2:4 sparsity: a group of four that drops a cell grows another of its own.

    Two cells of each group of four stay active. Arguments and result are those of :func:`drop_and_grow`.

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


class DynamicSparsity(SparseWeights):
    """Trains a share of the network's weights, and changes during training which ones these are.

    With ``granularity="unit"`` whole feed-forward neurons and attention heads are left out: their layers multiply
    shorter matrices, in forward and backward. A unit whose weights are all 0 has no gradient. So at a step that is
    followed by growth all units are computed, the inactive ones with new random input weights and output weights of 0,
    which does not change the function. A unit's growth score is the norm of its gradient, and a grown unit keeps these
    weights. With the other granularities grown weights are 0, and only theoretical FLOPs are saved, reported as
    ``sparse_flops``.

    Args:
        density: Share of the weights, or of the units of each layer, that is active, in (0, 1].
        granularity: ``"unit"``, ``"weight"`` (single weights), ``"block"`` (square tiles of weights), or ``"2:4"`` (two
            of each group of four).
        grow: ``"gradient"``: grow where the gradient is largest (RigL); ``"random"``: anywhere (SET).
        distribution: ``"uniform"``: equal density in all layers; ``"erk"``: the Erdos-Renyi-kernel rule (Evci et al.
            2020, section 3). By default ``"erk"`` for ``"weight"`` and ``"block"``, else ``"uniform"``.
        drop: Share of the active cells that the first update replaces (0.3 in RigL); it falls to 0 at ``until``. With 0
            the initial random choice is kept, which makes a network that is smaller from the start.
        every: Optimizer steps between updates (int), or a share of the run (float); by default 100 as in RigL, or a
            tenth of the run if that is less.
        until: Share of the run with updates (0.75 in RigL).
        units: Which units can be left out: ``"all"`` that are found, ``"neurons"``, or ``"heads"``.
        tile: Side of a tile for ``"block"``, in weights.
        layers: Dotted paths of weight matrices, or of modules that hold them, for all granularities but ``"unit"``; by
            default all matrices inside the blocks.
        seed: Seed of the random choices, which are a function of (seed, step, layer).
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Raises:
        ValueError: At construction or in ``setup``, for arguments that do not fit each other or the model; at the start
            of training, if ``every`` is a share and the length of the run is unknown.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[DynamicSparsity(density=0.5)], logger=False)
    """

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
        super().__init__(
            density,
            granularity=granularity,
            distribution=distribution,
            units=units,
            tile=tile,
            layers=layers,
            seed=seed,
            blocks=blocks,
        )
        one_of("grow", grow, ("gradient", "random"))
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"drop={drop} is not a share of the active weights in [0, 1)")
        if not 0.0 < until <= 1.0:
            raise ValueError(f"until={until} is not a share of the run in (0, 1]")
        self.grow, self.drop, self.until = grow, drop, until
        self.every = None if every is None else number_or_share(every)
        if self.every is not None and not (self.every >= 1 if isinstance(self.every, int) else 0 < self.every < 1):
            raise ValueError(f"every={self.every!r} is neither a number of steps nor a share of the run in (0, 1)")
        self._interval = 1  # optimizer steps between two updates
        self._due = False  # whether an update follows the current step
        self._growth: dict[str, Tensor] = {}  # growth scores of the current step, by layer
        self._drawn: dict[str, list[Tensor]] = {}  # input weights of units that may grow, by layer

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return super().settings() | {name: getattr(self, name) for name in ("grow", "drop", "every", "until")}

    # -- the algorithm ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the interval between updates."""
        self._due, self._interval = False, self._steps_between(trainer)
        super().on_train_start(trainer, pl_module)

    def _steps_between(self, trainer: Trainer) -> int:
        if isinstance(self.every, int):
            return self.every
        steps = total_steps(trainer)
        if self.every is not None and steps is None:
            raise ValueError(f"every={self.every}: the run's number of steps is unknown; give a number of steps")
        between = _EVERY if steps is None else max(1, round((self.every or _EVERY_OF_SHORT) * steps))
        return between if self.every is not None else min(_EVERY, between)

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether an update follows this step, and prepare for it."""
        step, moves = trainer.global_step, self.drop > 0 and self.density < 1
        if moves and step > 0 and step % self._interval == 0 and progress(trainer) < self.until:
            with charge(trainer, "mask update"):
                self._prepare(True)
        else:
            self._prepare(False)

    def _prepare(self, due: bool) -> None:
        """Before a step that is followed by an update: draw weights for units that may grow, and compute all units."""
        self._due, self._growth, self._drawn = due, {}, {}
        self.dense_gradient = due and self.grow == "gradient"
        for part in self.parts if due else ():
            if isinstance(part, UnitGroup):
                drawn = self._drawn[part.name] = part.draw(self.generator(part, self._decided_at, "weights"))
                if self.dense_gradient:
                    part.fill(~part.active, drawn)
        self.show(everything=self.dense_gradient or self._off)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the growth scores from the dense gradient, then reduce it to the gradient of the sparse network."""
        if self._growing and not self._off:
            self._growth = {part.name: score for part in self.parts if (score := part.growth()) is not None}
            if self.granularity == "unit":
                self._masks.zero_weights()
                self.show(everything=False)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def after_step(self, trainer: Trainer) -> None:
        """Algorithm 1, lines 6 to 16: update the masks of the layers that ran."""
        due, self._due = self._due, False
        if due:
            with charge(trainer, "mask update"):
                share = drop_share(progress(trainer), self.drop, self.until)
                for part in self.parts:
                    if self.grow == "random" or part.name in self._growth:
                        self._update(trainer, part, share)
        self._growth, self._drawn = {}, {}

    def _update(self, trainer: Trainer, part: Cells | UnitGroup, share: float) -> None:
        """Algorithm 1, lines 8 to 14, for one layer."""
        old, growth = part.active, self._growth.get(part.name)
        if growth is None:
            growth = self.random(part, trainer.global_step, "growth").to(old.device)
        count = int(share * int(old.sum()))
        if isinstance(part, UnitGroup):  # gradients of active and of new units are on different scales: grow new ones
            count, growth = min(count, int((~old).sum())), growth.masked_fill(old, -1.0)
        rule = swap_in_fours if self.granularity == "2:4" else drop_and_grow
        self.set_active(trainer, part, rule(old, part.magnitude(), growth, count))
        if isinstance(part, UnitGroup):
            part.fill(part.active & ~old, self._drawn[part.name])

    def on_copy(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Give copied weights the mask of their originals, and draw new weights for units that may grow."""
        super().on_copy(pairs)
        self._prepare(self._due)

    # -- the clock ----------------------------------------------------------------------------------------------------

    @property
    def _growing(self) -> bool:
        """Whether the current step needs the dense gradient."""
        return self._due and self.dense_gradient

    def plain_step_kind(self) -> dict[str, Any]:
        """All weights are active."""
        return {"density": 1.0, "growing": False}

    def step_kind(self) -> dict[str, Any]:
        """The density, and whether the dense gradient is needed."""
        return super().step_kind() | {"growing": self._growing}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Compute all units or the active ones only, as in a step of this kind."""
        super().impose_step_kind(trainer, pl_module, kind)
        self._prepare(kind["growing"])
