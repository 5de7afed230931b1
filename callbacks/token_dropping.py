"""Token dropping (Hou et al., ACL 2022, section 3): the middle blocks run on the tokens that are hard to predict.

    m[v]   <- beta m[v] + (1 - beta) mean loss of v in this step, for each vocabulary entry v that was predicted in it
    kept    = the tokens of a sequence with the largest m[token]; special tokens come first, padding comes last
    x[kept] <- middle blocks(x[kept]); the first half of the blocks and the last one run on all tokens

The cost of a block falls with the share of the tokens that is kept, that of its attention with the square. Evaluation
uses all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.factors.token_choice import Count, TokenChoice, check_share
from lit_scale.factors.tokens import highest
from lit_scale.wrapping import wrap

__all__ = ["TokenDropping", "running_loss"]

_UNSEEN = 10.0  # running loss of a token that has not been predicted yet (Hou et al.'s code)


def running_loss(table: Tensor, sums: Tensor, counts: Tensor, beta: float) -> Tensor:
    """Update the moving average of each token's loss; tokens that were not predicted in the step keep theirs.

    Args:
        table: Averages before the step, (V,).
        sums: Sum of the losses of each token over its occurrences in this step, (V,).
        counts: Number of these occurrences, (V,).
        beta: Weight of the past, in [0, 1).

    Returns:
        Averages after the step, (V,).

    Example:
        >>> table, sums, counts = torch.tensor([10.0, 10.0]), torch.tensor([6.0, 0.0]), torch.tensor([3.0, 0.0])
        >>> running_loss(table, sums, counts, beta=0.5)
        tensor([ 6., 10.])
    """
    return torch.where(counts > 0, beta * table + (1 - beta) * (sums / counts.clamp(min=1)).to(table.dtype), table)


class TokenDropping(TokenChoice):
    """Lets the middle blocks run only on the tokens with the largest running loss.

    Evaluation uses all tokens. Batches are dicts with ``input_ids`` (B, T) and ``labels``; labels below 0 do not count,
    and tokens whose ``attention_mask`` is 0 are dropped first. The module needs a method ``per_token_loss(batch)`` that
    returns the losses in the shape of the labels, and its ``training_step`` must call it.

    Args:
        keep: Share of the tokens that the middle blocks keep, in (0, 1]. By default 0.5 (256 of 512 in Hou et al.).
        before: Number of blocks, or fraction of all (rounded down), at the front that run on all tokens. By default
            half (Hou et al.).
        after: Number of blocks, or fraction of all, at the end that run on all tokens. By default 1 (Hou et al.).
        until: Fraction of the run from which on all tokens run through all blocks. By default 1.0: never (Hou et al.).
        beta: Weight of the past in the running loss, in [0, 1). By default 0.995 (Hou et al.'s code).
        special_ids: Token ids that are always kept; by default the ``special_ids`` of the data module.
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Raises:
        ValueError: Before the first optimizer step, if an argument is out of range, or the module or a batch lacks what
            the technique needs.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> dropping = TokenDropping(keep=0.5, special_ids=[101, 102, 103])
        >>> trainer = Trainer(max_steps=1_000, callbacks=[dropping], logger=False)
    """

    def __init__(
        self,
        keep: float = 0.5,
        *,
        before: Count = 0.5,
        after: Count = 1,
        until: float = 1.0,
        beta: float = 0.995,
        special_ids: list[int] | None = None,
        blocks: str | None = None,
    ) -> None:
        super().__init__(before=before, after=after, blocks=blocks)
        check_share(keep, until)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta={beta} is not in [0, 1)")
        self.keep, self.until, self.beta, self.special_ids = keep, until, beta, special_ids
        self._table: Tensor | None = None  # running losses (V,), once training has started
        self._loaded: Tensor | None = None  # running losses of a checkpoint, before training starts
        self._noted: int | None = None  # calls of per_token_loss in the current training step; None: do not record
        self._ended = False  # training has ended; steps are only replayed by the clock

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        names = ("keep", "before", "after", "until", "beta", "special_ids", "blocks")
        return {name: getattr(self, name) for name in names}

    # -- which tokens are kept ----------------------------------------------------------------------------------------

    def share(self, done: float) -> float:
        """``keep``, and 1.0 from ``until`` on."""
        return self.keep if done < self.until else 1.0

    def choose(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> tuple[Tensor, int]:
        """Positions (B, K) of the largest running losses, and the length T."""
        assert self._table is not None
        ids, seen = self.entry(batch, "input_ids"), batch.get("attention_mask")
        scores = (self._table + self._bonus)[ids]  # (B, T)
        if isinstance(seen, Tensor):
            scores = scores.masked_fill(seen == 0, -math.inf)
        return highest(scores, max(1, round(self.kept * ids.shape[1]))), ids.shape[1]

    # -- the running losses -------------------------------------------------------------------------------------------

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the vocabulary and its special tokens, and listen to the losses that the training step asks for."""
        sizes = [part.num_embeddings for part in pl_module.modules() if isinstance(part, nn.Embedding)]
        name = type(pl_module).__name__
        if not callable(getattr(pl_module, "per_token_loss", None)) or not sizes:
            raise ValueError(
                "TokenDropping needs a method per_token_loss(batch) that training_step calls, and an nn.Embedding of "
                f"token ids; {name} has not both; use RandomLTD, which needs neither"
            )
        data = getattr(trainer, "datamodule", None)
        special = getattr(data, "special_ids", None) if self.special_ids is None else self.special_ids
        if special is None:
            raise ValueError(
                "TokenDropping needs the ids of the special tokens, which are always kept, and the data module has no "
                "special_ids; give special_ids=[...] with those of [MASK], [CLS] and [SEP]"
            )
        if special and not 0 <= min(special) <= max(special) < max(sizes):
            raise ValueError(f"special_ids={list(special)} are not all token ids of a vocabulary of {max(sizes)}")
        self._size, self._special = max(sizes), list(special)
        self._table = self._loaded = self._noted = None
        self._ended = False

        def training_step(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._noted = None if self.kept == 1.0 else 0
            output = method(*args, **kwargs)
            if self._noted == 0:
                raise ValueError(
                    f"{name}.training_step did not call self.per_token_loss(batch), whose losses TokenDropping needs; "
                    "call it there, or use RandomLTD"
                )
            self._noted = None
            return output

        self.undo_later(wrap(pl_module, "training_step", training_step), wrap(pl_module, "per_token_loss", self._note))

    def _note(self, method: Callable[..., Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Record the token losses that the training step computes."""
        losses = method(batch, *args, **kwargs)
        if self._noted is not None:
            self._noted += 1
            labels = self.entry(batch, "labels")
            if losses.shape != labels.shape:
                raise ValueError(
                    f"per_token_loss returned {tuple(losses.shape)} for labels {tuple(labels.shape)}; return the "
                    "loss of each label, not reduced"
                )
            counted = (labels >= 0).flatten().to(self._seen.dtype)
            both = torch.stack([losses.detach().flatten().to(self._seen.dtype) * counted, counted])
            self._seen.index_add_(1, labels.clamp(min=0).flatten(), both)
        return losses

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the running losses of the checkpoint, if there is one."""
        table = torch.full((self._size,), _UNSEEN) if self._loaded is None else self._loaded
        self._table = table.to(pl_module.device)
        self._bonus = torch.zeros_like(self._table)
        self._bonus[self._special] = math.inf
        self._seen = self._table.new_zeros(2, self._size, dtype=torch.float64)  # sums, counts since the last step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Update the running losses, before a checkpoint can be saved; a replayed step does not change them."""
        if self.kept == 1.0:
            return
        if trainer.world_size > 1:
            dist.all_reduce(self._seen)
        assert self._table is not None
        table = running_loss(self._table, self._seen[0], self._seen[1], self.beta)
        self._seen.zero_()
        if not self._ended:
            self._table = table

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on steps are only replayed."""
        self._ended = True

    def state_dict(self) -> dict[str, Any]:
        """The running losses, the same on all ranks."""
        table = self._loaded if self._table is None else self._table
        return {} if table is None else {"running_loss": table.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the running losses of a checkpoint."""
        self._loaded, self._table = state_dict.get("running_loss"), None
