"""RHO-loss (Mindermann et al., ICML 2022, arXiv 2206.07137): train on samples whose loss can still be reduced.

    of a large batch train the share q with the largest   loss_i - irreducible loss_i

The irreducible loss is that of a second, usually small, model trained on held-out data. With the paper's q = 0.1, the
forward pass over ten times as many samples and the step itself cost 4.3 plain steps, plus the second model's forward
pass. So the run must need fewer than a quarter of the steps.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_scale.batches import count_samples, take_samples
from lit_scale.cost import charge_run
from lit_scale.factors.samples import SampleChoice, Step, round_share
from lit_scale.factors.scores import sample_losses
from lit_scale.guards import load_checkpoint

__all__ = ["RhoLoss", "top_reducible"]


def top_reducible(losses: Tensor, irreducible: Tensor, share: float) -> Tensor:
    """Ascending indices of the share of the samples whose loss can be reduced most.

    Args:
        losses: Losses under the model that is trained, (B,).
        irreducible: Losses under the model that was trained on held-out data, (B,).
        share: Share of the samples, in (0, 1].

    Example:
        >>> top_reducible(torch.tensor([5.0, 2.0, 0.1, 3.0]), torch.tensor([4.9, 0.1, 0.1, 0.2]), share=0.5)
        tensor([1, 3])
    """
    order = (losses - irreducible).argsort(descending=True, stable=True)
    return order[: round_share(share, len(losses))].sort().values


class RhoLoss(SampleChoice):
    """Trains on the samples whose loss can still be reduced, according to a second model.

    Both models run on a large batch without dropout, and the share with the largest difference of losses is trained,
    unweighted. A loader that takes a plan, as those of our data modules do, is asked for ``1 / share`` times as many
    samples, so that a step trains the usual number; with any other loader each batch is the large one. Both modules
    need ``per_sample_loss(batch) -> (B,)``.

    The second model is not in the run's checkpoints; give the same one when you resume. The cost of its training is
    charged to this run's clock if its checkpoint holds the state of a ``CostMeter``.

    Args:
        irreducible: A LightningModule that was trained on held-out data, or the path of a checkpoint of one. A
            checkpoint must be of the class that is trained; the model in it may be smaller.
        share: Share q of the samples that is trained, in (0, 1) (0.1 in the paper: 32 of 320).

    Raises:
        ValueError: At construction; or in ``setup``, if a module has no ``per_sample_loss``, or the checkpoint cannot
            be loaded as one of the trained class.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = RhoLoss("irreducible.ckpt", share=0.1)
        >>> trainer = Trainer(max_steps=1_000, callbacks=[technique], logger=False)
    """

    def __init__(self, irreducible: LightningModule | str | Path, *, share: float = 0.1) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"share={share} is not a share of the samples in (0, 1), such as 0.1")
        self.irreducible, self.share = irreducible, share
        self._other: Any = None  # the second model
        self._checkpoint: dict[str, Any] = {}  # callback states of its checkpoint
        self._fingerprint = ""  # hash of its weights
        self._plain = False  # whether the clock times a step without the technique

    def settings(self) -> dict[str, Any]:
        """The share, and a hash of the second model's weights."""
        return {"share": self.share, "irreducible": self._fingerprint}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the second model."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._other = self._load(type(pl_module))
        if self._other is pl_module or not callable(getattr(self._other, "per_sample_loss", None)):
            why = "is the model that is trained" if self._other is pl_module else "has no method per_sample_loss(batch)"
            raise ValueError(
                f"irreducible: {type(self._other).__name__} {why}; give another LightningModule with such a method, "
                "trained on data that are held out"
            )
        self._other.eval().requires_grad_(False)
        weights = [part for part in self._other.state_dict().values() if isinstance(part, Tensor) and part.numel()]
        parts = [part.detach().cpu().flatten().view(torch.uint8).numpy().tobytes() for part in weights]
        self._fingerprint = hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()

    def _load(self, kind: type[LightningModule]) -> LightningModule:
        if isinstance(self.irreducible, LightningModule):
            return self.irreducible
        path = str(self.irreducible)
        try:
            self._checkpoint = {"callbacks": load_checkpoint(path).get("callbacks", {})}
            return kind.load_from_checkpoint(path, map_location="cpu")
        except Exception as error:
            raise ValueError(
                f"irreducible={path!r} is no checkpoint of a {kind.__name__} ({error}); give one, or "
                "the LightningModule itself"
            ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the second model to the device, charge its training cost, and ask the loader for large batches."""
        super().on_train_start(trainer, pl_module)
        self._other.to(pl_module.device)
        if not charge_run(trainer, "irreducible losses", self._checkpoint):
            rank_zero_info("RhoLoss: the training cost of the second model is not known and not charged")
        if self._loader is None:
            rank_zero_info(
                "RhoLoss: this loader cannot be asked for more samples, so a step trains "
                f"{self.share:g} of each of its batches"
            )

    def samples(self, number: int, count: int) -> int:
        """Size of the large batch, of which the share has ``count`` samples."""
        return round(count / self.share)

    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """Train on the samples whose loss can be reduced most."""
        count = count_samples(batch)
        if self._plain and self._loader is not None:  # the loader's batch without the technique is this share
            batch = take_samples(batch, slice(0, round_share(self.share, count)))
        if self._plain or round_share(self.share, count) == count:
            return step(batch)
        index = top_reducible(sample_losses(pl_module, batch), sample_losses(self._other, batch), self.share)
        return step(take_samples(batch, index))

    def is_plain(self) -> bool:
        """Whether the clock times a plain step; the technique itself makes none."""
        return self._plain

    def plain_step_kind(self) -> dict[str, Any]:
        """The same number of samples is trained, without scoring any."""
        return {"samples_kept": "unscored"}

    def step_kind(self) -> dict[str, Any]:
        """Share of the samples that is trained."""
        return {"samples_kept": "unscored" if self._plain else self.share}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Skip the scoring if a step of this kind does."""
        self._plain = kind["samples_kept"] == "unscored"
