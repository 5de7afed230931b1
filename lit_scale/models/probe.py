"""What a representation is worth (He et al. 2022): accuracy of a linear probe on it, and after fine-tuning.

A reconstruction loss compares nothing but autoencoders with the same masks and targets; these two compare what one
pre-trains for.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lit_scale.cost import CostMeter
from lit_scale.models.mae import MaskedAutoencoder
from lit_scale.schedules import warmup_cosine
from lit_scale.trainers import callbacks_of

__all__ = ["ProbeAtEnd", "fine_tune", "linear_probe"]


def linear_probe(
    model: MaskedAutoencoder, data: LightningDataModule, *, decay: float = 1e-4, split: Literal["val", "test"] = "val"
) -> float:
    """Accuracy on held-out images of a linear classifier on the frozen, mean-pooled features of the training images.

    Features are brought to mean 0 and variance 1 on the training images (the paper's BatchNorm without weights,
    appendix A.1); the classifier is the optimum of a convex problem, found by L-BFGS, so it has no seed.

    Args:
        model: A trained autoencoder, on any device.
        data: A data module that was set up, with batches (images, labels); one epoch of its training images is used.
        decay: Half of it times the squared weights is added to the mean cross-entropy.
        split: Which held-out images.
    """
    loaders = data.train_dataloader(), data.test_dataloader() if split == "test" else data.val_dataloader()
    (train, labels), (held_out, expected) = (_features(model, loader) for loader in loaders)
    deviation, mean = torch.std_mean(train, 0, correction=0)
    weight, bias = solve((train - mean) / (deviation + 1e-6), labels, decay=decay)
    logits = (held_out - mean) / (deviation + 1e-6) @ weight.T + bias
    return float((logits.argmax(1) == expected).double().mean())


def solve(features: Tensor, labels: Tensor, *, decay: float, max_iterations: int = 1_000) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: the weights (K, C) and biases (K,) of least cross-entropy plus decay.

    Example:
        >>> weight, bias = solve(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), decay=0.1)
        >>> bool(weight[1] > 0 > weight[0]), bias.abs().max().item() < 1e-6
        (True, True)
    """
    classes = int(labels.max()) + 1
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-7, history_size=20
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()


def fine_tune(
    model: MaskedAutoencoder,
    data: LightningDataModule,
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    layer_decay: float = 0.75,
    warmup: float = 0.05,
    seed: int = 0,
) -> float:
    """Accuracy on the validation images of a classifier that starts as the encoder; the autoencoder stays as it is.

    All patches are seen, their mean is classified, and everything trains, deeper layers faster (table 9 of the paper).

    Args:
        model: A trained autoencoder, on any device.
        data: A data module that was set up, with batches (images, labels) and an attribute ``num_classes``.
        steps: Optimizer steps.
        lr: Peak learning rate; it then falls along a cosine to 0.
        weight_decay: Decay of matrices (0.05, table 9).
        layer_decay: Factor on the rate from each block to the one below (0.75, table 9).
        warmup: Fraction of the steps during which the rate climbs (5 of 100 epochs, table 9).
        seed: Of what is drawn meanwhile.

    Raises:
        ValueError: If ``steps`` is below 1, or the data module does not tell its number of classes.
    """
    from timm.optim import create_optimizer_v2

    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if not hasattr(data, "num_classes"):
        raise ValueError(f"{type(data).__name__} has no num_classes, which a classifier needs")
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        network: Any = copy.deepcopy(model.encoder).requires_grad_(True)
        network.reset_classifier(data.num_classes, "avg")
        nn.init.zeros_(network.head.weight)
        nn.init.zeros_(network.head.bias)
        network.to(model.device).train()
        optimizer = create_optimizer_v2(
            network, opt="adamw", lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, betas=(0.9, 0.999)
        )
        rates = [lr * group["lr_scale"] for group in optimizer.param_groups]  # timm leaves the product to schedulers
        for step, (images, labels) in enumerate(itertools.islice(_endless(data), steps)):
            factor = warmup_cosine((step + 1) / (steps + 1), warmup)  # never quite 0
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = F.cross_entropy(network(images.to(model.device)), labels.to(model.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = [network(images.to(model.device)).argmax(1).cpu() == labels for images, labels in data.val_dataloader()]
    return float(torch.cat(right).double().mean())


@torch.no_grad()
def _features(model: MaskedAutoencoder, loader: Any) -> tuple[Tensor, Tensor]:
    """Features (N, C) and labels (N,) of one epoch, in double precision on the CPU."""
    training = model.training
    model.eval()
    pairs = [(model(images.to(model.device)).double().cpu(), labels) for images, labels in loader]
    model.train(training)
    features, labels = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(labels)


def _endless(data: LightningDataModule) -> Iterator[Any]:
    loader = data.train_dataloader()
    while True:
        yield from loader


class ProbeAtEnd(Callback):
    """Probes and fine-tunes the autoencoder when training has ended, prints both accuracies, and notes them.

    They go into the :class:`~lit_scale.cost.CostMeter`'s record, whose clock has stopped by then: they are no part of
    the run's cost, and leave weights and random state alone. With several processes nothing is measured; do it from
    the checkpoint, by :func:`linear_probe` and :func:`fine_tune`.

    Args:
        steps: Optimizer steps of fine-tuning; 0 leaves it out.
        lr: Peak learning rate of fine-tuning.
        decay: Of the linear probe's weights.

    Raises:
        ValueError: If ``steps`` is negative, or in ``setup``, if the module is no autoencoder or there is no data
            module.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ProbeAtEnd(steps=100)], accelerator="cpu", logger=False)
    """

    def __init__(self, steps: int = 200, lr: float = 1e-3, decay: float = 1e-4) -> None:
        if steps < 0:
            raise ValueError(f"steps={steps} must not be negative")
        self.steps, self.lr, self.decay = steps, lr, decay
        self.accuracies: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be probed before anything is trained."""
        if not isinstance(pl_module, MaskedAutoencoder):
            raise ValueError(f"ProbeAtEnd probes a MaskedAutoencoder, but this is a {type(pl_module).__name__}")
        if stage == "fit" and trainer.datamodule is None:  # type: ignore[attr-defined]
            raise ValueError("ProbeAtEnd needs labels: give the Trainer a data module, fit(model, datamodule=...)")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, print and note."""
        if trainer.world_size > 1:
            rank_zero_warn("ProbeAtEnd measures in one process only; use linear_probe and fine_tune on the checkpoint")
            return
        assert isinstance(pl_module, MaskedAutoencoder)
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.accuracies = {"linear_probe_accuracy": linear_probe(pl_module, data, decay=self.decay)}
        if getattr(data, "test_set", None) is not None:
            tested = linear_probe(pl_module, data, decay=self.decay, split="test")
            self.accuracies["test_linear_probe_accuracy"] = tested
        if self.steps:
            self.accuracies["fine_tune_accuracy"] = fine_tune(pl_module, data, steps=self.steps, lr=self.lr)
        for name, accuracy in self.accuracies.items():
            print(f"{name.replace('_', ' ')}: {accuracy:.1%}", flush=True)
        for meter in callbacks_of(trainer, CostMeter):
            meter.extra |= self.accuracies
            meter.write(trainer, pl_module)
