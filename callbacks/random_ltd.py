"""Random-LTD, random and layerwise token dropping (Yao et al. 2022, arXiv 2211.11586, section 3).

    share   = keep at first, growing in equal steps to 1 at the fraction ``until`` of the run
    kept[l] = a random subset of the positions, of that share, drawn anew for every block l, sample and step
    x[kept[l]] <- block l(x[kept[l]]) for each block but the first and the last, which run on all tokens

It needs neither labels nor token ids, so it also works for causal networks and images. Evaluation uses all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_scale.factors.token_choice import Count, TokenChoice, check_share
from lit_scale.factors.tokens import highest, random_scores
from lit_scale.seeds import derive_seed

__all__ = ["RandomLTD", "growing_share"]


def growing_share(progress: float, keep: float, until: float, stages: int) -> float:
    """Share of the tokens that is kept: from ``keep`` to 1 at ``until``, in equal steps.

    With ``until=1.0`` and ``stages=1`` it is ``keep`` to the end of the run.

    Args:
        progress: Fraction of the run that is done.
        keep: Share of the tokens that is kept at the beginning.
        until: Fraction of the run from which on all tokens are kept.
        stages: Number of equal steps in which the share grows.

    Example:
        >>> [growing_share(p, keep=0.2, until=0.5, stages=4) for p in (0.0, 0.1, 0.125, 0.49, 0.5, 1.0)]
        [0.2, 0.2, 0.4, 0.8, 1.0, 1.0]
    """
    stage = min(stages, int(progress / until * stages + 1e-9))
    return round(keep + (1.0 - keep) * stage / stages, 6)


class RandomLTD(TokenChoice):
    """Lets each middle block run on a random subset of the tokens, which grows to all of them.

    Evaluation uses all tokens. The module and its batches need nothing special. Subsets keep the order of the sequence,
    as causal networks need, and are a function of (seed, rank, batch counter, block).

    For a constant share during the whole run, as in a control that drops tokens at random, use
    ``until=1.0, stages=1``.

    Args:
        keep: Share of the tokens that a block keeps at first, in (0, 1]. By default 0.0625 (128 of 2048 tokens, in
            DeepSpeed's documentation of random-LTD).
        before: Number of blocks, or fraction of all (rounded down), at the front that run on all tokens. By default 1
            (Yao et al.).
        after: Number of blocks, or fraction of all, at the end that run on all tokens. By default 1 (Yao et al.).
        until: Fraction of the run from which on all tokens are kept. By default 0.75, which together with ``keep``
            saves a third of the computation, as Yao et al. report.
        stages: Number of equal steps in which the share grows; each is one more shape to compile. By default 8 (ours).
        prefix: Number of leading tokens that are always kept; by default the network's ``num_prefix_tokens``, or 1 if
            it has a ``cls_token``, else 0.
        seed: Seed of the subsets.
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Raises:
        ValueError: At construction, in ``setup``, or at the first batch before it is trained, if an argument is out of
            range or the inputs of the blocks are not (batch, tokens, channels).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[RandomLTD(keep=0.25)], logger=False)
    """

    block_by_block = True

    def __init__(
        self,
        keep: float = 0.0625,
        *,
        before: Count = 1,
        after: Count = 1,
        until: float = 0.75,
        stages: int = 8,
        prefix: int | None = None,
        seed: int = 0,
        blocks: str | None = None,
    ) -> None:
        super().__init__(before=before, after=after, blocks=blocks)
        check_share(keep, until)
        if stages < 1:
            raise ValueError(f"stages={stages} must be at least 1")
        if prefix is not None and prefix < 0:
            raise ValueError(f"prefix={prefix} must not be negative")
        self.keep, self.until, self.stages, self.prefix, self.seed = keep, until, stages, prefix, seed

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        names = ("keep", "before", "after", "until", "stages", "prefix", "seed", "blocks")
        return {name: getattr(self, name) for name in names}

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See how many tokens lead the sequence."""
        self._prefix = _leading_tokens(pl_module) if self.prefix is None else self.prefix

    def share(self, done: float) -> float:
        """Share of the tokens that is kept when the fraction ``done`` of the run is done."""
        return growing_share(done, self.keep, self.until, self.stages)

    def choose(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> list[Tensor]:
        """A seed for each block."""
        now = (self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx)
        seeds = [derive_seed(*now, block) & 0xFFFFFFFF for block in range(len(self.spans))]
        return [torch.full((), seed, device=pl_module.device) for seed in seeds]

    def positions(self, x: Tensor, place: int) -> Tensor | None:
        """Positions (B, K) of the leading tokens and of a random subset of the others."""
        if self.chosen is None:
            return None
        size, length = x.shape[:2]
        scores = random_scores(self.chosen[place], size, length)
        scores = torch.where(torch.arange(length, device=x.device) < self._prefix, 2**60, scores)
        return highest(scores, max(self._prefix, 1, round(self.kept * length)))


def _leading_tokens(module: nn.Module) -> int:
    """Number of class and register tokens before the patches of an image."""
    for part in module.modules():
        if isinstance(count := getattr(part, "num_prefix_tokens", None), int):
            return count
    return int(any(name.split(".")[-1] == "cls_token" for name, _ in module.named_parameters()))
