"""Choosing tokens: which of a batch a span of blocks keeps, in the three ways of token dropping.

Each way has a class, whose methods :class:`~lit_scale.callbacks.TokenDropping` calls in the order in which they stand.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_scale.factors.blocks import BlockStack
from lit_scale.factors.tokens import TokenSpan, highest, random_scores
from lit_scale.seeds import derive_seed
from lit_scale.wrapping import wrap

__all__ = ["CHOICES", "TokenChoice", "growing_share", "running_loss"]

_UNSEEN = 10.0  # running loss of a token that has not been predicted yet (Hou et al.'s code)


class TokenChoice:
    """One way of choosing; it takes those of ``TokenDropping``'s arguments that it needs.

    Attributes:
        kept: Share of the tokens that this step keeps, by which the clock tells it; "unmasked" where the batch decides.
        chosen: For the batch at work; None lets all tokens through.
        spans: The blocks that run on what is kept.
        table: Running losses (V,), once training has started where there are any: what a checkpoint has to hold.
        loaded: Those of a checkpoint, from which training starts.
    """

    #: Share of the tokens kept, blocks before and behind the span, share of the run until all are kept.
    defaults: ClassVar[dict[str, Any]]
    #: Whether evaluation chooses too, since what is trained is another network.
    lasting: ClassVar[bool] = False

    def __init__(self) -> None:
        self.kept: Any = 1.0
        self.chosen: Any = None
        self.spans: list[TokenSpan] = []
        self.table: Tensor | None = None
        self.loaded: Tensor | None = None

    def attach(self, trainer: Trainer, module: LightningModule) -> list[Callable[[], None]]:
        """Refuse a module that cannot be trained so; return what gives its methods back."""
        return []

    def lay(self, stack: BlockStack, blocks: Sequence[int], module: nn.Module) -> None:
        """Lay the spans over these blocks."""
        self.spans = [TokenSpan(stack, blocks, self.positions)] if blocks else []

    def start(self, device: torch.device) -> None:
        """Begin to train, from what has been loaded."""

    def decide(self, done: float) -> None:
        """Settle what is kept at a step before which so much of the run is done."""

    @abstractmethod
    def choose(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Choose from a batch: positions (B, K), and the length T of the sequences that they are of."""

    def positions(self, x: Tensor) -> Tensor | None:
        """Positions (B, K) of a sequence (B, T, C) that a span keeps; None for all."""
        if self.chosen is None:
            return None
        kept, length = self.chosen
        if x.shape[:2] != (kept.shape[0], length):
            raise ValueError(
                f"the blocks get (batch, tokens) {tuple(x.shape[:2])}, the batch's input_ids are "
                f"{(kept.shape[0], length)}; tokens can be chosen from a batch only where they are the same"
            )
        return kept

    def learn(self, ranks: int, *, replayed: bool) -> None:
        """Take up what the batches of an optimizer step have shown; one that is only replayed leaves no trace."""

    def forget(self) -> None:
        """Let all tokens through until the next choice."""
        self.chosen = None
        for span in self.spans:
            span.clear()


