"""Quality of a representation (He et al. 2022): accuracy of a linear probe, and accuracy after fine-tuning.

A reconstruction loss can only compare autoencoders with the same masks and targets. These two accuracies measure the
purpose of pre-training.
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
    """Held-out accuracy of a linear classifier that is trained on frozen, mean-pooled features.

    Features are standardised to mean 0 and variance 1 over the training images (the paper's BatchNorm without weights,
    appendix A.1). The classifier is the optimum of a convex problem, found by L-BFGS, so it needs no seed.

    Args:
        model: A trained autoencoder, on any device.
        data: A data module after setup, with batches (images, labels); one epoch of its training images is used.
        decay: L2 penalty: decay / 2 times the sum of squared weights is added to the mean cross-entropy.
        split: Images to measure the accuracy on: ``"val"`` or ``"test"``.

    Returns:
        The accuracy, in [0, 1].
    """
    loaders = data.train_dataloader(), data.test_dataloader() if split == "test" else data.val_dataloader()
    (train, labels), (held_out, expected) = (_features(model, loader) for loader in loaders)
    deviation, mean = torch.std_mean(train, 0, correction=0)
    weight, bias = solve((train - mean) / (deviation + 1e-6), labels, decay=decay)
    logits = (held_out - mean) / (deviation + 1e-6) @ weight.T + bias
    return float((logits.argmax(1) == expected).double().mean())


def solve(features: Tensor, labels: Tensor, *, decay: float, max_iterations: int = 1_000) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: weights (K, C) and biases (K,) that minimise cross-entropy plus L2 penalty.

    ``features`` are (N, C), ``labels`` (N,); ``decay`` is as in :func:`linear_probe`.

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
    """Validation accuracy of a classifier that is fine-tuned from a copy of the encoder.

    No patch is masked, the mean over the patches is classified, and all weights are trained, with larger learning rates
    for later layers (table 9 of the paper).

    Args:
        model: A trained autoencoder, on any device; it is not changed.
        data: A data module after setup, with batches (images, labels) and an attribute ``num_classes``.
        steps: Optimizer steps.
        lr: Peak learning rate, followed by cosine decay to 0.
        weight_decay: Decay of matrices (0.05, table 9).
        layer_decay: Factor on the learning rate from each block to the one before it (0.75, table 9).
        warmup: Fraction of the steps over which the learning rate rises linearly (5 of 100 epochs, table 9).
        seed: Seed of torch's random numbers during fine-tuning.

    Returns:
        The accuracy, in [0, 1].

    Raises:
        ValueError: If ``steps`` is below 1, or the data module has no ``num_classes``.
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
        rates = [lr * group["lr_scale"] for group in optimizer.param_groups]  # timm leaves it to its schedulers
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
    """Probes and fine-tunes the autoencoder after training, and prints and records the accuracies.

    The accuracies are added to the record of :class:`~lit_scale.cost.CostMeter`. Its clock has stopped by then, so the
    measurement is not part of the run's cost. Weights and random state are not changed. With several processes nothing
    is measured; call :func:`linear_probe` and :func:`fine_tune` on the checkpoint instead.

    Args:
        steps: Optimizer steps of fine-tuning; 0 skips it.
        lr: Peak learning rate of fine-tuning.
        decay: L2 penalty of the linear probe.

    Raises:
        ValueError: If ``steps`` is negative; in ``setup``, if the module is not a :class:`MaskedAutoencoder` or there
            is no data module.

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
        """Refuse, before training, a module that cannot be probed."""
        if not isinstance(pl_module, MaskedAutoencoder):
            raise ValueError(f"ProbeAtEnd probes a MaskedAutoencoder, but this is a {type(pl_module).__name__}")
        if stage == "fit" and trainer.datamodule is None:  # type: ignore[attr-defined]
            raise ValueError("ProbeAtEnd needs labels: give the Trainer a data module, fit(model, datamodule=...)")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, print and record the accuracies."""
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
