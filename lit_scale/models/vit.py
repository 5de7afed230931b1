"""Vision Transformer (Dosovitskiy et al., ICLR 2021), or any other image classifier in timm."""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_scale.models.training import Scheduled, check_warmup

__all__ = ["ViTClassifier"]

Batch = tuple[Tensor, Tensor]
_TAKES_NO = re.compile(r"unexpected keyword argument '(\w+)'")


class ViTClassifier(Scheduled):
    """Image classifier around a network of timm, trained from random weights with cross-entropy.

    Batches are pairs of images (B, 3, S, S) and classes (B,), as :class:`~lit_scale.datamodules.ImageDataModule` makes
    them. If the network allows it, images may be smaller or larger than ``image_size``: the position embedding is then
    interpolated at each step, and its parameters are unchanged.

    Args:
        architecture: A name from ``timm.list_models()``.
        num_classes: Number of classes.
        image_size: Side S of the images in pixels; not passed to networks that take any size.
        patch_size: Side of a patch in pixels; for this and the next three, None keeps the architecture's value.
        depth: Number of blocks.
        width: Channels of the residual stream.
        num_heads: Attention heads.
        init_std: Standard deviation of the initial weights of linear maps; None keeps timm's, which for Vision
            Transformers is 0.02, meant for 768 channels. 0.02 sqrt(768 / width) keeps the scale of their outputs.
        drop_path: Rate at which the last block is skipped for a sample, rising linearly from 0 at the first (Huang et
            al. 2016; 0.1 in DeiT, Touvron et al. 2021).
        label_smoothing: Share of the target spread over all classes in training (0.1 in DeiT).
        optimizer: Any name that :func:`lit_scale.factors.optimizers.create_optimizer` knows.
        lr: Peak learning rate.
        weight_decay: Decay of matrices; biases, norms, position embeddings and other vectors have none (0.05 in DeiT).
        beta2: Decay rate of the second moment, for Adam-like optimizers.
        warmup: Fraction of the run over which the learning rate rises linearly, in [0, 1); a cosine decay to 0 at the
            end of the run follows.

    Raises:
        ValueError: If timm does not have the architecture, or it does not accept an argument; if a size is below 1 or a
            rate out of range; if ``image_size`` is not a multiple of the patch size, or ``width`` not of ``num_heads``;
            or if a batch is not a pair (images, classes) or has a class outside of ``num_classes``.

    Example:
        >>> import torch
        >>> model = ViTClassifier(num_classes=10, image_size=32, patch_size=8, depth=2, width=32, num_heads=2)
        >>> model(torch.randn(4, 3, 32, 32)).shape, model(torch.randn(4, 3, 16, 16)).shape
        (torch.Size([4, 10]), torch.Size([4, 10]))
    """

    def __init__(
        self,
        architecture: str = "vit_tiny_patch16_224",
        *,
        num_classes: int = 1000,
        image_size: int = 224,
        patch_size: int | None = None,
        depth: int | None = None,
        width: int | None = None,
        num_heads: int | None = None,
        init_std: float | None = None,
        drop_path: float = 0.0,
        label_smoothing: float = 0.0,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        beta2: float = 0.999,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "image_size": image_size, "patch_size": patch_size}
        sizes |= {"depth": depth, "width": width, "num_heads": num_heads}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, rate in {"drop_path": drop_path, "label_smoothing": label_smoothing}.items():
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name}={rate} is not a rate in [0, 1)")
        if init_std is not None and not init_std > 0.0:
            raise ValueError(f"init_std={init_std} is not above 0; 0.05 suits 128 channels, None leaves timm's")
        if width is not None and num_heads is not None and width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        check_warmup(warmup)
        self.save_hyperparameters()
        asked: dict[str, Any] = {"patch_size": patch_size, "depth": depth, "embed_dim": width, "num_heads": num_heads}
        asked |= {"drop_path_rate": drop_path or None}
        self.net = _create(architecture, num_classes, image_size, asked)
        for part in self.net.modules():
            if init_std is not None and isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=init_std, a=-2.0, b=2.0)
        patch = getattr(getattr(self.net, "patch_embed", None), "patch_size", None)
        if patch is not None and any(image_size % side for side in patch):
            below = image_size // patch[0] * patch[0]
            raise ValueError(
                f"image_size={image_size} is not a multiple of the patch size, {patch[0]}: choose "
                f"{below or patch[0]} or {below + patch[0]}, or another patch_size"
            )
        self.val_loss = MeanMetric()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, such as the position embedding; `create_optimizer` calls this."""
        ask: Any = getattr(self.net, "no_weight_decay", set)
        return {f"net.{name}" for name in ask()}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, 3, S, S)."""
        return self.net(images)

    def per_sample_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of each sample, label smoothing included, in nats: (B,)."""
        images, labels = batch
        smoothing = self.hparams["label_smoothing"]
        return F.cross_entropy(self(images), labels, reduction="none", label_smoothing=smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean of the per-sample losses."""
        self._check(batch, batch_idx)
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss

    def evaluation_step(self, batch: Batch, batch_idx: int, split: str) -> None:
        """Cross-entropy (nats, without label smoothing) and accuracy over the whole split."""
        self._check(batch, batch_idx)
        images, labels = batch
        logits = self(images)
        self.val_loss.update(F.cross_entropy(logits, labels), weight=labels.numel())
        self.val_accuracy.update(logits, labels)
        self.log(f"{split}/loss", self.val_loss, prog_bar=True)
        self.log(f"{split}/accuracy", self.val_accuracy, prog_bar=True)

    def _check(self, batch: Any, batch_idx: int) -> None:
        """Refuse a batch that is not a pair or has other classes; on a GPU only the first, to avoid synchronisation."""
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise ValueError(
                "a batch has to be a pair of images and whole-numbered classes, as ImageDataModule makes it"
            )
        if labels.is_cpu or batch_idx == 0:
            classes, least, most = self.hparams["num_classes"], int(labels.min()), int(labels.max())
            if least < 0 or most >= classes:
                raise ValueError(
                    f"the batch has classes from {least} to {most}, but num_classes={classes} allows 0 to {classes - 1}"
                )


def _create(architecture: str, num_classes: int, image_size: int, asked: dict[str, Any]) -> nn.Module:
    """Build the network; arguments about the image size are left out if the architecture does not accept them."""
    import timm  # here, because text models do not need it

    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has all names"
        raise ValueError(f"architecture={architecture!r} is unknown to timm; {hint}")
    options = {name: value for name, value in asked.items() if value is not None}
    offered: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True}
    while True:  # until every argument that the network does not accept is left out
        try:
            return timm.create_model(architecture, pretrained=False, num_classes=num_classes, **options, **offered)
        except TypeError as error:
            refused = _TAKES_NO.search(str(error))
            if refused is None or refused[1] not in options | offered:
                raise
            if refused[1] in options:
                flag = {"embed_dim": "width", "drop_path_rate": "drop_path"}.get(refused[1], refused[1])
                raise ValueError(f"{flag}={options[refused[1]]}: {architecture} takes no such argument") from error
            del offered[refused[1]]
        except (AssertionError, ValueError) as error:
            given = ", ".join(f"{name}={value}" for name, value in (options | offered).items())
            raise ValueError(f"architecture={architecture!r} cannot be made with {given}: {error}") from error
