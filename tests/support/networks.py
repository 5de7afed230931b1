"""Tiny networks as LightningModules: our own, and others that know nothing of lit_scale.

`FOREIGN` names those of timm, Hugging Face and plain torch over small images or short texts, `VIEWERS` Vision
Transformers over pictures of sixteen patches, `ANY_SIZE` networks that take images of any size. All have `DEPTH` equal
blocks, random weights that their seed decides, and dropout. `OPTIMIZERS` is what they can be trained with.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lit_scale.models import BertMLM, MaskedAutoencoder
from tests.support.data import CLASSES, FULL_PATCH, FULL_SIDE, LENGTH, PATCH, PATCHES, SIDE, VOCABULARY

DEPTH = 4
WIDTH = 16

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


# ---- optimizers


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def _timm(name: str, **options: Any) -> MakeOptimizer:
    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        import timm.optim

        return getattr(timm.optim, name)(list(parameters), lr=3e-3, **options)

    return make


def _eight_bit(name: str) -> MakeOptimizer:
    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(parameters, lr=3e-3, min_8bit_size=16)  # small tensors as well

    return make


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "AdamW": adamw,
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "LAMB": _timm("Lamb"),
    "LARS": _timm("Lars", momentum=0.9),
    "Lion": _timm("Lion"),
    "Adafactor": _timm("Adafactor"),
    "Muon": _timm("Muon"),
    "Adan": _timm("Adan"),
    "8-bit AdamW": _eight_bit("AdamW8bit"),
    "paged 8-bit AdamW": _eight_bit("PagedAdamW8bit"),
    "8-bit Lion": _eight_bit("Lion8bit"),
}


def slots(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors of the parameter's shape, those of 8 bits decoded block by block."""
    found = {}
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            if value.dtype == torch.uint8:
                table, scales = (optimizer.state[parameter][name.replace("state", part)] for part in ("qmap", "absmax"))
                value = table[value.long()].flatten() * scales.repeat_interleave(256)[: value.numel()]
                value = value.view(parameter.shape)
            found[name] = value.clone()
    return found


# ---- networks that are not ours, over small images and short texts


class Foreign(LightningModule):
    """A network inside a LightningModule as users write them: `self.net`, a loss, one optimizer and a schedule."""

    blocks: str  #: dotted path of the list of blocks
    net: Any  # of another library

    def __init__(
        self, *, depth: int = DEPTH, dropout: float = 0.1, width: int = WIDTH, optimizer: MakeOptimizer = adamw
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.width = width
        self.net = self.build(depth, dropout)

    def build(self, depth: int, dropout: float) -> nn.Module:
        raise NotImplementedError

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"])

    def per_sample_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch["label"], reduction="none")  # (B,)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.per_sample_loss(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def timm_sizes(self, depth: int, dropout: float) -> dict[str, Any]:
        sizes = {"embed_dim": self.width, "depth": depth, "num_heads": 2, "num_classes": CLASSES}
        return sizes | {"proj_drop_rate": dropout}

    def hugging_face_sizes(self, depth: int, **dropout: float) -> dict[str, Any]:
        sizes = {"hidden_size": self.width, "num_hidden_layers": depth, "num_attention_heads": 2}
        return sizes | {"intermediate_size": 2 * self.width} | dropout

    def torch_encoder(self, depth: int, dropout: float) -> nn.Module:
        layer = nn.TransformerEncoderLayer(self.width, 2, 2 * self.width, dropout, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class TimmViT(Foreign):
    blocks = "net.blocks"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(SIDE, 4, drop_path_rate=dropout, **self.timm_sizes(depth, dropout))


class HFBert(Foreign):
    blocks = "net.encoder.layer"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import BertConfig, BertModel

        sizes = self.hugging_face_sizes(depth, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["input_ids"]).pooler_output[:, :CLASSES]


class HFGPT2(Foreign):
    blocks = "net.h"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=self.width,
            n_layer=depth,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
        return GPT2Model(config)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.net(batch["input_ids"]).last_hidden_state[:, :-1]
        return hidden @ self.net.wte.weight.T  # (B, T - 1, V), embeddings tied to the output

    def per_sample_loss(self, batch: dict[str, Tensor]) -> Tensor:
        losses = F.cross_entropy(self.logits(batch).mT, batch["input_ids"][:, 1:], reduction="none")
        return losses.mean(1)


class TorchEncoder(Foreign):
    blocks = "net.1.layers"

    def build(self, depth: int, dropout: float) -> nn.Module:
        encoder = self.torch_encoder(depth, dropout)
        return nn.Sequential(nn.Embedding(VOCABULARY, self.width), encoder, nn.Linear(self.width, CLASSES))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["input_ids"]).mean(1)


