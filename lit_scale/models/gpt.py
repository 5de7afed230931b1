"""GPT-2 (Radford et al. 2019): a causal Transformer trained to predict each next token."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

from lit_scale.models.training import Scheduled, check_warmup
from lit_scale.nn import Embedding, Encoder, normal_init, residual_init
from lit_scale.nn.embeddings import Positions

__all__ = ["GPT"]


class GPT(Scheduled):
    """Causal language model: embedding, causal pre-norm encoder, and an output layer with the embedding's weights.

    Batches are dicts of ``input_ids`` (B, T), as :class:`~lit_scale.datamodules.TextDataModule` with ``mask_rate=0``
    makes them. Each token after the first is predicted from those before it, so a step runs T - 1 positions.

    Args:
        vocab_size: Number of token ids.
        max_length: Longest sequence, in tokens.
        depth: Number of blocks (12 in the smallest GPT-2, table 2 of the paper).
        width: Channels of the residual stream (768).
        num_heads: Attention heads (12).
        positions: ``"learned"`` as in GPT-2, or ``"rotary"`` (Su et al. 2021).
        dropout: Dropout everywhere (0.1 in GPT-2, 0 if data is seen about once).
        init_std: Standard deviation of the initial weights (0.02); the last linear map of each sublayer starts smaller
            by 1 / sqrt(2 depth).
        optimizer: Any name that :func:`lit_scale.factors.optimizers.create_optimizer` knows.
        lr: Peak learning rate.
        weight_decay: Decay of matrices; biases, norms and other vectors have none (0.1 in Brown et al. 2020).
        beta2: Decay rate of the second moment, for Adam-like optimizers (0.95 in Brown et al. 2020).
        warmup: Fraction of the run over which the learning rate rises linearly, in [0, 1); a cosine decay to 0 at the
            end of the run follows.

    Raises:
        ValueError: If ``width`` is not a multiple of ``num_heads``, a size is below 1, ``warmup`` is out of range,
            ``positions`` is unknown, a sequence is longer than ``max_length`` or shorter than 2 tokens, or the text of
            a batch is masked.

    Example:
        >>> import torch
        >>> model = GPT(vocab_size=300, max_length=64, depth=2, width=32, num_heads=4)
        >>> ids = torch.randint(300, (2, 64))
        >>> model(ids).shape, model.per_sample_loss({"input_ids": ids}).shape
        (torch.Size([2, 64, 300]), torch.Size([2]))
    """

    def __init__(
        self,
        vocab_size: int = 258,
        max_length: int = 1024,
        *,
        depth: int = 12,
        width: int = 768,
        num_heads: int = 12,
        positions: Positions = "learned",
        dropout: float = 0.0,
        init_std: float = 0.02,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        beta2: float = 0.95,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "max_length": max_length, "width": width}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
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
            causal=True,
            init=partial(residual_init, std=init_std),
        )
        normal_init(self.embedding, depth, std=init_std)
        if self.embedding.positions is not None:
            nn.init.normal_(self.embedding.positions, std=init_std)
        self.val_loss = MeanMetric()
        self.val_perplexity = Perplexity()

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each position of ``input_ids`` (B, T), given all tokens up to it."""
        return F.linear(self.encoder(self.embedding(input_ids), mask), self.embedding.tokens.weight)

    def _predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, T - 1, V) and their labels, the next tokens (B, T - 1)."""
        if "input_ids" not in batch:
            raise ValueError(f"the batch has no input_ids, only {', '.join(sorted(batch))}")
        if "positions" in batch:
            raise ValueError("the text of the batch is masked; with TextDataModule set mask_rate=0")
        ids = batch["input_ids"]
        if ids.shape[1] < 2:
            raise ValueError(f"a sequence of {ids.shape[1]} token has no next one to predict; give at least 2")
        return self(ids[:, :-1]), ids[:, 1:]

    def per_sample_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the predicted tokens of each sample, in nats: (B,)."""
        logits, labels = self._predict(batch)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view_as(labels).mean(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean of the per-sample losses."""
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss

    def evaluation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> None:
        """Loss (nats per token) and perplexity, accumulated over the whole split."""
        logits, labels = self._predict(batch)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.val_loss.update(loss, weight=labels.numel())
        self.val_perplexity.update(logits, labels)
        self.log(f"{split}/loss", self.val_loss, prog_bar=True)
        self.log(f"{split}/perplexity", self.val_perplexity)
