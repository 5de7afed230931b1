"""Short runs: fitted without a word, resumed from where they were saved, and what they leave behind.

`fit` trains one; with `save_every_step` among its callbacks it leaves a file for each step, and `resume` goes on from
one of them. `left` is all that a run leaves, to be compared with `tests.support.equality`. `Watch` notes what happens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer
from torch import Tensor

from lit_scale.batches import count_samples
from lit_scale.guards import StepSeed
from lit_scale.technique import Technique, averages
from tests.support.networks import all_blocks


def quiet_trainer(root: Any = None, **options: Any) -> Trainer:
    """A Trainer on the CPU that logs, prints and saves nothing unless told to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": any(isinstance(one, Checkpoint) for one in options.get("callbacks", ())),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(**(defaults | options))


def trainer_of(root: Any, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet Trainer with these callbacks, for two epochs unless told otherwise."""
    return quiet_trainer(root, callbacks=list(callbacks), **({"max_epochs": 2} | options))


def save_every_step(folder: Any) -> ModelCheckpoint:
    """Leaves `step=N.ckpt` in a folder after each optimizer step."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def fit(
    module: LightningModule,
    data: Any,
    root: Path,
    *callbacks: Callback,
    val: Any = None,
    resume: Path | None = None,
    step_seed: bool = True,
    **options: Any,
) -> Trainer:
    """Train, with randomness that is counted unless told otherwise; a resumed run has another past."""
    if resume is not None:
        torch.manual_seed(12_345)
    seeds = [StepSeed()] if step_seed else []
    trainer = quiet_trainer(root, callbacks=[*seeds, *callbacks], **options)
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=resume)
    else:
        trainer.fit(module, data, val, ckpt_path=resume)
    return trainer


def left(trainer: Trainer) -> dict[str, Any]:
    """All that a run leaves behind, copied: weights, averages, optimizers with their rates, techniques, metrics."""
    techniques = [one for one in trainer.callbacks if isinstance(one, Technique)]  # type: ignore[attr-defined]
    found = {
        "steps": trainer.global_step,
        "weights": dict(trainer.lightning_module.state_dict()),
        "averages": [dict(average.state_dict()) for average in averages(trainer)],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "techniques": {technique.name: technique.state_dict() for technique in techniques},
        "metrics": dict(trainer.callback_metrics),
    }
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, found)


@dataclass
class Ran:
    """A run that has ended: its Trainer and module, what was seen on the way, and all that it left."""

    trainer: Trainer
    module: Any
    watch: "Watch"
    left: dict[str, Any]


def run(module: Any, data: Any, root: Path, *callbacks: Callback, watch: "Watch | None" = None, **options: Any) -> Ran:
    """`fit`, with a witness in front of the callbacks."""
    watch = watch or Watch()
    trainer = fit(module, data, root, watch, *callbacks, **options)
    return Ran(trainer, module, watch, left(trainer))


def trained_and_reloaded(module: Any, data: Any, root: Path) -> Any:
    """A module of the same class and settings, from the file of two steps of training."""
    trainer = quiet_trainer(root, max_steps=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(root / "last.ckpt")
    loaded = type(module).load_from_checkpoint(root / "last.ckpt", weights_only=True)
    assert dict(loaded.hparams) == dict(module.hparams)
    return loaded


def gap_between_ranks(module: LightningModule) -> float:
    """The largest difference between the parameters of two processes."""
    own = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    both = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(both, own)
    return max((both[0] - one).abs().max().item() for one in both)


def note_samples(module: Any, note: Callable[[Any], None]) -> None:
    """Tell of every batch that `per_sample_loss` is given in training; found without lit_scale."""
    method = type(module).per_sample_loss

    def noted(batch: Any) -> Tensor:
        if module.training:
            note(batch)
        return method(module, batch)

    module.per_sample_loss = noted


class Watch(Callback):
    """Notes what each step is given, what it trains, its loss, and how far apart the ranks are behind it."""

    def __init__(self) -> None:
        self.batches: list[Any] = []  #: as they come
        self.trained_batches: list[Any] = []  #: as `per_sample_loss` is given them
        self.validated_batches: list[Any] = []
        self.losses: list[float] = []
        self.gaps: list[float] = []

    @property
    def brought(self) -> list[int]:
        return [count_samples(batch) for batch in self.batches]

    @property
    def trained(self) -> list[int]:
        return [count_samples(batch) for batch in self.trained_batches]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if hasattr(type(pl_module), "per_sample_loss"):
            note_samples(pl_module, self.trained_batches.append)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.batches.append(batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        if trainer.world_size > 1:
            self.gaps.append(gap_between_ranks(pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.validated_batches.append(batch)


class Recorder(Callback):
    """Notes after every batch the loss and, as (optimizer steps, blocks that run), what an observer sees."""

    def __init__(self, blocks: str) -> None:
        self.blocks = blocks
        self.losses: list[float] = []
        self.depths: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        running = sum(any(p.grad is not None for p in b.parameters()) for b in all_blocks(pl_module, self.blocks))
        self.depths.append((trainer.global_step, running))


class StepTimer(Timer):
    """A limit of 80 seconds and a clock on which a step takes 10; that of rank 1 is 15 seconds ahead."""

    def __init__(self) -> None:
        super().__init__(duration={"seconds": 80})

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.trainer = trainer

    def time_elapsed(self, *_: Any) -> float:
        return 10.0 * self.trainer.global_step + 15.0 * self.trainer.global_rank


class SaveAt(Callback):
    """Saves where ModelCheckpoint does, and stops there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop")


def refused(trainer: Trainer, module: LightningModule, techniques: Sequence[Technique]) -> str | None:
    """What the first technique's setup has against this run; None: nothing."""
    try:
        techniques[0].setup(trainer, module, "fit")
    except ValueError as error:
        return str(error)
    return None
