"""Dynamic sparsity: a sparse network from the start, whose connections move (RigL, Evci et al. 2020, algorithm 1).

    every T steps, in each layer: drop the share a/2 (1 + cos(pi t / t_end)) of the weights that is smallest, then
    grow as many where the dense gradient is largest (RigL), or anywhere (SET, Mocanu et al. 2018)

By single weights it saves FLOPs on paper and no time; by whole neurons and heads the products become really shorter.
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


class DynamicSparsity(SparseWeights):
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
        self._interval = 1  # optimizer steps from update to update
        self._due = False  # an update follows the current step
        self._growth: dict[str, Tensor] = {}  # scores of the current step, by layer
        self._drawn: dict[str, list[Tensor]] = {}  # weights leading into units that may grow

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return super().settings() | {name: getattr(self, name) for name in ("grow", "drop", "every", "until")}

    # -- the algorithm ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle when updates come."""
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
        """Whether an update follows this step."""
        step, moves = trainer.global_step, self.drop > 0 and self.density < 1
        if moves and step > 0 and step % self._interval == 0 and progress(trainer) < self.until:
            with charge(trainer, "mask update"):
                self._prepare(True)
        else:
            self._prepare(False)

    def _prepare(self, due: bool) -> None:
        """Before a step that an update follows: draw what may grow, and compute all units for their gradient."""
        self._due, self._growth, self._drawn = due, {}, {}
        self.dense_gradient = due and self.grow == "gradient"
        for part in self.parts if due else ():
            if isinstance(part, UnitGroup):
                drawn = self._drawn[part.name] = part.draw(self.generator(part, self._decided_at, "weights"))
                if self.dense_gradient:
                    part.fill(~part.active, drawn)
        self.show(everything=self.dense_gradient or self._off)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the scores from the dense gradient, then let it be that of the sparse network."""
        if self._growing and not self._off:
            self._growth = {part.name: score for part in self.parts if (score := part.growth()) is not None}
            if self.granularity == "unit":
                self._masks.zero_weights()
                self.show(everything=False)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def after_step(self, trainer: Trainer) -> None:
        """Algorithm 1, lines 6 to 16: update the layers that ran."""
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
        if isinstance(part, UnitGroup):  # gradients of active units, in and out, do not compare with those of new ones
            count, growth = min(count, int((~old).sum())), growth.masked_fill(old, -1.0)
        rule = swap_in_fours if self.granularity == "2:4" else drop_and_grow
        self.set_active(trainer, part, rule(old, part.magnitude(), growth, count))
        if isinstance(part, UnitGroup):
            part.fill(part.active & ~old, self._drawn[part.name])

    def on_copy(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Give copied weights the mask of their originals, and draw anew what may grow."""
        super().on_copy(pairs)
        self._prepare(self._due)

    # -- the clock ----------------------------------------------------------------------------------------------------

    @property
    def _growing(self) -> bool:
        """The current step needs the dense gradient, and has not been taken yet."""
        return self._due and self.dense_gradient

    def plain_step_kind(self) -> dict[str, Any]:
        """All weights are active."""
        return {"density": 1.0, "growing": False}

    def step_kind(self) -> dict[str, Any]:
        """The density, and whether the dense gradient is needed."""
        return super().step_kind() | {"growing": self._growing}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Let all units be computed, or not, as in an earlier step."""
        super().impose_step_kind(trainer, pl_module, kind)
        self._prepare(kind["growing"])