class _Layer(nn.Module):
    calls: Tensor

    def __init__(self, dropout: float, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))  # state that is no parameter

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x + self.dropout(self.outer(F.gelu(self.inner(self.norm(x)))))


class _Plain(nn.Module):
    def __init__(self, depth: int, dropout: float, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * SIDE * SIDE, width)
        self.layers = nn.ModuleList([_Layer(dropout, width) for _ in range(depth)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for i in range(len(self.layers)):  # by index, as some people do
            x = self.layers[i](x)
        return self.head(x)


class PlainTorch(Foreign):
    blocks = "net.layers"

    def build(self, depth: int, dropout: float) -> nn.Module:
        return _Plain(depth, dropout, self.width)


FOREIGN: dict[str, type[Foreign]] = {
    "timm_vit": TimmViT,
    "hf_bert": HFBert,
    "hf_gpt2": HFGPT2,
    "torch_encoder": TorchEncoder,
    "plain_torch": PlainTorch,
}


class Masked(Foreign):
    """Predicts hidden tokens: at the positions of a batch, or of all positions those whose label is not -100."""

    def per_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.logits(batch)  # (B, T, V)
        if "positions" in batch:
            logits = logits.gather(1, batch["positions"][..., None].expand(-1, -1, VOCABULARY))
        return F.cross_entropy(logits.mT, batch["labels"], reduction="none")

    def per_sample_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.per_token_loss(batch).sum(1) / (batch["labels"] >= 0).sum(1)


class MaskedHFBert(Masked, HFBert):
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.net(batch["input_ids"]).last_hidden_state
        return hidden @ self.net.embeddings.word_embeddings.weight.T


class MaskedTorchEncoder(Masked, TorchEncoder):
    def build(self, depth: int, dropout: float) -> nn.Module:
        encoder = self.torch_encoder(depth, dropout)
        return nn.Sequential(nn.Embedding(VOCABULARY, self.width), encoder, nn.Linear(self.width, VOCABULARY))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["input_ids"])


MASKED: dict[str, type[Masked]] = {"masked_hf_bert": MaskedHFBert, "masked_torch_encoder": MaskedTorchEncoder}


def tiny_bert(*, depth: int = DEPTH, dropout: float = 0.1, seed: int = 0, **options: Any) -> BertMLM:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"width": WIDTH, "num_heads": 2, "lr": 3e-3, "weight_decay": 0.1, "init_std": 0.1}
    return BertMLM(VOCABULARY, LENGTH, depth=depth, dropout=dropout, **(defaults | options))


@overload
def build(name: Literal["bert"], *, seed: int = 0, **options: Any) -> BertMLM: ...
@overload
def build(name: Literal["plain_torch"], *, seed: int = 0, **options: Any) -> PlainTorch: ...
@overload
def build(name: str, *, seed: int = 0, **options: Any) -> Any: ...
def build(name: str, *, seed: int = 0, **options: Any) -> Any:
    """A module by its name in FOREIGN or MASKED, or ``"bert"``; the same weights for the same seed."""
    if name == "bert":
        return tiny_bert(seed=seed, **options)
    torch.manual_seed(seed)
    return (FOREIGN | MASKED)[name](**options)


def path_of(module: nn.Module) -> str:
    """Where a module of `build` or `viewer` has its blocks."""
    return str(getattr(module, "blocks", "encoder.blocks"))


def all_blocks(module: nn.Module, path: str) -> list[nn.Module]:
    """The blocks at a path, those that do not run too, found without lit_scale."""
    return [block for block in module.get_submodule(path)._modules.values() if block is not None]


