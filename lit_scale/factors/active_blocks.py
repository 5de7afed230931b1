"""Active blocks: the base class of techniques that run only some of a network's blocks.

The network is built at full depth, and its list of blocks is gated (:mod:`lit_scale.factors.blocks`). A technique
chooses which blocks run. This class activates them in the model and in averages of its weights, rebuilds the wrapper of
DistributedDataParallel when they change, and reports the step kind.
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
    """A technique that runs some of the blocks.

    A subclass calls :meth:`activate` from :meth:`~lit_scale.technique.Technique.decide`. It may start shallow
    (:meth:`first_blocks`) and deepen the network by copies (:meth:`copy_blocks`). Blocks that do not run keep their
    weights, get no gradient, and are skipped by the optimizer.

    There are two ways to change the active blocks:

    - *Permanently* (the default), for networks that grow. The active blocks are stored in the checkpoint, validation
      runs at that depth, and the DDP wrapper is rebuilt at each change.
    - *For one optimizer step* (``for_one_step = True``), for example to drop layers at random. Between batches all
      blocks are active, so validation and checkpoints are those of the plain network. DDP then needs
      ``find_unused_parameters``.

    Under DDP all ranks must choose the same blocks, so the choice must not depend on the rank: derive it from the seed
    and ``trainer.global_step``.

    Args:
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Attributes:
        stack: The blocks, from ``setup`` on.

    Raises:
        ValueError: In ``setup``, if the list of blocks is not found, or for unsuitable options of DDP.

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
    _begins = False  # whether this is a new run, not a resumed one
    _chosen: tuple[int, ...] = ()  # the active blocks of the current optimizer step
    _seen: Mapping[int, tuple[int, ...]] = {}  # the blocks that were active last, by their number

    def __init__(self, blocks: str | None = None) -> None:
        self.blocks = blocks
        self._paused: list[nn.Parameter] = []  # parameters of inactive blocks, hidden from DDP by requires_grad=False

    # -- what a subclass overrides ------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The argument."""
        return {"blocks": self.blocks}

    def first_blocks(self) -> Iterable[int]:
        """Indices of the blocks that are active when a new run begins; all by default."""
        return range(len(self.stack))

    def check_ddp(self, options: Mapping[str, Any]) -> None:
        """Refuse unsuitable keyword arguments of DistributedDataParallel, before anything is changed."""
        name = type(self).__name__
        if options.get("static_graph"):
            raise ValueError(f"{name} changes the graph; use DDPStrategy(static_graph=False)")
        if self.for_one_step and not options.get("find_unused_parameters"):
            raise ValueError(
                f"{name} runs other blocks at every step, which needs strategy='ddp_find_unused_parameters_true'"
            )

    def blocks_of_kind(self, count: int) -> Iterable[int]:
        """The blocks that the clock activates to time a step of ``count`` blocks: the latest, or else the lowest."""
        return self._seen.get(count, range(count))

    # -- what a subclass uses -----------------------------------------------------------------------------------------

    def activate(self, trainer: Trainer, pl_module: LightningModule, indices: Iterable[int]) -> None:
        """Run only these blocks from now on; under DDP, rebuild the wrapper if they change.

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
        """Copy blocks onto others: weights, averages of weights, optimizer state, and state of other techniques.

        Args:
            trainer: The Trainer.
            sources: A dict from target to source, both indices into all blocks.
            moments: How optimizer state is transferred; see :func:`lit_scale.factors.optimizers.transfer_state`.
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
        """Find the blocks; activate the first ones in a new run. A checkpoint restores its own later."""
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
        """Keep the active blocks that the checkpoint restored."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._begins = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Activate the blocks in the averages too, and rebuild DDP; checkpoints are loaded only by now."""
        self.undo_later(self._resume_parameters)
        self._chosen = ()
        self.activate(trainer, pl_module, self.first_blocks() if self._begins else self.stack.active)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide and log; then, with ``for_one_step``, activate the blocks of this optimizer step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.for_one_step:
            self._show(trainer, self._chosen)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """With ``for_one_step``, activate all blocks between two batches."""
        if self.for_one_step:
            self._show(trainer, range(len(self.stack)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Revert registered changes, but keep the active blocks, since the clock still replays steps."""
        self.undo()

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the plain model; blocks that are inactive permanently stay so."""
        super().detach(trainer, pl_module)
        if hasattr(self, "stack"):
            if self.for_one_step:
                self._show(trainer, range(len(self.stack)))
            self.stack.release()

    # -- the blocks ---------------------------------------------------------------------------------------------------

    def _averages(self, trainer: Trainer) -> list[BlockStack]:
        """The lists of blocks in the averages of weights that Lightning's callbacks keep."""
        return [find_blocks(model, self.stack.path) for model in averages(trainer)]

    def _show(self, trainer: Trainer, indices: Iterable[int]) -> None:
        """Activate these blocks in the model and, unless it is for one step, in the averages."""
        indices = tuple(indices)
        for stack in [self.stack, *([] if self.for_one_step else self._averages(trainer))]:
            stack.activate(indices)
        self._seen = {**self._seen, len(self.stack.active): self.stack.active}

    def _share_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under DDP, rebuild the wrapper with exactly the parameters that now train.

        Otherwise ranks would wait for gradients that never come, or would not average new ones.
        """
        if not isinstance(trainer.strategy, DDPStrategy):
            return
        self._resume_parameters()
        names = list(self.stack.container._modules)
        hidden = tuple(f"{self.stack.path}.{names[i]}." for i in set(range(len(names))) - set(self.stack.active))
        named = list(pl_module.named_parameters(remove_duplicate=False))
        shared = {id(p) for name, p in named if not name.startswith(hidden)}  # parameters that active parts use too
        self._paused = [p for name, p in named if name.startswith(hidden) and p.requires_grad and id(p) not in shared]
        for parameter in self._paused:
            parameter.requires_grad_(False)
        pl_module.zero_grad(set_to_none=True)  # gradients may be views into the old wrapper's buckets
        trainer.strategy.model = trainer.strategy.model.module  # type: ignore[union-attr, assignment]
        gc.collect()  # frees the old reducer, whose hooks would still fire
        trainer.strategy.configure_ddp()

    def _resume_parameters(self) -> None:
        for parameter in self._paused:
            parameter.requires_grad_(True)
        self._paused = []

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """Whether all blocks run; with ``for_one_step``, in the latest step."""
        return len(self._chosen if self.for_one_step else self.stack.active) == len(self.stack)

    def step_kind(self) -> dict[str, Any]:
        """The number of active blocks; all blocks have the same cost."""
        return {"blocks": len(self.stack.active)}

    def plain_step_kind(self) -> dict[str, Any] | None:
        """All blocks run."""
        return {"blocks": len(self.stack)}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Activate as many blocks as in a step of this kind, without copying weights."""
        self._show(trainer, self.blocks_of_kind(kind["blocks"]))
