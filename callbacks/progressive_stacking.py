"""Progressive stacking (Gong et al., ICML 2019, algorithm 1): train a shallow network, then deepen it with copies.

    for each stage: train the active blocks; then let block l start as a copy of block l - L, L the old depth

A step's cost falls with the depth: with 1/4, 1/2 and all blocks for a third of the run each, to 58% of the block work.
The network itself is built at full depth; blocks that wait their turn are skipped and have no gradient.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_scale.cost import charge
from lit_scale.factors.blocks import BlockStack, find_blocks
from lit_scale.factors.optimizers import MomentRule, scale_rates, transfer_state
from lit_scale.progress import progress
from lit_scale.schedules import check_starts, rewarmup, stage_at
from lit_scale.technique import Technique, averages

__all__ = ["ProgressiveStacking", "blocks_at_depth", "growth_map"]

Growth = Literal["stack", "interleave"]
Stages = Sequence[tuple[float, int | float]]  # int first: flags are read as the first type that fits


def blocks_at_depth(depth: int, total: int, growth: Growth = "stack") -> tuple[int, ...]:
    """Which of ``total`` blocks are active at a depth: the lowest ones, or for interleaving evenly spaced ones.

    Example:
        >>> blocks_at_depth(2, 8, "stack"), blocks_at_depth(2, 8, "interleave")
        ((0, 1), (0, 4))
    """
    return tuple(range(depth)) if growth == "stack" else tuple(range(0, total, total // depth))


def growth_map(old: Sequence[int], new: Sequence[int], growth: Growth = "stack") -> dict[int, int]:
    """Where each newly active block is copied from: block l - L for stacking, the next one below for interleaving.

    Args:
        old: Active blocks before the growth.
        new: Active blocks after it, a superset.
        growth: The growth operator.

    Returns:
        Target to source.

    Example:
        >>> growth_map((0, 1), (0, 1, 2, 3), "stack"), growth_map((0, 4), (0, 2, 4, 6), "interleave")
        ({2: 0, 3: 1}, {2: 0, 6: 4})
    """
    joining = [block for block in new if block not in old]
    if growth == "stack":
        return {block: old[block % len(old)] for block in joining}
    return {block: max(o for o in old if o < block) for block in joining}


class ProgressiveStacking(Technique):
    """Trains a shallow network first and deepens it by copying its own blocks.

    The network must be built at full depth; the callback decides which of its blocks run. Exact resume holds for runs
    limited by steps or epochs; with ``max_time`` the moment of a growth depends on the clock.

    Args:
        stages: (start, depth) pairs; starts are fractions of the run, ascending from 0 and below 1; depths ascend, each
            a multiple of the one before, as a fraction of the blocks (float) or a number of blocks (int).
        growth: ``"stack"`` puts the copies on top (block l copies l - L), ``"interleave"`` each above its original.
        moments: What becomes of the optimizer state; see :func:`lit_scale.factors.optimizers.transfer_state`.
        rewarmup: Fraction of the run over which the learning rate climbs back from 0 after each growth; 0 is off.
        freeze_old: Train only what lies above the old blocks in every growth stage but the last (MSLT, Yang et al.
            2020): gradients stop at the first new block. Under DDP this needs ``ddp_find_unused_parameters_true``.
        blocks: Dotted path of the list of blocks, needed only where it cannot be found.

    Raises:
        ValueError: At construction or in ``setup``, if the stages do not ascend or do not fit the model, or the
            Trainer's strategy is none that it can work with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> stacking = ProgressiveStacking(stages=[(0.0, 0.25), (0.2, 0.5), (0.5, 1.0)])
        >>> trainer = Trainer(max_steps=1_000, callbacks=[stacking], logger=False)
    """

    factor = "blocks"
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
        self.stages = check_starts(stages, "depth")
        self.growth: Growth = growth
        self.moments: MomentRule = moments
        self.rewarmup = rewarmup
        self.freeze_old = freeze_old
        self.blocks = blocks
        self._check_arguments()
        self._starts = [start for start, _ in self.stages]
        self._depths: list[int] = []  # in blocks, known once the model is
        self._stage = 0
        self._begins = False  # a new run, not the rest of another
        self._decided_at = -1  # optimizer step at which the stage was last decided
        self._paused: list[nn.Parameter] = []  # parameters kept from DDP while their block is inactive
        self._ends: list[Callable[[], None]] = []  # of what scales the learning rates
        self._cut: tuple[nn.Module, Any] | None = None  # the block that lets no gradient down, its own forward if any
        self._stack: BlockStack

    # -- checks -------------------------------------------------------------------------------------------------------

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
        """The depths in blocks of a model that has ``total``."""
        depths = []
        for _, depth in self.stages:
            blocks = depth if isinstance(depth, int) else depth * total
            if abs(blocks - round(blocks)) > 1e-6:
                raise ValueError(
                    f"stages={self.stages}: {depth} of {total} blocks is {blocks:g}, not a whole number; "
                    f"give a fraction that divides {total}, or a number of blocks"
                )
            depths.append(round(blocks))
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
        return {
            "stages": [list(stage) for stage in self.stages],
            "growth": self.growth,
            "moments": self.moments,
            "rewarmup": self.rewarmup,
            "freeze_old": self.freeze_old,
            "blocks": self.blocks,
        }

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the blocks; a new run starts at the first depth, a checkpoint brings its own."""
        super().setup(trainer, pl_module, stage)
        self._stack = find_blocks(pl_module, self.blocks)
        self._depths = self._resolve_depths(len(self._stack))
        if stage != "fit":
            return
        if isinstance(trainer.strategy, DDPStrategy):
            options = trainer.strategy._ddp_kwargs
            if options.get("static_graph"):
                raise ValueError("ProgressiveStacking changes the graph; use DDPStrategy(static_graph=False)")
            if self.freeze_old and not options.get("find_unused_parameters"):
                raise ValueError("freeze_old=True needs strategy='ddp_find_unused_parameters_true'")
        self._begins = trainer.global_step == 0 and len(self._stack.active) == len(self._stack)
        if self._begins:
            self._activate(trainer, 0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on at the depth that the checkpoint brought."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._begins = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the stage from the depth that a checkpoint brought; weights and optimizer are in place only now."""
        self._stage = 0 if self._begins else self._stage_of(self._stack.active)
        self._decided_at = -1
        self._activate(trainer, self._stage)
        self._share_gradients(trainer, pl_module)
        if self.rewarmup:
            for optimizer in trainer.optimizers:
                self._ends.append(scale_rates(optimizer, partial(self._rewarmed, trainer)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Grow, once per optimizer step and never inside an accumulation window, when the next stage has begun."""
        step = trainer.global_step
        if step != self._decided_at:
            self._decided_at = step
            if self.moments == "copy_step0":
                transfer_state(trainer.optimizers, [], self.moments)  # refuses an unfit optimizer before the growth
            due = stage_at(progress(trainer), self._starts)
            while self._stage < due:
                with charge(trainer, "growth"):
                    self._grow(trainer, pl_module)
                rank_zero_info(f"ProgressiveStacking: {self._depths[self._stage]} blocks from step {step} on")
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (step + 1) % every == 0:  # what is logged at other steps is not written
            pl_module.log("progressive_stacking/active_blocks", float(len(self._stack.active)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a plain model behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a plain model behind."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give a fully grown model its own list class back."""
        self._detach()
        if hasattr(self, "_stack"):
            self._stack.release()

    # -- the technique ------------------------------------------------------------------------------------------------

    def _active_at(self, stage: int) -> tuple[int, ...]:
        return blocks_at_depth(self._depths[stage], len(self._stack), self.growth)

    def _stage_of(self, active: tuple[int, ...]) -> int:
        for stage in range(len(self.stages)):
            if self._active_at(stage) == active:
                return stage
        raise ValueError(
            f"the model comes with blocks {active} of {len(self._stack)} active, as in no stage of "
            f"stages={self.stages}, growth={self.growth!r}; go on with the arguments it was trained with"
        )

    def _grow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Algorithm 1, line 4: deepen by one stage, copying weights, averages of weights, and optimizer state."""
        old = self._stack.active
        new = self._active_at(self._stage + 1)
        pairs = []
        for target, source in growth_map(old, new, self.growth).items():
            pairs += self._stack.copy(source, target)
            for average in self._averages(trainer):
                average.copy(source, target)
        transfer_state(trainer.optimizers, pairs, self.moments)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, Technique):
                other.on_copy(pairs)
        self._stage += 1
        self._activate(trainer, self._stage)
        self._share_gradients(trainer, pl_module)

    def _activate(self, trainer: Trainer, stage: int) -> None:
        for stack in [self._stack, *self._averages(trainer)]:
            stack.activate(self._active_at(stage))
        self._mend()
        if self.freeze_old and 0 < stage < len(self.stages) - 1:
            block = self._stack.blocks[self._depths[stage - 1]]
            self._cut = block, block.__dict__.get("forward")
            block.forward = partial(_cut_forward, block.forward)

    def _averages(self, trainer: Trainer) -> list[BlockStack]:
        """The same blocks inside the averages of weights that Lightning's callbacks keep."""
        return [find_blocks(model, self._stack.path) for model in averages(trainer)]

    def _share_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under DDP, wrap anew with exactly the parameters that now train; otherwise ranks wait or drift apart."""
        if not isinstance(trainer.strategy, DDPStrategy):
            return
        self._resume_parameters()
        names = list(self._stack.container._modules)
        hidden = tuple(f"{self._stack.path}.{names[i]}." for i in set(range(len(names))) - set(self._stack.active))
        named = list(pl_module.named_parameters(remove_duplicate=False))
        shared = {id(p) for name, p in named if not name.startswith(hidden)}  # with what runs, so it goes on training
        self._paused = [p for name, p in named if name.startswith(hidden) and p.requires_grad and id(p) not in shared]
        for parameter in self._paused:
            parameter.requires_grad_(False)
        pl_module.zero_grad(set_to_none=True)  # gradients may be views into the old wrapper's buckets
        trainer.strategy.model = trainer.strategy.model.module  # type: ignore[union-attr, assignment]
        gc.collect()  # the old reducer's hooks live as long as it does
        trainer.strategy.configure_ddp()

    def _resume_parameters(self) -> None:
        for parameter in self._paused:
            parameter.requires_grad_(True)
        self._paused = []

    def _rewarmed(self, trainer: Trainer) -> float:
        """Factor on the learning rate."""
        return rewarmup(progress(trainer), self._starts[self._stage], self.rewarmup) if self._stage else 1.0

    def _mend(self) -> None:
        """Give the block that cuts the gradient its own forward back."""
        if self._cut is not None:
            block, forward = self._cut
            block.__dict__.pop("forward")
            if forward is not None:
                block.forward = forward
            self._cut = None

    def _detach(self) -> None:
        for end in self._ends:
            end()
        self._ends = []
        self._resume_parameters()
        self._mend()

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """All blocks run, and all of them train (nothing is ever frozen in the last stage)."""
        return len(self._stack.active) == len(self._stack)

    def step_kind(self) -> dict[str, Any]:
        """Active blocks, and how many of them are frozen."""
        frozen = self._depths[self._stage - 1] if self.freeze_old and 0 < self._stage < len(self.stages) - 1 else 0
        return {"blocks": len(self._stack.active), "frozen": frozen}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Activate the blocks of an earlier stage, or of this one again, without copying anything."""
        self._stage = self._depths.index(kind["blocks"])
        self._activate(trainer, self._stage)


def _cut_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Forward of a block through which no gradient flows down."""
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    return forward(*args, **kwargs)
