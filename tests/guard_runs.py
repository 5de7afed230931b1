"""Small runs that the tests of the guards share: fitted in this process, and compared to the last bit."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_scale.datamodules.loader import ResumableLoader


class Numbers(torch.utils.data.Dataset):
    """Sample i is a function of i."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Net(pl.LightningModule):
    """Dropout in training; a hook that changes weights after each batch; what it drew and lost, for the record."""

    def __init__(self, after_batch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.register_buffer("average", torch.zeros(2, 8))
        self.after_batch = after_batch
        self.losses: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.body(batch) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.after_batch and (self.trainer.global_step % 2):
            self.average.lerp_(self.body[2].weight.detach(), 0.1)
            self.body[2].weight.data.lerp_(self.average, 0.01)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(torch.rand(()).item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data(workers: int = 0) -> ResumableLoader:
    return ResumableLoader(Numbers(), batch_size=2, shuffle=True, seed=3, num_workers=workers)


def trainer(root: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=list(callbacks),
        **(defaults | options),
    )


def snapshot(fitted: pl.Trainer) -> dict[str, Tensor]:
    """Weights and optimizer state, all tensors by name."""
    tensors = {name: value.clone() for name, value in fitted.lightning_module.state_dict().items()}
    for index, state in fitted.optimizers[0].state_dict()["state"].items():
        tensors |= {f"{index}/{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return tensors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class SaveAt(pl.Callback):
    """Saves where ModelCheckpoint does, and stops there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop")