class EasyTokens(TokenChoice):
    """Hou et al., ACL 2022, section 3: m[v] <- beta m[v] + (1 - beta) loss(v); the span keeps the largest m[token]."""

    defaults = {"keep": 0.5, "before": 0.5, "after": 1, "until": 1.0}  # 256 of 512, layers L/2 to L - 2, in the paper

    def __init__(self, *, keep: float, until: float, beta: float, special_ids: list[int] | None, **_: Any) -> None:
        super().__init__()
        self.keep, self.until, self.beta, self.special_ids = keep, until, beta, special_ids
        self._noted: int | None = None  # batches whose losses the training step at work has asked for, if they count

    def attach(self, trainer: Trainer, module: LightningModule) -> list[Callable[[], None]]:
        """Find the vocabulary and its special tokens, and listen to the losses that the training step asks for."""
        sizes = [part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)]
        name = type(module).__name__
        if not callable(getattr(module, "per_token_loss", None)) or not sizes:
            raise ValueError(
                "drop='easy' needs a method per_token_loss(batch) that training_step calls, and an nn.Embedding of "
                f"token ids; {name} has not both; use drop='random', which needs neither"
            )
        data = getattr(trainer, "datamodule", None)
        special = getattr(data, "special_ids", None) if self.special_ids is None else self.special_ids
        if special is None:
            raise ValueError(
                "drop='easy' has to know the special tokens, which are always kept, and the data does not name them; "
                "give special_ids=[...] with those of [MASK], [CLS] and [SEP]"
            )
        if special and not 0 <= min(special) <= max(special) < max(sizes):
            raise ValueError(f"special_ids={list(special)} are not all token ids of a vocabulary of {max(sizes)}")
        self._size, self._special = max(sizes), list(special)
        self.table = self.loaded = self._noted = None

        def training_step(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._noted = None if self.kept == 1.0 else 0
            output = method(*args, **kwargs)
            if self._noted == 0:
                raise ValueError(
                    f"drop='easy': {name}.training_step did not call self.per_token_loss(batch); let it do so, or use "
                    "drop='random'"
                )
            self._noted = None
            return output

        return [wrap(module, "training_step", training_step), wrap(module, "per_token_loss", self._note)]

    def _note(self, method: Callable[..., Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Note the losses of the tokens that a training step asks its module for."""
        losses = method(batch, *args, **kwargs)
        if self._noted is not None:
            self._noted += 1
            labels = _entry(batch, "labels", "easy")
            if losses.shape != labels.shape:
                raise ValueError(
                    f"per_token_loss returned {tuple(losses.shape)} for labels {tuple(labels.shape)}; return the "
                    "loss of each label, not reduced"
                )
            counted = (labels >= 0).flatten().to(self._seen.dtype)
            both = torch.stack([losses.detach().flatten().to(self._seen.dtype) * counted, counted])
            self._seen.index_add_(1, labels.clamp(min=0).flatten(), both)
        return losses

    def start(self, device: torch.device) -> None:
        self.table = (torch.full((self._size,), _UNSEEN) if self.loaded is None else self.loaded).to(device)
        self._bonus = torch.zeros_like(self.table)
        self._bonus[self._special] = math.inf
        self._seen = torch.zeros(2, self._size, dtype=torch.float64, device=device)  # sums, counts since the last step

    def decide(self, done: float) -> None:
        self.kept = self.keep if done < self.until else 1.0

    def choose(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        ids, seen = _entry(batch, "input_ids", "easy"), batch.get("attention_mask")
        assert self.table is not None
        scores = (self.table + self._bonus)[ids]  # (B, T)
        if isinstance(seen, Tensor):
            scores = scores.masked_fill(seen == 0, -math.inf)
        self.chosen = highest(scores, max(1, round(self.kept * ids.shape[1]))), ids.shape[1]

    def learn(self, ranks: int, *, replayed: bool) -> None:
        if self.kept == 1.0:
            return
        if ranks > 1:
            dist.all_reduce(self._seen)
        assert self.table is not None
        table = running_loss(self.table, self._seen[0], self._seen[1], self.beta)
        self._seen.zero_()
        if not replayed:
            self.table = table


class MaskedTokens(TokenChoice):
    """Liao et al., EMNLP 2022: masked positions skip the first blocks and join for the last ones only."""

    defaults = {"keep": None, "before": 0, "after": 0.25, "until": 1.0}  # "a few layers" gather, in the paper
    lasting = True

    def __init__(self, *, keep: float | None, until: float, **_: Any) -> None:
        if keep is not None:
            raise ValueError(f"keep={keep} with drop='masked': the batch's masked positions decide; pass keep=None")
        if until != 1.0:
            raise ValueError(f"until={until} with drop='masked': masks that join late do so in all of the run")
        super().__init__()
        self.kept = "unmasked"

    def choose(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        ids, positions = _entry(batch, "input_ids", "masked"), _entry(batch, "positions", "masked")
        scores = torch.ones_like(ids).scatter_(1, positions, 0)
        self.chosen = highest(scores, ids.shape[1] - positions.shape[1]), ids.shape[1]

    def positions(self, x: Tensor) -> Tensor | None:
        if self.chosen is None and self.kept == "unmasked":  # and not where the clock prices a step with all tokens
            raise RuntimeError(
                "the masked positions of this network join late, so it has to be told them: run it through a "
                "Trainer with callbacks=[TokenDropping('masked')], or call release_tokens to let all tokens run "
                "through all blocks from now on"
            )
        return super().positions(x)


class RandomTokens(TokenChoice):
    """Random-LTD, Yao et al. 2022: each block keeps a random subset of its own, growing to all tokens."""

    defaults = {"keep": 0.0625, "before": 1, "after": 1, "until": 0.75}  # 128 of 2048, in random-LTD's documentation

    def __init__(self, *, keep: float, until: float, stages: int, prefix: int | None, seed: int, **_: Any) -> None:
        super().__init__()
        self.keep, self.until, self.stages, self.prefix, self.seed = keep, until, stages, prefix, seed

    def lay(self, stack: BlockStack, blocks: Sequence[int], module: nn.Module) -> None:
        prefix = _leading_tokens(module) if self.prefix is None else self.prefix
        self.spans = [TokenSpan(stack, [b], partial(self._draw, i, prefix)) for i, b in enumerate(blocks)]

    def decide(self, done: float) -> None:
        self.kept = growing_share(done, self.keep, self.until, self.stages)

    def choose(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        now = (self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx)
        seeds = [derive_seed(*now, block) & 0xFFFFFFFF for block in range(len(self.spans))]
        self.chosen = [torch.full((), seed, device=module.device) for seed in seeds]

    def _draw(self, block: int, prefix: int, x: Tensor) -> Tensor | None:
        if self.chosen is None:
            return None
        size, length = x.shape[:2]
        scores = random_scores(self.chosen[block], size, length)
        scores = torch.where(torch.arange(length, device=x.device) < prefix, 2**60, scores)
        return highest(scores, max(prefix, 1, round(self.kept * length)))


CHOICES: dict[str, type[TokenChoice]] = {"easy": EasyTokens, "masked": MaskedTokens, "random": RandomTokens}


# -- the formulas -----------------------------------------------------------------------------------------------------


def running_loss(table: Tensor, sums: Tensor, counts: Tensor, beta: float) -> Tensor:
    """The moving average of each token's loss after a step: tokens that were not predicted keep theirs.

    Args:
        table: Averages before the step, (V,).
        sums: Sum of the losses of each token in this step, over all its occurrences, (V,).
        counts: Number of the occurrences, (V,).
        beta: Weight of the past.

    Example:
        >>> table, sums, counts = torch.tensor([10.0, 10.0]), torch.tensor([6.0, 0.0]), torch.tensor([3.0, 0.0])
        >>> running_loss(table, sums, counts, beta=0.5)
        tensor([ 6., 10.])
    """
    return torch.where(counts > 0, beta * table + (1 - beta) * (sums / counts.clamp(min=1)).to(table.dtype), table)


def growing_share(progress: float, keep: float, until: float, stages: int) -> float:
    """Share of the tokens that random dropping keeps: linear from ``keep`` to 1 at ``until``, in equal steps.

    Example:
        >>> [growing_share(p, keep=0.2, until=0.5, stages=4) for p in (0.0, 0.1, 0.125, 0.49, 0.5, 1.0)]
        [0.2, 0.2, 0.4, 0.8, 1.0, 1.0]
    """
    stage = min(stages, int(progress / until * stages + 1e-9))
    return round(keep + (1.0 - keep) * stage / stages, 6)


# -- what is asked of batch and module --------------------------------------------------------------------------------


def _entry(batch: Any, name: str, drop: str) -> Tensor:
    """An entry of the batch that this kind of dropping needs."""
    if not isinstance(batch, Mapping) or name not in batch:
        what = f"has {sorted(batch)}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ValueError(f"drop={drop!r} needs batch[{name!r}], but the batch {what}; see TokenDropping's docstring")
    entry: Tensor = batch[name]
    return entry


def _leading_tokens(module: nn.Module) -> int:
    """How many tokens stand before the patches of an image: class and register tokens."""
    for part in module.modules():
        if isinstance(count := getattr(part, "num_prefix_tokens", None), int):
            return count
    return int(any(name.split(".")[-1] == "cls_token" for name, _ in module.named_parameters()))
