"""Active blocks: the base of techniques that let only some of a network's blocks run.

The network is built at full depth, and its list of blocks is gated (:mod:`lit_scale.factors.blocks`). A technique says
which blocks run; this base lets them run in the model and in the averages of its weights, keeps DistributedDataParallel
in step with them, and reports the step kind.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_scale.factors.blocks import BlockStack, find_blocks
from lit_scale.factors.optimizers import MomentRule, transfer_state
from lit_scale.technique import Technique, averages, techniques

__all__ = ["ActiveBlocks"]


class ActiveBlocks(Technique):
    """A technique that lets some of the blocks run.

    A subclass calls :meth:`activate` from :meth:`~lit_scale.technique.Technique.decide`. It may start shallow
    (:meth:`first_blocks`) and deepen the network by copies (:meth:`copy_blocks`). Blocks that do not run keep their
    weights, get no gradient, and are skipped by the optimizer.

    There are two ways to change the active blocks:

    - *For good* (the default), as where a network grows. The active blocks are part of the checkpoint, validation runs
      at that depth, and DDP is wrapped anew at each change.
    - *For one optimizer step* (``for_one_step = True``), as where layers are dropped at random. Between two batches all
      blocks run, so validation and checkpoints are those of the plain network. DDP then needs
      ``find_unused_parameters``.

    Under DDP all ranks must choose the same blocks: choose by the seed and ``trainer.global_step``, not by the rank.

    Args:
        blocks: Dotted path of the list of blocks, needed only where it cannot be found.

    Attributes:
        stack: The blocks, from ``setup`` on.

    Raises:
        ValueError: In ``setup``, if the list of blocks is not found, or for options of DDP that do not fit.

    Example:
        >>> class TopBlockLater(ActiveBlocks):
        ...     def first_blocks(self):
        ...         return range(len(self.stack) - 1)
        ...     def decide(self, trainer, pl_module):
        ...         if trainer.global_step == 100:
        ...             self.activate(trainer, pl_module, range(len(self.stack)))
        >>> trainer = Trainer(max_steps=1_000, callbacks=[TopBlockLater()], accelerator="cpu", logger=False)
    """

    factor = "blocks"
    #: Whether the active blocks are chosen for one optimizer step only.
    for_one_step: ClassVar[bool] = False

    stack: BlockStack
    _begins = False  # a new run, and not the rest of another
    _chosen: tuple[int, ...] = ()  # the blocks of the current optimizer step
    _seen: Mapping[int, tuple[int, ...]] = {}  # by their number, the latest blocks that were active

    def __init__(self, blocks: str | None = None) -> None:
        self.blocks = blocks
        self._paused: list[nn.Parameter] = []  # kept from DDP while their block does not run

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The argument."""
        return {"blocks": self.blocks}

    def first_blocks(self) -> Iterable[int]:
        """Indices of the blocks that run when a new run begins; all by default."""
        return range(len(self.stack))

    def check_ddp(self, options: Mapping[str, Any]) -> None:
        """Refuse keyword arguments of DistributedDataParallel that do not fit, before anything is changed."""
        name = type(self).__name__
        if options.get("static_graph"):
            raise ValueError(f"{name} changes the graph; use DDPStrategy(static_graph=False)")
        if self.for_one_step and not options.get("find_unused_parameters"):
            raise ValueError(
                f"{name} runs other blocks at every step, which needs strategy='ddp_find_unused_parameters_true'"
            )

    def blocks_of_kind(self, count: int) -> Iterable[int]:
        """The blocks that run where the clock prices ``count`` of them: the latest that did, or else the lowest."""
        return self._seen.get(count, range(count))

    # -- what a subclass uses -----------------------------------------------------------------------------------------

    def activate(self, trainer: Trainer, pl_module: LightningModule, indices: Iterable[int]) -> None:
        """Let only these blocks run from now on; under DDP wrap the model anew if that changes them.

        Args:
            trainer: The Trainer, once training has started.
            pl_module: Its module.
            indices: Indices into all blocks, at least one.
        """
        before = self._chosen
        self._show(trainer, indices)
        self._chosen = self.stack.active
        if before != self._chosen and not self.for_one_step:
            self._share_gradients(trainer, pl_module)

    def copy_blocks(self, trainer: Trainer, sources: Mapping[int, int], moments: MomentRule = "copy") -> None:
        """Copy blocks onto others: weights, averages of weights, optimizer state, and what other techniques keep.

        Args:
            trainer: The Trainer.
            sources: Target to source, indices into all blocks.
            moments: What becomes of the optimizer state; see :func:`lit_scale.factors.optimizers.transfer_state`.
        """
        pairs = []
        for target, source in sources.items():
            pairs += self.stack.copy(source, target)
            for average in self._averages(trainer):
                average.copy(source, target)
        transfer_state(trainer.optimizers, pairs, moments)
        for other in techniques(trainer):
            other.on_copy(pairs)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the blocks; a new run starts with the first ones, a checkpoint brings its own."""
        super().setup(trainer, pl_module, stage)
        self.stack = find_blocks(pl_module, self.blocks)
        if stage != "fit":
            return
        self._seen = {}
        if isinstance(trainer.strategy, DDPStrategy):
            self.check_ddp(trainer.strategy._ddp_kwargs)
        self._begins = trainer.global_step == 0 and len(self.stack.active) == len(self.stack)
        if self._begins:
            self._show(trainer, self.first_blocks())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the blocks that the checkpoint brought."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._begins = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Activate the blocks also in the averages, and wrap DDP; a checkpoint is in place only now."""
        self.undo_later(self._resume_parameters)
        self._chosen = ()
        self.activate(trainer, pl_module, self.first_blocks() if self._begins else self.stack.active)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide and log; then let the blocks of this optimizer step run, where they are chosen for one step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.for_one_step:
            self._show(trainer, self._chosen)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Let all blocks run between two batches, where they are chosen for one step."""
        if self.for_one_step:
            self._show(trainer, range(len(self.stack)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what :meth:`undo_later` was given; the blocks stay, since the clock still replays steps."""
        self.undo()

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a plain model behind, but for blocks that are inactive for good."""
        super().detach(trainer, pl_module)
        if hasattr(self, "stack"):
            if self.for_one_step:
                self._show(trainer, range(len(self.stack)))
            self.stack.release()

    # -- the blocks ---------------------------------------------------------------------------------------------------

    def _averages(self, trainer: Trainer) -> list[BlockStack]:
        """The same blocks in the averages of weights that Lightning's callbacks keep."""
        return [find_blocks(model, self.stack.path) for model in averages(trainer)]

    def _show(self, trainer: Trainer, indices: Iterable[int]) -> None:
        """Let these blocks run in the model; in the averages too, where that is for good."""
        indices = tuple(indices)
        for stack in [self.stack, *([] if self.for_one_step else self._averages(trainer))]:
            stack.activate(indices)
        self._seen = {**self._seen, len(self.stack.active): self.stack.active}

    def _share_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under DDP, wrap anew with exactly the parameters that now train; otherwise ranks wait or drift apart."""
        if not isinstance(trainer.strategy, DDPStrategy):
            return
        self._resume_parameters()
        names = list(self.stack.container._modules)
        hidden = tuple(f"{self.stack.path}.{names[i]}." for i in set(range(len(names))) - set(self.stack.active))
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

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """All blocks run, in the latest step where they are chosen for one."""
        return len(self._chosen if self.for_one_step else self.stack.active) == len(self.stack)

    def step_kind(self) -> dict[str, Any]:
        """The number of active blocks, which cost the same since they are alike."""
        return {"blocks": len(self.stack.active)}

    def plain_step_kind(self) -> dict[str, Any] | None:
        """All blocks run."""
        return {"blocks": len(self.stack)}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Let as many blocks run, without copying anything."""
        self._show(trainer, self.blocks_of_kind(kind["blocks"]))