# ---- over pictures of sixteen patches


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
        return F.cross_entropy(self.logits({"image": images}), labels, reduction="none")


class Timm(Viewer):
    prefix = 3

    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(SIDE, PATCH, reg_tokens=2, **self.timm_sizes(depth, dropout))


class TimmRotary(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.eva import Eva

        return Eva(SIDE, PATCH, use_rot_pos_emb=True, **self.timm_sizes(depth, dropout))


class HFViT(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import ViTConfig, ViTModel

        sizes = self.hugging_face_sizes(depth, hidden_dropout_prob=dropout)
        return ViTModel(ViTConfig(image_size=SIDE, patch_size=PATCH, **sizes), add_pooling_layer=False)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"]).last_hidden_state.mean(1)[:, :CLASSES]


class HFClip(HFViT):
    """FLIP is CLIP on fewer patches; this is its image side."""

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        sizes = self.hugging_face_sizes(depth, attention_dropout=dropout)
        return CLIPVisionModel(CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **sizes))


class _Patches(nn.Module):
    """Patches with learnt positions, and nothing in front of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.cut(images).flatten(2).mT + self.positions


class PlainViT(Viewer):
    prefix = 0
    options = {"embedding": "net.0"}

    def build(self, depth: int, dropout: float) -> nn.Module:
        encoder = self.torch_encoder(depth, dropout)
        return nn.Sequential(_Patches(self.width), encoder, nn.Linear(self.width, CLASSES))

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


# ---- over images of any size


class AnySizeTimm(Foreign):
    blocks = "net.blocks"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(FULL_SIDE, FULL_PATCH, dynamic_img_size=True, **self.timm_sizes(depth, dropout))


class AnySizeHF(Foreign):
    blocks = "net.vit.encoder.layer"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        sizes = self.hugging_face_sizes(depth, hidden_dropout_prob=dropout)
        sizes |= {"image_size": FULL_SIDE, "patch_size": FULL_PATCH, "num_labels": CLASSES}
        return ViTForImageClassification(ViTConfig(**sizes))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"]).logits


class _ByHand(nn.Module):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, FULL_PATCH, FULL_PATCH)
        self.positions = nn.Parameter(torch.randn(1, width, FULL_SIDE // FULL_PATCH, FULL_SIDE // FULL_PATCH) * 0.1)
        self.encoder = encoder
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        positions = F.interpolate(self.positions, size=x.shape[-2:], mode="bilinear")
        return self.head(self.encoder((x + positions).flatten(2).mT).mean(1))


class AnySizeByHand(Foreign):
    blocks = "net.encoder.layers"

    def build(self, depth: int, dropout: float) -> nn.Module:
        return _ByHand(self.torch_encoder(depth, dropout), self.width)


ANY_SIZE: dict[str, type[Foreign]] = {"timm": AnySizeTimm, "hf": AnySizeHF, "by_hand": AnySizeByHand}


def image_model(name: str, *, seed: int = 0, depth: int = DEPTH, dropout: float = 0.1, **options: Any) -> Foreign:
    torch.manual_seed(seed)
    return ANY_SIZE[name](depth=depth, dropout=dropout, **options)


# ---- over whatever comes


class Reader(LightningModule):
    """Learns nothing; keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Any) -> Tensor:
        self.seen.append(batch)
        return self.weight * 0.0

    def validation_step(self, batch: Any) -> None: ...

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


# ---- over numbers


class Net(LightningModule):
    """Dropout in training; a hook that changes weights after each batch; what it drew and lost, for the record."""

    average: Tensor

    def __init__(self, after_batch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.register_buffer("average", torch.zeros(2, 8))
        self.after_batch = after_batch
        self.losses: list[float] = []
        self.validated: list[float] = []

    @property
    def last(self) -> nn.Linear:
        layer = self.body[2]
        assert isinstance(layer, nn.Linear)
        return layer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.body(batch) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.after_batch and (self.trainer.global_step % 2):
            self.average.lerp_(self.last.weight.detach(), 0.1)
            self.last.weight.data.lerp_(self.average, 0.01)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(torch.rand(()).item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)
