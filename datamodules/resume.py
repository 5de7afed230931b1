"""Base class of data modules that save the loader's position in the checkpoint and refuse to resume on other data."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from lit_scale.datamodules.loader import ResumableLoader, data_ranks

__all__ = ["ResumableDataModule", "check_at_least"]


def check_at_least(**limits: tuple[int | None, int]) -> None:
    """Refuse arguments below their minimum; None is always accepted.

    Args:
        limits: Value and minimum, by the argument's name.

    Raises:
        ValueError: If a value is below its minimum; the message names the argument.

    Example:
        >>> check_at_least(batch_size=(0, 1))
        Traceback (most recent call last):
        ValueError: batch_size=0: must be at least 1
    """
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")


def _as_it_is(batch: Any) -> Any:
    return batch


class ResumableDataModule(LightningDataModule):
    """Base of data modules whose datasets return a whole batch at a time, from `__getitems__`.

    A subclass creates ``train_set``, ``validation_set`` and optionally ``test_set`` in its ``setup``, calls `go_on` at
    the end of it, and returns from `settings` everything that its batches depend on. Resuming from a checkpoint with
    other settings is an error; with the same settings, training continues at the next batch.

    Args:
        batch_size: Samples per batch and device.
        seed: Seed of the order of the training data.
        num_workers: Worker processes that make the batches; 0 makes them in the main process.
    """

    train_set: Dataset[Any]
    validation_set: Dataset[Any]
    test_set: Dataset[Any] | None = None  # None without a test split

    def __init__(self, *, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        check_at_least(batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._saved: dict[str, Any] | None = None  # state of a checkpoint, until setup allows to compare it
        self._position: dict[str, int] | None = None  # position of a checkpoint, until there is a loader for it
        self._train_loader: ResumableLoader | None = None

    @abstractmethod
    def settings(self) -> dict[str, Any] | None:
        """Everything that training batches depend on, as plain values; None before setup."""

    def go_on(self) -> None:
        """Apply the state of a checkpoint that was loaded before setup, if any."""
        if self._saved is not None:
            self.load_state_dict(self._saved)

    # ---- loaders

    def train_dataloader(self) -> ResumableLoader:
        self._train_loader = self._loader(self.train_set, shuffle=True, drop_last=True)
        if self._position is not None:
            # Lightning restores the loader too, but not after on_train_epoch_end of a run limited by epochs.
            self._train_loader.load_state_dict(self._position)
            self._position = None
        return self._train_loader

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.validation_set)

    def test_dataloader(self) -> ResumableLoader:
        if self.test_set is None:
            raise ValueError(f"{type(self).__name__} has no test set; pass test_fraction= or test_source=")
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool = False, drop_last: bool = False) -> ResumableLoader:
        return ResumableLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,
            **data_ranks(self.trainer),
        )

    # ---- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and the settings; empty before setup."""
        settings = self.settings()
        if settings is None:
            return {}
        position = self._train_loader.state_dict() if self._train_loader is not None else None
        return {"settings": settings, "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint, if it was trained on the same data.

        Only resuming is checked: a checkpoint may be evaluated on other data.

        Args:
            state_dict: A return value of `state_dict`.

        Raises:
            ValueError: If the settings differ; the message lists the differences.
        """
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return
        present = self.settings()
        if present is None:
            self._saved = dict(state_dict)
            return
        self._saved, self._position = None, state_dict["position"]
        differing = [
            f"{name} (was {value!r}, is {present.get(name)!r})"
            for name, value in state_dict["settings"].items()
            if present.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the checkpoint was trained on other data, so training cannot go on from it: {', '.join(differing)}. "
                "Resume with the data and settings it had, or start a new run from its weights"
            )
