"""BERT (Devlin et al. 2019): a Transformer encoder trained to restore masked tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lit_scale.models.training import Scheduled, check_warmup
from lit_scale.nn import Embedding, Encoder, PostNorm, PreNorm, normal_init
from lit_scale.nn.embeddings import Positions

__all__ = ["BertMLM"]

_RESIDUALS = {"pre": PreNorm, "post": PostNorm}


class BertMLM(Scheduled):
    """Masked language model: embedding, encoder, and a head that is computed at the masked positions only.

    Batches are dicts of ``input_ids`` (B, T), ``positions`` (B, M), the masked positions, and ``labels`` (B, M), the
    original tokens there, as :class:`~lit_scale.datamodules.TextDataModule` makes them. M is the same for all samples,
    so every step has the same shape and cost. The output layer shares the token embedding's weights.

    Args:
        vocab_size: Number of token ids.
        max_length: Longest sequence, in tokens.
        depth: Number of encoder blocks (12 in BERT base, table 1 of the paper's section 3).
        width: Channels of the residual stream (768).
        num_heads: Attention heads (12).
        positions: ``"learned"`` as in BERT, or ``"rotary"`` (Su et al. 2021).
        norm: ``"pre"`` normalises before each sublayer, which trains stably; ``"post"`` after it, as in BERT.
        dropout: Dropout everywhere (0.1 in BERT, 0 if data is seen about once, Geiping and Goldstein 2022).
        init_std: Standard deviation of the initial weights (0.02 in BERT's code).
        optimizer: Any name that :func:`lit_scale.factors.optimizers.create_optimizer` knows.
        lr: Peak learning rate.
        weight_decay: Decay of matrices; biases, norms and other vectors have none.
        beta2: Decay rate of the second moment, for Adam-like optimizers (0.98 in RoBERTa).
        warmup: Fraction of the run over which the learning rate rises linearly, in [0, 1); a cosine decay to 0 at the
            end of the run follows.

    Raises:
        ValueError: If ``width`` is not a multiple of ``num_heads``, a size is below 1, ``warmup`` is out of range,
            ``positions`` or ``norm`` is unknown, or a sequence is longer than ``max_length``.

    Example:
        >>> model = BertMLM(vocab_size=300, max_length=64, depth=2, width=32, num_heads=4)
        >>> ids, positions = torch.randint(300, (2, 64)), torch.tensor([[1, 5], [2, 9]])
        >>> model(ids, positions).shape
        torch.Size([2, 2, 300])
    """

    def __init__(
        self,
        vocab_size: int = 258,
        max_length: int = 512,
        *,
        depth: int = 12,
        width: int = 768,
        num_heads: int = 12,
        positions: Positions = "learned",
        norm: Literal["pre", "post"] = "pre",
        dropout: float = 0.0,
        init_std: float = 0.02,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        beta2: float = 0.98,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "max_length": max_length, "width": width}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if norm not in _RESIDUALS:
            raise ValueError(f"norm={norm!r}: choose 'pre' or 'post'")
        check_warmup(warmup)
        self.save_hyperparameters()
        self.embedding = Embedding(vocab_size, width, max_length, positions=positions, dropout=dropout)
        self.encoder = Encoder(
            depth,
            width,
            num_heads,
            max_length=max_length,
            rotary=positions == "rotary",
            dropout=dropout,
            residual=_RESIDUALS[norm],
            init=lambda block, _: normal_init(block, depth, std=init_std),
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        for part in (self.embedding, self.head):
            normal_init(part, depth, std=init_std)
        if self.embedding.positions is not None:
            nn.init.normal_(self.embedding.positions, std=init_std)
        self.val_loss = MeanMetric()
        self.val_accuracy = MulticlassAccuracy(vocab_size, average="micro")
        self.val_perplexity = Perplexity()

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (B, M, V) at ``positions`` (B, M) of ``input_ids`` (B, T); (B, T, V) if ``positions`` is None."""
        x = self.encoder(self.embedding(input_ids), mask)
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))  # (B, M, C)
        return F.linear(self.head(x), self.embedding.tokens.weight, self.head_bias)

    def per_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy at each masked position, in nats: (B, M)."""
        if missing := {"input_ids", "positions", "labels"} - set(batch):
            names = ", ".join(sorted(missing))
            raise ValueError(f"the batch has no {names}; with TextDataModule set mask_rate > 0")
        labels = batch["labels"]
        logits = self(batch["input_ids"], batch["positions"])
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    def per_sample_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the masked positions of each sample, in nats: (B,)."""
        return self.per_token_loss(batch).mean(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean of the per-sample losses."""
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> None:
        """Loss (nats), masked accuracy and perplexity, accumulated over the whole split."""
        labels = batch["labels"]
        logits = self(batch["input_ids"], batch["positions"])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.val_loss.update(loss, weight=labels.numel())
        self.val_accuracy.update(logits.flatten(0, 1), labels.flatten())
        self.val_perplexity.update(logits, labels)
        self.log(f"{split}/loss", self.val_loss, prog_bar=True)
        self.log(f"{split}/accuracy", self.val_accuracy)
        self.log(f"{split}/perplexity", self.val_perplexity)
