"""Progressive stacking (Gong et al., ICML 2019, algorithm 1): train a shallow network, then deepen it with copies.

    for each stage: train the active blocks; then copy block l - L into block l, where L is the old depth

The cost of a step is proportional to the depth. The default stages (1/4 of the depth for half of the run, 1/2 for a
quarter, then all blocks) make half of the block work of a full run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_scale.cost import charge
from lit_scale.factors.active_blocks import ActiveBlocks
from lit_scale.factors.blocks import count_blocks
from lit_scale.factors.optimizers import MomentRule, scale_rates, transfer_state
from lit_scale.progress import progress
from lit_scale.schedules import check_starts, rewarmup, stage_at

__all__ = ["ProgressiveStacking", "blocks_at_depth", "growth_map"]

Growth = Literal["stack", "interleave"]
Stages = Sequence[tuple[float, int | float]]  # int before float: the command line takes the first type that fits


def blocks_at_depth(depth: int, total: int, growth: Growth = "stack") -> tuple[int, ...]:
    """Which of ``total`` blocks are active at a depth: the lowest ones, or with interleaving evenly spaced ones.

    Example:
        >>> blocks_at_depth(2, 8, "stack"), blocks_at_depth(2, 8, "interleave")
        ((0, 1), (0, 4))
    """
    return tuple(range(depth)) if growth == "stack" else tuple(range(0, total, total // depth))


def growth_map(old: Sequence[int], new: Sequence[int], growth: Growth = "stack") -> dict[int, int]:
    """Source of each newly active block: block l - L for stacking, the next active block below for interleaving.

    Args:
        old: Active blocks before the growth.
        new: Active blocks after it, a superset.
        growth: The growth operator.

    Returns:
        A dict from target to source.

    Example:
        >>> growth_map((0, 1), (0, 1, 2, 3), "stack"), growth_map((0, 4), (0, 2, 4, 6), "interleave")
        ({2: 0, 3: 1}, {2: 0, 6: 4})
    """
    joining = [block for block in new if block not in old]
    if growth == "stack":
        return {block: old[block % len(old)] for block in joining}
    return {block: max(o for o in old if o < block) for block in joining}


class ProgressiveStacking(ActiveBlocks):
    """Trains a shallow network first and deepens it by copying its own blocks.

    Build the network at full depth; the callback decides which of its blocks run. Resuming is exact for runs limited by
    steps or epochs; with ``max_time`` the step at which the network grows depends on the clock.

    Args:
        stages: (start, depth) pairs; starts are fractions of the run, ascending from 0 and below 1; depths ascend, each
            a multiple of the one before, as a fraction of the blocks (float) or a number of blocks (int).
        growth: ``"stack"`` puts the copies on top (block l copies l - L), ``"interleave"`` puts each copy directly
            above its original.
        moments: How the optimizer state is transferred; see :func:`lit_scale.factors.optimizers.transfer_state`.
        rewarmup: Fraction of the run over which the learning rate rises from 0 again after each growth; 0 is off.
        freeze_old: In every growth stage but the last, train only the new blocks and the layers above them (MSLT, Yang
            et al. 2020): gradients stop at the first new block. Under DDP this needs
            ``ddp_find_unused_parameters_true``.
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Raises:
        ValueError: At construction or in ``setup``, if the stages do not ascend or do not fit the model, or the
            Trainer's strategy is not supported.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> stacking = ProgressiveStacking(stages=[(0.0, 0.25), (0.2, 0.5), (0.5, 1.0)])
        >>> trainer = Trainer(max_steps=1_000, callbacks=[stacking], logger=False)
    """

    joins_late = False

    def __init__(
        self,
        stages: Stages = ((0.0, 0.25), (0.5, 0.5), (0.75, 1.0)),
        *,
        growth: Growth = "stack",
        moments: MomentRule = "copy",
        rewarmup: float = 0.0,
        freeze_old: bool = False,
        blocks: str | None = None,
    ) -> None:
        super().__init__(blocks)
        self.stages = check_starts(stages, "depth")
        self.growth: Growth = growth
        self.moments: MomentRule = moments
        self.rewarmup, self.freeze_old = rewarmup, freeze_old
        self._check_arguments()
        self._starts = [start for start, _ in self.stages]
        self._depths: list[int] = []  # depth of each stage in blocks, from setup on
        self._stage = 0
        self._frozen = 0  # number of the lowest blocks that are not trained
        self._thaw: Callable[[], None] | None = None

    def _check_arguments(self) -> None:
        if self.growth not in ("stack", "interleave"):
            raise ValueError(f"growth={self.growth!r}: choose 'stack' or 'interleave'")
        if self.moments not in ("copy", "copy_step0", "reset"):
            raise ValueError(f"moments={self.moments!r}: choose 'copy', 'copy_step0' or 'reset'")
        if not 0.0 <= self.rewarmup < 1.0:
            raise ValueError(f"rewarmup={self.rewarmup} is not a fraction of the run in [0, 1)")
        if self.freeze_old and self.growth != "stack":
            raise ValueError("freeze_old=True needs growth='stack': interleaved copies have old blocks above them")

    def _resolve_depths(self, total: int) -> list[int]:
        """The depth of each stage in blocks, for a model of ``total`` blocks."""
        depths = [count_blocks(depth, total, f"stages={self.stages}") for _, depth in self.stages]
        if max(depths) > total:
            raise ValueError(f"stages={self.stages}: depth {max(depths)} is more than the {total} blocks of the model")
        for old, new in zip(depths, depths[1:], strict=False):
            if new <= old or new % old:
                raise ValueError(
                    f"stages={self.stages}: depth {new} is not a multiple of the depth before it, {old}; each stage "
                    f"stacks whole copies, so grow to {2 * old}, {3 * old}, ..."
                )
        if self.growth == "interleave" and any(total % depth for depth in depths):
            raise ValueError(f"growth='interleave' spaces blocks evenly, so the depths {depths} must divide {total}")
        return depths

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        names = ("growth", "moments", "rewarmup", "freeze_old", "blocks")
        return {"stages": [list(stage) for stage in self.stages]} | {name: getattr(self, name) for name in names}

    # -- the algorithm ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse stages that do not fit the model; activate the blocks of the first stage in a new run."""
        super().setup(trainer, pl_module, stage)
        self._depths = self._resolve_depths(len(self.stack))

    def check_ddp(self, options: Mapping[str, Any]) -> None:
        """Require ``find_unused_parameters`` for ``freeze_old``."""
        super().check_ddp(options)
        if self.freeze_old and not options.get("find_unused_parameters"):
            raise ValueError("freeze_old=True needs strategy='ddp_find_unused_parameters_true'")

    def first_blocks(self) -> tuple[int, ...]:
        """The blocks of the first stage."""
        return self.blocks_of_kind(self._resolve_depths(len(self.stack))[0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Derive the stage from the active blocks, which a checkpoint may have restored."""
        self._stage = 0 if self._begins else self._stage_of(self.stack.active)
        super().on_train_start(trainer, pl_module)
        self._freeze_old()
        self.undo_later(partial(self._freeze, 0))
        for optimizer in trainer.optimizers if self.rewarmup else ():
            self.undo_later(scale_rates(optimizer, partial(self._rewarmed, trainer)))

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Grow when the next stage has begun."""
        if self.moments == "copy_step0":
            transfer_state(trainer.optimizers, [], self.moments)  # refuses an unsuitable optimizer before the growth
        due = stage_at(progress(trainer), self._starts)
        while self._stage < due:
            with charge(trainer, "growth"):
                self._grow(trainer, pl_module)
            depth = self._depths[self._stage]
            rank_zero_info(f"ProgressiveStacking: {depth} blocks from step {trainer.global_step} on")

    def _grow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Algorithm 1, line 4: deepen by one stage."""
        new = self.blocks_of_kind(self._depths[self._stage + 1])
        self.copy_blocks(trainer, growth_map(self.stack.active, new, self.growth), self.moments)
        self._stage += 1
        self.activate(trainer, pl_module, new)
        self._freeze_old()

    def _stage_of(self, active: tuple[int, ...]) -> int:
        stages = [self.blocks_of_kind(depth) for depth in self._depths]
        if active not in stages:
            raise ValueError(
                f"the model comes with blocks {active} of {len(self.stack)} active, as in no stage of "
                f"stages={self.stages}, growth={self.growth!r}; go on with the arguments it was trained with"
            )
        return stages.index(active)

    def _rewarmed(self, trainer: Trainer) -> float:
        """Factor on the learning rate."""
        return rewarmup(progress(trainer), self._starts[self._stage], self.rewarmup) if self._stage else 1.0

    def _freeze_old(self) -> None:
        """MSLT: in growth stages but the last, train only the new blocks and the layers above them."""
        between = self.freeze_old and 0 < self._stage < len(self.stages) - 1
        self._freeze(self._depths[self._stage - 1] if between else 0)

    def _freeze(self, count: int) -> None:
        """Stop gradients above the lowest ``count`` blocks, so that these and the embedding are not trained."""
        if self._thaw is not None:
            self._thaw()
        self._frozen, self._thaw = count, None
        if count:
            self._thaw = self.stack.cut(count)

    def blocks_of_kind(self, count: int) -> tuple[int, ...]:
        """The active blocks of a stage with ``count`` blocks."""
        return blocks_at_depth(count, len(self.stack), self.growth)

    # -- logs and the clock -------------------------------------------------------------------------------------------

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """The number of active blocks."""
        return {"active_blocks": float(len(self.stack.active))}

    def plain_step_kind(self) -> dict[str, Any]:
        """All blocks run and train."""
        return {"blocks": len(self.stack), "frozen": 0}

    def step_kind(self) -> dict[str, Any]:
        """The number of active blocks, and how many of them are frozen."""
        return super().step_kind() | {"frozen": self._frozen}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Activate and freeze blocks as in a step of this kind, without copying weights."""
        super().impose_step_kind(trainer, pl_module, kind)
        self._freeze(kind["frozen"])
