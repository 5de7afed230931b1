"""Tiny LightningModules for tests: networks that know nothing of lit_scale, and our own BERT beside them.

Each network has `DEPTH` equal blocks, random weights and dropout, and trains on samples that are a function of their
index, in a ResumableLoader. `FOREIGN` names the five that are not ours.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import Dataset

from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.models import BertMLM
from lit_scale.seeds import derive_seed

DEPTH = 4
WIDTH = 16
LENGTH = 8  # tokens of a text
VOCABULARY = 24
CLASSES = 4

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


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


class _Indexed(Dataset[dict[str, Tensor]]):
    """Sample i is a function of i alone."""

    def __init__(self, make: Callable[[torch.Generator], dict[str, Tensor]], size: int) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.make(torch.Generator().manual_seed(derive_seed("sample", index)))


def _image(generator: torch.Generator) -> dict[str, Tensor]:
    label = torch.randint(CLASSES, (), generator=generator)
    return {"image": torch.randn(3, 8, 8, generator=generator) + label, "label": label}


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    start = torch.randint(VOCABULARY, (1,), generator=generator)
    ids = (start + torch.arange(LENGTH)) % VOCABULARY  # counting up, so there is something to learn
    return {"input_ids": ids, "label": ids[0] % CLASSES}


def _masked(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _text(generator)["input_ids"]
    positions = torch.randperm(LENGTH, generator=generator)[:2]
    return {"input_ids": ids.index_fill(0, positions, 0), "positions": positions, "labels": ids[positions]}


class Foreign(LightningModule):
    """A network inside a LightningModule as users write them: `self.net`, a loss, one optimizer and a schedule."""

    blocks: str  #: dotted path of the list of blocks
    make = staticmethod(_image)  #: makes a sample

    def __init__(self, *, depth: int = DEPTH, dropout: float = 0.1, optimizer: MakeOptimizer = adamw) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = self.build(depth, dropout)

    def build(self, depth: int, dropout: float) -> nn.Module:
        raise NotImplementedError

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"])

    def per_sample_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch["label"], reduction="none")  # (B,)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.per_sample_loss(batch).mean())

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TimmViT(Foreign):
    blocks = "net.blocks"

    def build(self, depth: int, dropout: float) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=8,
            patch_size=4,
            embed_dim=WIDTH,
            depth=depth,
            num_heads=2,
            num_classes=CLASSES,
            proj_drop_rate=dropout,
            drop_path_rate=dropout,
        )


class HFBert(Foreign):
    blocks = "net.encoder.layer"
    make = staticmethod(_text)

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        return BertModel(config)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["input_ids"]).pooler_output[:, :CLASSES]


class HFGPT2(Foreign):
    blocks = "net.h"
    make = staticmethod(_text)

    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=WIDTH,
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
    make = staticmethod(_text)

    def build(self, depth: int, dropout: float) -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), encoder, nn.Linear(WIDTH, CLASSES))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["input_ids"]).mean(1)


class _Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))  # state that is no parameter

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x + self.dropout(self.outer(F.gelu(self.inner(self.norm(x)))))


class _Plain(nn.Module):
    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * 8 * 8, WIDTH)
        self.layers = nn.ModuleList([_Layer(dropout) for _ in range(depth)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for i in range(len(self.layers)):  # by index, as some people do
            x = self.layers[i](x)
        return self.head(x)


class PlainTorch(Foreign):
    blocks = "net.layers"

    def build(self, depth: int, dropout: float) -> nn.Module:
        return _Plain(depth, dropout)


FOREIGN: dict[str, type[Foreign]] = {
    "timm_vit": TimmViT,
    "hf_bert": HFBert,
    "hf_gpt2": HFGPT2,
    "torch_encoder": TorchEncoder,
    "plain_torch": PlainTorch,
}


def tiny_bert(*, depth: int = DEPTH, dropout: float = 0.1, seed: int = 0, **options: Any) -> BertMLM:
    torch.manual_seed(seed)
    defaults = {"width": WIDTH, "num_heads": 2, "lr": 3e-3, "weight_decay": 0.1, "init_std": 0.1}
    return BertMLM(VOCABULARY, LENGTH, depth=depth, dropout=dropout, **(defaults | options))


def build(name: str, *, seed: int = 0, **options: Any) -> LightningModule:
    """A module by its name in FOREIGN, or ``"bert"``; the same weights for the same seed."""
    if name == "bert":
        return tiny_bert(seed=seed, **options)
    torch.manual_seed(seed)
    return FOREIGN[name](**options)


def loader(name: str, *, size: int = 32, batch_size: int = 4, shuffle: bool = True, **options: Any) -> ResumableLoader:
    """Samples that fit the module of this name."""
    make = _masked if name == "bert" else FOREIGN[name].make
    return ResumableLoader(_Indexed(make, size), batch_size, shuffle=shuffle, **options)


def quiet_trainer(root: Any, **options: Any) -> Trainer:
    """A Trainer on the CPU that logs, prints and saves nothing unless told to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(**(defaults | options))


def save_every_step(folder: Any) -> ModelCheckpoint:
    """Leaves `step=N.ckpt` in a folder after each optimizer step."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


class Recorder(Callback):
    """Notes after every batch the loss and, as (optimizer steps, blocks that run), what an observer sees."""

    def __init__(self, blocks: str) -> None:
        self.blocks = blocks
        self.losses: list[float] = []
        self.depths: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        running = sum(any(p.grad is not None for p in b.parameters()) for b in all_blocks(pl_module, self.blocks))
        self.depths.append((trainer.global_step, running))


class StepTimer(Timer):
    """A limit of 80 seconds and a clock on which a step takes 10; that of rank 1 is 15 seconds ahead."""

    def __init__(self) -> None:
        super().__init__(duration={"seconds": 80})

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.trainer = trainer

    def time_elapsed(self, *_: Any) -> float:
        return 10.0 * self.trainer.global_step + 15.0 * self.trainer.global_rank


def all_blocks(module: nn.Module, path: str) -> list[nn.Module]:
    """The blocks at a path, those that do not run too, found without lit_scale."""
    return [block for block in module.get_submodule(path)._modules.values() if block is not None]
