"""RHO-loss (Mindermann et al., ICML 2022, arXiv 2206.07137): train on what is learnable, worth it and not yet learnt.

    of a large batch take the share q with the largest   loss_i - irreducible loss_i

The irreducible loss is that of a model trained on held-out data, a small one. With the paper's q a step and the forward
pass over ten times as many samples cost 4.3 plain steps, and the other model comes on top: it has to save more steps.
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
    """The share of the samples whose loss can be reduced most, as ascending indices.

    Args:
        losses: Under the model that is trained, (B,).
        irreducible: Under the one that was trained on held-out data, (B,).
        share: In (0, 1].

    Example:
        >>> top_reducible(torch.tensor([5.0, 2.0, 0.1, 3.0]), torch.tensor([4.9, 0.1, 0.1, 0.2]), share=0.5)
        tensor([1, 3])
    """
    order = (losses - irreducible).argsort(descending=True, stable=True)
    return order[: round_share(share, len(losses))].sort().values


class RhoLoss(SampleChoice):
    """Trains on the samples whose loss can still be reduced, as a second model tells.

    Both models are run over a large batch without dropout, and the top share of it is trained, unweighted. A loader
    that takes a plan, as those of our data modules do, is asked for ``1 / share`` times as many samples, so that a step
    trains as many as ever; of any other loader each batch is the large one. Both modules need
    ``per_sample_loss(batch) -> (B,)``.

    The second model is no part of the run's checkpoints; resuming asks for the same one. What its training has cost is
    charged to this run's clock, if its checkpoint tells (it was trained beside a ``CostMeter``).

    Args:
        irreducible: The model that was trained on held-out data, or a checkpoint of one of the trained module's class,
            which may be smaller.
        share: Share q of the samples that is trained (0.1 in the paper).

    Raises:
        ValueError: At construction; or in ``setup``, if a module has no ``per_sample_loss``, or the checkpoint is of
            another class.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = RhoLoss("irreducible.ckpt", share=0.1)
        >>> trainer = Trainer(max_steps=1_000, callbacks=[technique], logger=False)
    """

    def __init__(self, irreducible: LightningModule | str | Path, *, share: float = 0.1) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"share={share} is not a share of the samples in (0, 1), such as 0.1")
        self.irreducible, self.share = irreducible, share
        self._other: Any = None  # the model
        self._checkpoint: dict[str, Any] = {}  # its own, without the weights
        self._fingerprint = ""  # of its weights
        self._plain = False  # the clock prices a step without the technique

    def settings(self) -> dict[str, Any]:
        """The share, and which model tells the irreducible loss."""
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
        """Bring the second model to the device, charge what it has cost, and ask the loader for large batches."""
        super().on_train_start(trainer, pl_module)
        self._other.to(pl_module.device)
        if not charge_run(trainer, "irreducible losses", self._checkpoint):
            rank_zero_info("RhoLoss: what the second model's training has cost is not known, and not charged")
        if self._loader is None:
            rank_zero_info(
                "RhoLoss: this loader cannot be asked for more samples, so a step trains "
                f"{self.share:g} of each of its batches"
            )

    def samples(self, number: int, count: int) -> int:
        """So many that as many as ever are trained."""
        return round(count / self.share)

    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """Take those whose loss can be reduced most."""
        count = count_samples(batch)
        if self._plain and self._loader is not None:  # without the technique it would bring so many
            batch = take_samples(batch, slice(0, round_share(self.share, count)))
        if self._plain or round_share(self.share, count) == count:
            return step(batch)
        index = top_reducible(sample_losses(pl_module, batch), sample_losses(self._other, batch), self.share)
        return step(take_samples(batch, index))

    def is_plain(self) -> bool:
        """Only where the clock asks for it."""
        return self._plain

    def plain_step_kind(self) -> dict[str, Any]:
        """As many samples are trained, and none are scored."""
        return {"samples_kept": "unscored"}

    def step_kind(self) -> dict[str, Any]:
        """Share of the samples that is trained."""
        return {"samples_kept": "unscored" if self._plain else self.share}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Score no samples where a step is to be plain."""
        self._plain = kind["samples_kept"] == "unscored"
