"""Sizes: the base class of techniques that change the size of samples by stages of the run.

A size is the side of an image in pixels, or the length of a sequence in tokens. A
:class:`~lit_scale.datamodules.loader.ResumableLoader` over a dataset that makes samples of any size gets the size of
each batch in advance (a plan), so that reading, collating and moving get cheaper too. Batches of other loaders are made
smaller on the device.
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

    A subclass defines the size of a stage (:meth:`resolve`), the full size of a batch (:meth:`size_of`), how to make a
    batch smaller (:meth:`shrink`), and how many samples a batch of a size has (:meth:`samples`). Evaluation always uses
    full size. The size of a batch is a function of its number, so a resumed run gets the same sizes. In a run limited
    by ``max_time`` it depends on the time, and the checkpoint stores where stages began.

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
        self._sizes: list[int] = []  # size of each stage, once full size is known
        self._changes: list[int] = []  # with max_time: the numbers of the batches at which later stages began
        self._asked = -1  # with max_time: the latest batch whose size was decided
        self._loader: Any = None
        self._trainer: Trainer | None = None

    # -- what a subclass overrides ------------------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, size: int | float, full: int) -> int:
        """The size of a stage.

        Args:
            size: A fraction of full size (float) or a size (int).
            full: Full size.

        Raises:
            ValueError: If the size does not fit the model or the data.
        """

    @abstractmethod
    def size_of(self, batch: Any) -> int:
        """The size of the samples of a full-size batch."""

    @abstractmethod
    def shrink(self, batch: Any, size: int) -> Any:
        """Return the batch with samples of this size, on its device."""

    def samples(self, size: int, batch_size: int) -> int:
        """Number of samples that the loader takes for a batch of this size."""
        return batch_size

    # -- hooks --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The batches at which stages began in a run limited by time; otherwise they follow from the settings."""
        return {"changes": list(self._changes), "asked": self._asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the batches at which stages began."""
        self._changes, self._asked = list(state_dict["changes"]), state_dict["asked"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the plan in the loader, or wrap the strategy's transfer of batches to the device."""
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
        """Restore loader and strategy; the batches that the clock replays already have their sizes."""
        self._give_back(trainer)

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore model, loader and strategy."""
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
        """Number of batches that the run has started."""
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
        usual = self._loader.batch_size if before is None else before(number)[1]  # a sample choice may ask for more
        full = size == self._sizes[-1]
        return (None, usual) if full else (size, self.samples(size, usual))

    def _move(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Move a batch to the device, and in training make its samples smaller there."""
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
        """Whether the current batch is of full size."""
        return self._stage_of(self._number - 1) == len(self.stages) - 1

    def step_kind(self) -> dict[str, Any]:
        """The size of the samples."""
        return {"size": self._sizes[self._stage_of(self._number - 1)]}
