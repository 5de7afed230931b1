"""A data module that keeps its loader's position in the checkpoint, and refuses to go on with other data."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from lit_scale.datamodules.loader import ResumableLoader, data_ranks

__all__ = ["ResumableDataModule", "check_at_least"]


def check_at_least(**limits: tuple[int | None, int]) -> None:
    """Refuse arguments below their least value; None always passes.

    Args:
        limits: Value and least value by the argument's name.

    Raises:
        ValueError: Naming the argument.

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
    """Base of data modules whose data sets make a whole batch at a time, in `__getitems__`.

    A subclass makes ``train_set``, ``validation_set`` and, if asked, ``test_set`` in its ``setup``, calls `go_on` at
    the end of it, and tells in `settings` what its batches depend on. Loading a checkpoint with other settings is an
    error; with the same, training goes on with the very next batch.

    Args:
        batch_size: Samples per batch and device.
        seed: Of the order of the training data.
        num_workers: Processes that make the batches.
    """

    train_set: Dataset[Any]
    validation_set: Dataset[Any]
    test_set: Dataset[Any] | None = None  # where a test was asked for

    def __init__(self, *, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        check_at_least(batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._saved: dict[str, Any] | None = None  # of the checkpoint, until there are data to compare with
        self._position: dict[str, int] | None = None  # of the checkpoint, until there is a loader to continue
        self._train_loader: ResumableLoader | None = None

    @abstractmethod
    def settings(self) -> dict[str, Any] | None:
        """All that training batches depend on, as plain values; None before setup."""

    def go_on(self) -> None:
        """Take up the checkpoint that was loaded before there were data to compare it with, if any."""
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
        """The position in the data, and all that batches depend on; empty before setup."""
        settings = self.settings()
        if settings is None:
            return {}
        position = self._train_loader.state_dict() if self._train_loader is not None else None
        return {"settings": settings, "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position of a checkpoint that training goes on from, if it was trained on these data.

        Evaluating one on other data is fine.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: The data differ.
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
