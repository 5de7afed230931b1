"""Resolution growing for Vision Transformers: train on small images first and on full ones at the end.

    tokens of an image of side s = (s / patch)^2;  s grows by stages of the run

Early steps at half the side cost a quarter or less (Touvron et al. 2019, "Fixing the train-test resolution
discrepancy"; Li et al. 2022, "Automated Progressive Learning for Efficient Training of Vision Transformers", section 3;
Composer's progressive resizing). The model interpolates its position embeddings, and the last stage is at full size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lit_scale.factors.sizes import SizeByStages
from lit_scale.wrapping import replace

__all__ = ["ResolutionGrowing", "patch_size"]

_INTERPOLATES = "interpolate_pos_encoding"  # Hugging Face's argument


def patch_size(module: nn.Module) -> int | None:
    """Side of a network's patches in pixels; None if it is not found.

    It is the attribute ``patch_size`` of timm or Hugging Face, or the kernel size of the first convolution whose stride
    equals its kernel size.
    """
    for part in module.modules():
        declared = getattr(part, "patch_size", None) or getattr(getattr(part, "config", None), "patch_size", None)
        if isinstance(declared, int | tuple | list):
            return declared if isinstance(declared, int) else declared[0]
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.stride == part.kernel_size and part.stride[0] > 1:
            return part.stride[0]
    return None


class ResolutionGrowing(SizeByStages):
    """Trains on small images first, and on larger ones by stages of the run.

    With :class:`~lit_scale.datamodules.ImageDataModule` images are resized before they are collated, so that less data
    is decoded and moved. Batches of other data modules are resized on the device, with antialiasing: every
    floating-point tensor of four axes (B, C, H, W). Validation is always at full size. The model must accept any size:
    build timm's with ``dynamic_img_size=True``; Hugging Face's models are made to interpolate their position
    embeddings.

    Args:
        stages: (start, size) pairs; starts are fractions of the run, ascending from 0 and below 1; sizes ascend to full
            size, as a fraction of the side (float, rounded to the nearest multiple of the patch) or in pixels (int).
            The default follows Composer's progressive resizing, with one intermediate size (ours).
        grow_batch: Whether batches of small images have more of them, so that every step has about as many tokens as
            one at full size. This needs ImageDataModule.
        patch: Sizes are multiples of this number of pixels; by default the side of the model's patches.

    Raises:
        ValueError: At construction or before the first step, if the stages do not ascend to full size, a size is not a
            multiple of the patch, the model does not accept other sizes, or the loader cannot be asked for more images
            although ``grow_batch`` is set.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> growing = ResolutionGrowing(stages=[(0.0, 0.5), (0.5, 0.75), (0.8, 1.0)])
        >>> trainer = Trainer(max_steps=1_000, callbacks=[growing], logger=False)
    """

    def __init__(
        self,
        stages: Sequence[tuple[float, int | float]] = ((0.0, 0.5), (0.5, 0.75), (0.8, 1.0)),
        *,
        grow_batch: bool = False,
        patch: int | None = None,
    ) -> None:
        super().__init__(stages)
        if patch is not None and patch < 1:
            raise ValueError(f"patch={patch} must be at least 1 pixel")
        self.grow_batch, self.patch = grow_batch, patch
        self._multiple = 1

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return super().settings() | {"grow_batch": self.grow_batch, "patch": self.patch}

    # -- sizes --------------------------------------------------------------------------------------------------------

    def resolve(self, size: int | float, full: int) -> int:
        """Side of the images of a stage, in pixels."""
        multiple = self._multiple
        pixels = size if isinstance(size, int) else max(multiple, round(size * full / multiple) * multiple)
        if size == 1.0 and isinstance(size, float):
            pixels = full
        if pixels % multiple:
            raise ValueError(
                f"stages={self.stages}: images of {pixels} pixels are no whole number of patches of {multiple}; use "
                f"{max(1, pixels // multiple) * multiple} or {(pixels // multiple + 1) * multiple}"
            )
        return pixels

    def size_of(self, batch: Any) -> int:
        """Side of the batch's images, in pixels."""
        for leaf in torch.utils._pytree.tree_leaves(batch):
            if _are_images(leaf):
                if leaf.shape[2] != leaf.shape[3]:
                    raise ValueError(f"images are {leaf.shape[2]} x {leaf.shape[3]} pixels; they must be square")
                return int(leaf.shape[2])
        raise ValueError("the batch holds no images: no floating-point tensor of four axes (B, C, H, W)")

    def shrink(self, batch: Any, size: int) -> Any:
        """The batch with its images resized."""
        return tree_map(lambda leaf: resize(leaf, size) if _are_images(leaf) else leaf, batch)

    def samples(self, size: int, batch_size: int) -> int:
        """Number of images that together have the tokens of a full batch, class tokens not counted."""
        return round(batch_size * (self._sizes[-1] / size) ** 2) if self.grow_batch else batch_size

    # -- the model ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the patch size, and refuse a model that is built for one image size."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        found = self.patch or patch_size(pl_module)
        if found is None:
            raise ValueError(f"{type(pl_module).__name__} shows no patches; say patch=, of which sizes are multiples")
        self._multiple = found
        for name, part in pl_module.named_modules():
            if getattr(part, "strict_img_size", False):
                raise ValueError(
                    f"{name} takes images of one size only; build the timm model with dynamic_img_size=True"
                )
            if _INTERPOLATES in inspect.signature(part.forward).parameters and "forward" not in part.__dict__:
                self.undo_later(replace(part, "forward", functools.partial(_interpolated, part.forward)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the loader, and that the model accepts the smallest images, before the first step."""
        super().on_train_start(trainer, pl_module)
        if self.grow_batch and self._loader is None:
            raise ValueError("grow_batch=True needs a loader that can be asked for more samples: ImageDataModule's")
        if self._sizes:
            self._try(pl_module, self._sizes[0])

    def _resolve(self, full: int) -> None:
        super()._resolve(full)
        if self._loader is None and self._trainer is not None:
            self._try(self._trainer.lightning_module, self._sizes[0])

    def _try(self, pl_module: LightningModule, size: int) -> None:
        """Run the module's forward, if it has one, on an image of zeros of the smallest size."""
        if type(pl_module).forward is LightningModule.forward:
            return
        convolutions = [part for part in pl_module.modules() if isinstance(part, nn.Conv2d)]
        channels = convolutions[0].in_channels if convolutions else 3
        image = torch.zeros(1, channels, size, size, device=pl_module.device).to(pl_module.dtype)
        modes = [(part, part.training) for part in pl_module.modules()]
        try:
            with torch.no_grad():
                pl_module.eval()(image)
        except Exception as error:
            raise ValueError(
                f"{type(pl_module).__name__} cannot take images of {size} pixels ({error}); its position embeddings "
                "must adapt to the size, or stages= must keep to one"
            ) from error
        finally:
            for part, mode in modes:
                part.training = mode


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images (B, C, H, W) to a side of ``size`` pixels, bilinear and antialiased; the dtype is kept."""
    exact = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    resized = F.interpolate(exact, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.to(images.dtype)


def _are_images(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.is_floating_point()


def _interpolated(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """A Hugging Face forward that interpolates position embeddings unless the caller says otherwise."""
    if kwargs.get(_INTERPOLATES) is None:
        kwargs[_INTERPOLATES] = True
    return forward(*args, **kwargs)
