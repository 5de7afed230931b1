"""Tiny LightningModules over images for tests: our masked autoencoder, and Vision Transformers that are not ours."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.models import MaskedAutoencoder
from lit_scale.seeds import derive_seed
from tests.foreign_models import CLASSES, DEPTH, WIDTH, Foreign

SIDE, PATCH = 8, 2  # of an image and of a patch, in pixels
PATCHES = (SIDE // PATCH) ** 2


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Images whose brightness is their class; each is a function of its index."""

    def __init__(self, size: int = 32) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed("picture", index))
        label = torch.randint(CLASSES, (), generator=generator)
        return torch.randn(3, SIDE, SIDE, generator=generator) + label, label


def pictures(*, size: int = 32, batch_size: int = 4, shuffle: bool = True, **options: Any) -> ResumableLoader:
    return ResumableLoader(Pictures(size), batch_size, shuffle=shuffle, **options)


def tiny_mae(*, seed: int = 0, **options: Any) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "image_size": SIDE,
        "patch_size": PATCH,
        "depth": 2,
        "width": WIDTH,
        "num_heads": 2,
        "decoder_depth": 1,
        "decoder_width": 8,
        "decoder_heads": 2,
        "lr": 3e-3,
    }
    return MaskedAutoencoder("vit_tiny_patch16_224", **(defaults | options))


class Viewer(Foreign):
    """A Vision Transformer over pictures, with ``prefix`` tokens in front of the patches."""

    prefix = 1
    options: dict[str, Any] = {}  #: what PatchDropping has to be told

    @property
    def blocks(self) -> str:  # type: ignore[override]
        """Path of the list of blocks, which libraries call differently from version to version."""
        lists = [(path, part) for path, part in self.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
        kinds = {path: [type(block) for block in part._modules.values()] for path, part in lists}  # hidden ones too
        return next(path for path, kind in kinds.items() if len(kind) == DEPTH and len(set(kind)) == 1)

    def per_sample_loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.logits({"image": images}), labels, reduction="none")


class Timm(Viewer):
    prefix = 3

    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        sizes: dict[str, Any] = {"embed_dim": WIDTH, "depth": depth, "num_heads": 2, "num_classes": CLASSES}
        return VisionTransformer(SIDE, PATCH, reg_tokens=2, proj_drop_rate=dropout, **sizes)


class TimmRotary(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.eva import Eva

        return Eva(
            img_size=SIDE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=depth,
            num_heads=2,
            num_classes=CLASSES,
            use_rot_pos_emb=True,
            proj_drop_rate=dropout,
        )


class HFViT(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            hidden_dropout_prob=dropout,
        )
        return ViTModel(config, add_pooling_layer=False)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"]).last_hidden_state.mean(1)[:, :CLASSES]


class HFClip(HFViT):
    """FLIP is CLIP on fewer patches; this is its image side."""

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            attention_dropout=dropout,
        )
        return CLIPVisionModel(config)


class _Patches(nn.Module):
    """Patches with learnt positions, and nothing in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return self.cut(images).flatten(2).mT + self.positions


class PlainViT(Viewer):
    prefix = 0
    options = {"embedding": "net.0"}

    def build(self, depth: int, dropout: float) -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        return nn.Sequential(_Patches(), encoder, nn.Linear(WIDTH, CLASSES))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"]).mean(1)


VIEWERS: dict[str, type[Viewer]] = {
    "timm": Timm,
    "timm_rotary": TimmRotary,
    "hf_vit": HFViT,
    "hf_clip": HFClip,
    "plain": PlainViT,
}


def viewer(name: str, *, seed: int = 0, depth: int = DEPTH, dropout: float = 0.1, **options: Any) -> Viewer:
    torch.manual_seed(seed)
    return VIEWERS[name](depth=depth, dropout=dropout, **options)
