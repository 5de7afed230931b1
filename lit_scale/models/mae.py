"""Masked autoencoder (He et al. 2022): a ViT that reconstructs the pixels of masked patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_scale.models.training import Scheduled, check_warmup

__all__ = ["MaskedAutoencoder", "patches_of"]


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, N, p * p * 3), row by row; inside a patch the channels come last.

    Example:
        >>> patches_of(torch.arange(48.0).view(1, 3, 4, 4), patch_size=2).shape
        torch.Size([1, 4, 12])
    """
    batch, channels, height, width = images.shape
    x = images.view(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


class MaskedAutoencoder(Scheduled):
    """A Vision Transformer of timm as encoder, a light decoder of timm's blocks, and a loss on the masked pixels.

    A batch is a tensor of images (B, 3, S, S), or a tuple whose first entry is one; other entries are ignored. Each
    image has its own random mask, drawn from torch's default generator, which :class:`~lit_scale.guards.StepSeed` makes
    a function of (seed, rank, batch). In validation and test the mask is a function of the batch's index, the same each
    time. Position embeddings are fixed sines and cosines.

    There is one mask token. With ``encode_masked`` it replaces the masked patches before the encoder, which then runs
    over all patches; otherwise it is inserted after the encoder, which runs over the visible patches only. Targets,
    decoder and parameters are the same in both cases. (In the paper the mask token has the decoder's width; here it is
    projected to it.) The ``state_dict`` holds ``encode_masked``.

    Args:
        architecture: Name of a Vision Transformer in timm; built without pre-trained weights.
        image_size: Side of the square images, in pixels.
        patch_size: Side of a patch, in pixels.
        depth: Blocks of the encoder; None is the architecture's.
        width: Channels of the encoder; None is the architecture's.
        num_heads: Attention heads of the encoder; None is the architecture's.
        mask_ratio: Share of the patches that is masked (0.75, section 3 of the paper).
        norm_pixels: Whether targets are normalised per patch (table 1d).
        encode_masked: Whether the encoder also runs over the masked patches, as mask tokens (table 1c);
            :class:`~lit_scale.callbacks.MaskedTokenSkip` switches it off.
        decoder_depth: Blocks of the decoder (8, table 1a); 0 makes a linear head on the encoder, as in SimMIM (Xie et
            al. 2022, section 3.3), which needs ``encode_masked``.
        decoder_width: Channels of the decoder (512, table 1b).
        decoder_heads: Attention heads of the decoder (16 in the paper's code).
        optimizer: Any name that :func:`lit_scale.factors.optimizers.create_optimizer` knows.
        lr: Peak learning rate (1.5e-4 per 256 images, table 8).
        weight_decay: Decay of matrices (0.05, table 8).
        beta2: Decay rate of the second moment, for Adam-like optimizers (0.95, table 8).
        warmup: Fraction of the run over which the learning rate rises linearly (40 of 800 epochs, table 8), in [0, 1);
            a cosine decay to 0 at the end of the run follows.

    Raises:
        ValueError: If neither encoder nor decoder processes the masked patches, a size is below 1, ``image_size`` is
            not a multiple of ``patch_size``, ``mask_ratio`` masks none or all of the patches, a width is not a multiple
            of 4 or of its number of heads, ``warmup`` is out of range, timm cannot build the architecture or it is not
            a plain Vision Transformer, or a batch holds no images of that size.

    Example:
        >>> sizes = {"image_size": 32, "patch_size": 8, "depth": 2, "width": 32, "num_heads": 2}
        >>> decoder = {"decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2}
        >>> model = MaskedAutoencoder("vit_tiny_patch16_224", **sizes, **decoder)
        >>> images = torch.randn(4, 3, 32, 32)
        >>> model(images).shape, model.per_sample_loss((images,)).shape
        (torch.Size([4, 32]), torch.Size([4]))
    """

    positions: Tensor

    def __init__(
        self,
        architecture: str = "vit_base_patch16_224",
        *,
        image_size: int = 224,
        patch_size: int = 16,
        depth: int | None = None,
        width: int | None = None,
        num_heads: int | None = None,
        mask_ratio: float = 0.75,
        norm_pixels: bool = True,
        encode_masked: bool = True,
        decoder_depth: int = 8,
        decoder_width: int = 512,
        decoder_heads: int = 16,
        optimizer: str = "adamw",
        lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        beta2: float = 0.95,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "depth": depth, "width": width, "num_heads": num_heads}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if decoder_depth < 0:
            raise ValueError(f"decoder_depth={decoder_depth} must not be negative; 0 is a linear head")
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}")
        if decoder_heads < 1 or decoder_width < 1 or decoder_width % decoder_heads:
            raise ValueError(f"decoder_width={decoder_width} is not a multiple of decoder_heads={decoder_heads}")
        check_warmup(warmup)
        self.side = image_size // patch_size  # patches along a side
        total = self.side**2
        if not 0.0 < mask_ratio < 1.0 or not 0 < round(mask_ratio * total) < total:
            raise ValueError(
                f"mask_ratio={mask_ratio} must lie between 0 and 1, and hide at least one of the {total} patches but "
                "not all of them"
            )
        self.save_hyperparameters()
        self.num_visible = total - round(mask_ratio * total)
        sizes = {"img_size": image_size, "patch_size": patch_size, "depth": depth, "embed_dim": width}
        sizes["num_heads"] = num_heads
        self.encoder = _vision_transformer(architecture, {k: v for k, v in sizes.items() if v is not None})
        width = self.encoder.embed_dim
        for name, channels in {"width": width, "decoder_width": decoder_width}.items():
            if channels % 4:
                raise ValueError(f"{name}={channels}: positions in two axes need a multiple of 4 channels")
        self._fix_positions()
        self.mask_token = nn.Parameter(torch.empty(width))
        self.to_decoder = nn.Linear(width, decoder_width)
        self.decoder = _blocks(decoder_depth, decoder_width, decoder_heads)
        self.encode_masked = encode_masked
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.to_pixels = nn.Linear(decoder_width, 3 * patch_size**2)
        self.register_buffer("positions", _sines_and_cosines(self.side, decoder_width), persistent=False)  # (N, D)
        for part in (self.mask_token, self.encoder.cls_token, self.encoder.reg_token):
            if part is not None:
                nn.init.normal_(part, std=0.02)
        for linear in (part for part in self.modules() if isinstance(part, nn.Linear | nn.Conv2d)):
            nn.init.xavier_uniform_(linear.weight.view(len(linear.weight), -1))  # appendix A.1; patch embedding too
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.val_loss = MeanMetric()

    @property
    def encode_masked(self) -> bool:
        """Whether the encoder also runs over the masked patches, as mask tokens."""
        return self._encode_masked

    @encode_masked.setter
    def encode_masked(self, value: bool) -> None:
        if not value and not len(self.decoder):
            raise ValueError(
                "decoder_depth=0 cannot restore patches that the encoder does not see; give the autoencoder a decoder "
                "of one block or more, or let the encoder see them (encode_masked=True, without MaskedTokenSkip)"
            )
        self._encode_masked = value

    def _fix_positions(self) -> None:
        """Write fixed position embeddings to timm's parameter; those of class and register tokens are zero."""
        table = self.encoder.pos_embed  # (1, P + N, C)
        with torch.no_grad():
            table.zero_()
            table[0, table.shape[1] - self.side**2 :] = _sines_and_cosines(self.side, table.shape[2])
        table.requires_grad_(False)

    # -- the network --------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, C) of unmasked images (B, 3, S, S): the mean of the encoder's output over the patches."""
        x = self.encoder.forward_features(images)
        return x[:, self.encoder.num_prefix_tokens :].mean(1)

    def random_order(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random order (B, N) of each image's patches; the first ``num_visible`` are visible, the others masked."""
        return torch.rand(len(images), self.side**2, device=images.device, generator=generator).argsort(1)

    def encode(self, images: Tensor, order: Tensor) -> Tensor:
        """Latents (B, P + n, C): P prefix tokens, then patches in ``order``: all if ``encode_masked``, else visible."""
        vit, hidden = self.encoder, order[:, self.num_visible :]
        x = vit.patch_embed(images)  # (B, N, C)
        if self.encode_masked:
            token = self.mask_token.to(x.dtype).expand(*hidden.shape, -1)
            x = x.scatter(1, hidden[..., None].expand_as(token), token)
        else:
            order = order[:, : self.num_visible]
        x = vit._pos_embed(x)  # (B, P + N, C)
        prefix, x = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
        x = torch.cat([prefix, _take(x, order)], 1)
        return vit.norm(vit.blocks(vit.norm_pre(x)))

    def decode(self, latents: Tensor, order: Tensor) -> Tensor:
        """Predicted pixels (B, N - num_visible, p * p * 3) of the masked patches, in ``order``."""
        x, prefix = self.to_decoder(latents), self.encoder.num_prefix_tokens
        if not self.encode_masked:
            hidden = order.shape[1] - self.num_visible
            x = torch.cat([x, self.to_decoder(self.mask_token).expand(len(x), hidden, -1)], 1)  # (B, P + N, D)
        x = self.decoder(x + F.pad(self.positions[order], (0, 0, prefix, 0)))
        return self.to_pixels(self.decoder_norm(x[:, prefix + self.num_visible :]))

    def targets(self, images: Tensor, order: Tensor) -> Tensor:
        """Targets of :meth:`decode`: pixels, with ``norm_pixels`` normalised by mean and deviation of their patch."""
        patches = _take(patches_of(images, self.hparams["patch_size"]), order[:, self.num_visible :])
        if self.hparams["norm_pixels"]:
            variance, mean = torch.var_mean(patches, -1, keepdim=True)
            patches = (patches - mean) / (variance + 1e-6).sqrt()
        return patches

    def per_sample_loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error over the masked patches of each image: (B,)."""
        images = self._images(batch)
        order = self.random_order(images, generator)
        pixels = self.decode(self.encode(images, order), order)
        return F.mse_loss(pixels, self.targets(images, order), reduction="none").mean((1, 2))

    def _images(self, batch: Any) -> Tensor:
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        size = self.hparams["image_size"]
        if not isinstance(images, Tensor) or images.shape[1:] != (3, size, size):
            found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise ValueError(
                f"the batch has no images (B, 3, {size}, {size}) in front but {found}; give (images, labels) of "
                f"image_size={size}"
            )
        return images

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean of the per-sample losses."""
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss

    def evaluation_step(self, batch: Any, batch_idx: int, split: str) -> None:
        """Loss over the whole split, with the same masks each time."""
        place = batch_idx * self.trainer.world_size + self.global_rank
        losses = self.per_sample_loss(batch, torch.Generator(self.device).manual_seed(place))
        self.val_loss.update(losses)
        self.log(f"{split}/loss", self.val_loss, prog_bar=True, batch_size=len(losses))

    def get_extra_state(self) -> Tensor:
        """The value of ``encode_masked``: weights trained with one value do not reconstruct pixels with the other."""
        return torch.tensor(self.encode_masked)

    def set_extra_state(self, state: Tensor) -> None:
        """Set ``encode_masked`` as in the checkpoint."""
        self.encode_masked = bool(state)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of ``x`` (B, N, C) at indices ``order`` (B, n): (B, n, C)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def _vision_transformer(architecture: str, sizes: dict[str, Any]) -> Any:
    """Build the network; ``sizes`` has timm's names for the sizes."""
    import timm  # here, because it takes long to import and not every run needs it
    from timm.models import VisionTransformer

    try:
        vit = timm.create_model(architecture, pretrained=False, num_classes=0, global_pool="", **sizes)
    except (AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(f"timm cannot build architecture={architecture!r} with {sizes}: {error}") from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None or vit.dynamic_img_size:
        raise ValueError(
            f"architecture={architecture!r} is no plain Vision Transformer with positions for every patch; choose one "
            "such as 'vit_small_patch16_224'"
        )
    return vit


def _blocks(depth: int, width: int, num_heads: int) -> nn.Sequential:
    from timm.models.vision_transformer import Block

    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return nn.Sequential(*[Block(width, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])


def _sines_and_cosines(side: int, width: int) -> Tensor:
    """Position embeddings (N, C) of a square of patches, half of the channels for each axis (appendix A.1)."""
    from timm.layers import build_sincos2d_pos_embed

    return build_sincos2d_pos_embed([side, side], width)
