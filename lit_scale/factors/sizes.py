"""Sizes: how large the samples of a batch are, by stages of the run; pixels of a side, or tokens of a sequence.

The size is set where it saves most. A :class:`~lit_scale.datamodules.loader.ResumableLoader` over a dataset that makes
samples of any size gets the size of every batch as a plan, so that reading, collating and moving are cheaper as well.
Batches of any other loader are made smaller on the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from lit_scale.batches import Plan
from lit_scale.progress import progress, progress_after
from lit_scale.schedules import check_starts, stage_at
from lit_scale.technique import Technique
from lit_scale.trainers import callbacks_of

__all__ = ["SizeByStages"]


class SizeByStages(Technique):
    """A technique that begins with small samples and ends with full ones.

    A subclass defines which size a stage has (:meth:`resolve`), how large a batch is (:meth:`size_of`), how to make it
    smaller (:meth:`shrink`), and how many samples of a size one of the loader's batches holds (:meth:`samples`).
    Evaluation always sees full size. The size of a batch is a function of its number, so a resumed run meets the same
    ones; in a run limited by ``max_time`` it depends on the clock.

    Args:
        stages: (start, size) pairs; starts are fractions of the run, ascending from 0 and below 1; sizes ascend to full
            size, as a fraction of it (float) or a number (int).

    Raises:
        ValueError: At construction, or before the first step, if the stages do not ascend to full size.
    """

    factor = "tokens"

    def __init__(self, stages: Sequence[tuple[float, int | float]]) -> None:
        self.stages = check_starts(stages, "size")
        self._starts = [start for start, _ in self.stages]
        self._sizes: list[int] = []  # known once full size is
        self._changes: list[int] = []  # where time limits the run, the batches that began the second and later stages
        self._asked = -1  # in such a run, the latest batch whose size was requested
        self._loader: Any = None
        self._trainer: Trainer | None = None

    # -- what a subclass says -----------------------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, size: int | float, full: int) -> int:
        """The size of a stage, given that of a full sample.

        Raises:
            ValueError: It fits neither the model nor the data.
        """

    @abstractmethod
    def size_of(self, batch: Any) -> int:
        """Full size, from a batch of it."""

    @abstractmethod
    def shrink(self, batch: Any, size: int) -> Any:
        """The batch in this size, on its device."""

    def samples(self, size: int, batch_size: int) -> int:
        """How many samples the loader takes for a batch of this size."""
        return batch_size

    # -- hooks --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where stages began in a run limited by time; otherwise that follows from the settings."""
        return {"changes": list(self._changes), "asked": self._asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore where stages began."""
        self._changes, self._asked = list(state_dict["changes"]), state_dict["asked"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the loader the plan of sizes, or shrink batches as they move to the device."""
        self._trainer = trainer
        loader: Any = trainer.train_dataloader
        if getattr(loader, "takes_plan", False):
            self._resolve(loader.dataset.full_size)
            self._loader, before = loader, loader.plan
            loader.plan = partial(self._plan, before)
        else:
            trainer.strategy.batch_to_device = self._move  # type: ignore[method-assign]

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """The size of the current batch."""
        return {"size": float(self._sizes[self._stage_of(self._number - 1)])}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave loader and strategy as they were: the batches that the clock replays have their sizes."""
        self._give_back(trainer)

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave model, loader and strategy as they were."""
        super().detach(trainer, pl_module)
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        trainer.strategy.__dict__.pop("batch_to_device", None)
        if self._loader is not None:
            self._loader.plan = self._loader = None

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _resolve(self, full: int) -> None:
        sizes = [self.resolve(size, full) for _, size in self.stages]
        if sizes[-1] != full or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(
                f"stages={self.stages}: these are sizes of {', '.join(map(str, sizes))}; they must ascend to full "
                f"size, which is {full} here"
            )
        self._sizes = sizes

    @property
    def _number(self) -> int:
        """How many batches the run has begun."""
        assert self._trainer is not None
        return self._trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def _stage_of(self, number: int) -> int:
        """The stage of a batch, by its number since the run began."""
        trainer = self._trainer
        assert trainer is not None
        if not callbacks_of(trainer, Timer):
            return stage_at(progress_after(trainer, number), self._starts)
        if number > self._asked:
            due = stage_at(progress(trainer), self._starts)
            self._changes += [number] * (due - len(self._changes))
            self._asked = number
        return sum(first <= number for first in self._changes)

    def _plan(self, before: Plan | None, number: int) -> tuple[int | None, int]:
        size = self._sizes[self._stage_of(number)]
        usual = (
            self._loader.batch_size if before is None else before(number)[1]
        )  # a technique that chooses samples takes more
        full = size == self._sizes[-1]
        return (None, usual) if full else (size, self.samples(size, usual))

    def _move(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Move a batch to the device, and make it smaller there."""
        trainer = self._trainer
        assert trainer is not None
        batch = type(trainer.strategy).batch_to_device(trainer.strategy, batch, *args, **kwargs)
        if not trainer.training:
            return batch
        if not self._sizes:
            self._resolve(self.size_of(batch))
        size = self._sizes[self._stage_of(self._number)]
        return batch if size == self._sizes[-1] else self.shrink(batch, size)

    # -- the clock ----------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {"stages": [list(stage) for stage in self.stages]}

    def is_plain(self) -> bool:
        """The current batch is of full size."""
        return self._stage_of(self._number - 1) == len(self.stages) - 1

    def step_kind(self) -> dict[str, Any]:
        """The size; what follows from it shows in the shapes of the batch."""
        return {"size": self._sizes[self._stage_of(self._number - 1)]}
