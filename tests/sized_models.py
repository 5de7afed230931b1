"""Tiny networks that take images of any size, or sequences of any length, and data for them.

`IMAGES` names the kinds: timm's ViT, Hugging Face's, and one written by hand. `SizedImages` makes images of the size
it is asked for, as `ImageDataModule` does, and `batches` is a loader of full-size ones that knows nothing of sizes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.seeds import derive_seed
from tests.foreign_models import CLASSES, DEPTH, WIDTH, Foreign

SIDE, PATCH = 16, 4


class AnySizeTimm(Foreign):
    blocks = "net.blocks"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=SIDE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=depth,
            num_heads=2,
            num_classes=CLASSES,
            proj_drop_rate=dropout,
            dynamic_img_size=True,
        )


class AnySizeHF(Foreign):
    blocks = "net.vit.encoder.layer"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            hidden_dropout_prob=dropout,
            image_size=SIDE,
            patch_size=PATCH,
            num_labels=CLASSES,
        )
        return ViTForImageClassification(config)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"]).logits


class _ByHand(nn.Module):
    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(torch.randn(1, WIDTH, SIDE // PATCH, SIDE // PATCH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        positions = F.interpolate(self.positions, size=x.shape[-2:], mode="bilinear")
        return self.head(self.encoder((x + positions).flatten(2).mT).mean(1))


class AnySizeByHand(Foreign):
    blocks = "net.encoder.layers"

    def build(self, depth: int, dropout: float) -> nn.Module:
        return _ByHand(depth, dropout)


IMAGES: dict[str, type[Foreign]] = {"timm": AnySizeTimm, "hf": AnySizeHF, "by_hand": AnySizeByHand}


def image_model(name: str, *, seed: int = 0, depth: int = DEPTH, dropout: float = 0.1, **options: Any) -> Foreign:
    torch.manual_seed(seed)
    return IMAGES[name](depth=depth, dropout=dropout, **options)


class Images(Dataset[dict[str, Tensor]]):
    """Image i is a function of i alone."""

    def __init__(self, size: int = 48) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed("image", index))
        label = torch.randint(CLASSES, (), generator=generator)
        return {"image": torch.randn(3, SIDE, SIDE, generator=generator) + label, "label": label}


class SizedImages(Images):
    """The same images in the size of the key."""

    epochwise = sized = True
    full_size = SIDE

    def __getitem__(self, key: Any) -> dict[str, Tensor]:
        _, index, size = key
        sample = super().__getitem__(index)
        if size is not None:
            options: dict[str, Any] = {"size": (size, size), "mode": "bilinear", "antialias": True}
            sample["image"] = F.interpolate(sample["image"][None], **options)[0]
        return sample


def sized_loader(batch_size: int = 4, **options: Any) -> ResumableLoader:
    return ResumableLoader(SizedImages(), batch_size, shuffle=True, drop_last=True, **options)


def full_loader(batch_size: int = 4) -> ResumableLoader:
    return ResumableLoader(Images(), batch_size, shuffle=True, drop_last=True)


def val_loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(Images(8), batch_size)
