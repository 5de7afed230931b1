"""Counter-based randomness: torch's random numbers are a function of the position in the run, so resuming is exact."""

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["StepSeed"]


class StepSeed(Callback):
    """Makes dropout, and everything else that draws from torch's generators, a function of (seed, rank, batch counter).

    A run that is resumed on the same number of ranks draws the same numbers as an uninterrupted one. Nothing is saved
    for this: the counter is Lightning's own over all epochs, which every checkpoint holds. A validation batch is seeded
    by its index, so every validation draws the same numbers and does not affect training. It costs microseconds per
    batch.

    Only the CPU generator and that of the current CUDA device are set, not Python's and numpy's. Code that uses those,
    such as a dataset, should seed by (seed, epoch, index). The order of the data is up to the loader.

    Args:
        seed: Runs with the same seed draw the same numbers (default 0).

    Example:
        >>> trainer = Trainer(callbacks=[StepSeed(seed=1)], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._set(trainer, str(trainer.fit_loop.total_batch_idx))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *place: Any) -> None:
        self._set(trainer, f"validation/{place[1:]}")  # batch_idx and dataloader_idx

    def _before_transfer(self, trainer: Trainer, *_: Any) -> None:
        # on_after_batch_transfer, which may augment on the device, is called before on_train_batch_start
        self._set(trainer, f"transfer/{trainer.fit_loop.total_batch_idx + 1}")

    on_train_start = on_train_epoch_start = _before_transfer  # type: ignore[assignment]
    on_train_batch_end = on_validation_end = _before_transfer  # type: ignore[assignment]

    def _set(self, trainer: Trainer, place: str) -> None:
        digest = hashlib.blake2b(f"{self.seed}/{trainer.global_rank}/{place}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") >> 1
        torch.default_generator.manual_seed(number)  # torch.manual_seed seeds every backend, a hundred times slower
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
