"""Batch ramp (Smith et al., ICLR 2018; McCandlish et al. 2018): small batches first, large ones later.

    accumulate B(progress) / b micro-batches of b samples each; B grows by stages of the run

The critical batch size, beyond which a larger batch saves few steps, grows while the loss falls. A ramp follows it:
batches are small at first, and as large as the devices can share at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer

from lit_scale.factors.optimizers import scale_rates
from lit_scale.factors.steps import accumulate, check_epoch, micro_batches, plan_windows, restore_accumulation
from lit_scale.progress import Windows, progress
from lit_scale.schedules import RateScaling, check_starts, rate_factor, stage_at
from lit_scale.technique import Technique
from lit_scale.trainers import callbacks_of

__all__ = ["BatchRamp"]


class BatchRamp(Technique):
    """Raises the batch by stages of the run, by accumulating more micro-batches.

    The start of a stage is a fraction of the run: of the optimizer steps if ``max_steps`` limits the run, of the data
    if ``max_epochs`` does (``limit_train_batches`` shortens an epoch), of the time with ``max_time``. With
    ``max_steps`` the run sees fewer samples than with the last batch size throughout; with ``max_epochs`` it makes
    fewer steps than with the first. A stage begins at the first optimizer step after its start at which the number of
    micro-batches so far in the epoch is a multiple of the stage's own number.

    Args:
        stages: (start, batch) pairs; starts ascend from 0 and are below 1; batches ascend, each a multiple of the one
            before, in samples of all ranks (int), or as a fraction of the batch that the Trainer accumulates (float).
        scaling: How the learning rate of a stage depends on the ratio of its batch to the last one: ``"sqrt"``,
            ``"linear"``, or ``"none"`` as in Smith et al., where a larger batch takes the place of a smaller rate.

    Raises:
        ValueError: At construction or before the first step, if the stages do not ascend, a batch is no multiple of
            the one before, or an epoch ends inside an optimizer step.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> ramp = BatchRamp([(0.0, 0.125), (0.1, 0.25), (0.3, 0.5), (0.6, 1.0)])
        >>> trainer = Trainer(accumulate_grad_batches=16, callbacks=[ramp], accelerator="cpu", logger=False)
    """

    factor = "steps"
    shares_with = frozenset({"LargeBatch"})

    def __init__(
        self,
        stages: Sequence[tuple[float, int | float]] = ((0.0, 0.125), (0.1, 0.25), (0.3, 0.5), (0.6, 1.0)),
        *,
        scaling: RateScaling = "none",
    ) -> None:
        rate_factor(1, scaling)
        self.stages = check_starts(stages, "batch")
        self.scaling = scaling
        self._starts = [start for start, _ in self.stages]
        self._sizes: list[int] = []  # of each stage, in micro-batches of a rank
        self._own = 0  # micro-batches that the Trainer accumulates without the ramp
        self._window = 0  # micro-batches of the current step
        self.windows: Windows = []

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {"stages": [list(stage) for stage in self.stages], "scaling": self.scaling}

    def state_dict(self) -> dict[str, Any]:
        """First step of each stage; it follows from the settings unless ``max_time`` limits the run."""
        return {"windows": [list(window) for window in self.windows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the first step of each stage."""
        self.windows = [(first, size) for first, size in state_dict["windows"]]

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another callback that sets the accumulation."""
        super().setup(trainer, pl_module, stage)
        if callbacks_of(trainer, GradientAccumulationScheduler):
            raise ValueError("BatchRamp and GradientAccumulationScheduler both set the accumulation; use one of them")
        self.windows, self._sizes = [], []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan when each stage begins; with ``max_time`` this is decided during the run."""
        self._own = trainer.accumulate_grad_batches
        self._sizes = self._resolve(trainer)
        if _by_the_clock(trainer):
            self.windows = self.windows or [(0, self._sizes[0])]
            check_epoch(trainer, [(0, self._sizes[-1])])
        else:
            before, step = self.windows, trainer.global_step
            epochs = trainer.max_epochs or -1
            data = trainer.num_training_batches * epochs if epochs > 0 else math.inf
            if trainer.max_steps < 0 and data == math.inf:
                raise ValueError(
                    "BatchRamp: stages are fractions of a run whose length is unknown; pass max_steps or max_time, "
                    "or max_epochs with a loader that has a length"
                )
            self.windows = plan_windows(self._starts, self._sizes, max_steps=trainer.max_steps, batches=data)
            if before and _until(before, step) != _until(self.windows, step):
                raise ValueError(
                    "BatchRamp: the length of the run differs from the checkpoint's, so stages would have begun at "
                    "other steps; resume with the same max_steps, max_epochs and data"
                )
            check_epoch(trainer, self.windows)
        self._accumulate(trainer)
        for optimizer in trainer.optimizers if self.scaling != "none" else ():
            self.undo_later(scale_rates(optimizer, self._rate))

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the micro-batches of the step; with ``max_time``, begin the next stage if it is due."""
        if _by_the_clock(trainer):
            due = self._sizes[stage_at(progress(trainer), self._starts)]
            if due != self.windows[-1][1] and trainer.fit_loop.batch_idx % due == 0:
                self.windows = [*self.windows, (trainer.global_step, due)]
        self._accumulate(trainer)

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """Micro-batches of all ranks in this step."""
        return {"micro_batches": float(trainer.accumulate_grad_batches * trainer.world_size)}

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the optimizers' learning rates and the Trainer's accumulation."""
        super().detach(trainer, pl_module)
        restore_accumulation(trainer)

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _resolve(self, trainer: Trainer) -> list[int]:
        """Micro-batches of a rank, in each stage."""
        each, sizes = getattr(trainer.train_dataloader, "batch_size", None), []
        for _, amount in self.stages:
            if isinstance(amount, float):
                size = amount * self._own
                if abs(size - round(size)) > 1e-6:
                    raise ValueError(
                        f"stages={self.stages}: {amount} of accumulate_grad_batches={self._own} is {size:g} "
                        "micro-batches, not a whole number; accumulate more, or give fractions that divide"
                    )
                sizes.append(round(size))
            elif each is None:
                raise ValueError(f"stages={self.stages}: the loader has no batch_size; give fractions")
            else:
                sizes.append(micro_batches(amount, each * trainer.world_size))
        for one, other in zip(sizes, sizes[1:], strict=False):
            if other <= one or other % one:
                raise ValueError(
                    f"stages={self.stages}: a batch of {other} micro-batches is not a multiple of the one before it, "
                    f"{one}; ramp to {2 * one}, {3 * one}, ..."
                )
        return sizes

    def _accumulate(self, trainer: Trainer) -> None:
        self._window = _until(self.windows, trainer.global_step)[-1][1]
        accumulate(trainer, self._window)

    def _rate(self) -> float:
        return rate_factor(self._window / self._sizes[-1], self.scaling)

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """Whether a step takes as many micro-batches as it would without the ramp."""
        return self._window == self._own

    def step_kind(self) -> dict[str, Any]:
        """Micro-batches of a step; the cost of each follows from the shapes of the batch."""
        return {"micro_batches": self._window}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Accumulate as many micro-batches as a step of this kind."""
        self._window = kind["micro_batches"]
        accumulate(trainer, self._window)


def _until(windows: Windows, step: int) -> list[tuple[int, int]]:
    """The windows that have begun."""
    return [window for window in windows if window[0] <= step]


def _by_the_clock(trainer: Trainer) -> bool:
    return bool(callbacks_of(trainer, Timer))
