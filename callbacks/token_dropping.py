"""Token dropping: some blocks of the network run on some tokens only; the others pass them by unchanged.

    easy    (Hou et al., ACL 2022, section 3): m[v] <- 0.995 m[v] + 0.005 loss(v); the middle keeps the largest m[token]
    masked  (Liao et al., EMNLP 2022): masked positions skip the first blocks and join for the last ones only
    random  (random-LTD, Yao et al. 2022): each middle block keeps a random subset of its own, growing to all tokens

What a block costs falls with the tokens that it keeps, and its attention faster still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.blocks import BlockStack, find_blocks
from lit_scale.datamodules.loader import derive_seed
from lit_scale.running_loss import RunningLoss
from lit_scale.schedules import number_or_share
from lit_scale.technique import Technique, averages, progress
from lit_scale.tokens import (
    DrawnPositions,
    GivenPositions,
    TokenSpan,
    highest,
    late_span,
    mark_late,
    release_tokens,
)
from lit_scale.wrapping import wrap

__all__ = ["TokenDropping", "growing_share"]

Drop = Literal["easy", "masked", "random"]
Count = int | float

#: Of every kind: share of the tokens kept, blocks before and behind the span, share of the run until all are kept.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "easy": {"keep": 0.5, "before": 0.5, "after": 1, "until": 1.0},  # 256 of 512, layers L/2 to L - 2, in Hou et al.
    "masked": {"keep": None, "before": 0, "after": 0.25, "until": 1.0},  # "a few layers" gather, in Liao et al.
    "random": {"keep": 0.0625, "before": 1, "after": 1, "until": 0.75},  # 128 of 2048, in random-LTD's documentation
}


def growing_share(progress: float, keep: float, until: float, stages: int) -> float:
    """Share of the tokens that random dropping keeps: linear from ``keep`` to 1 at ``until``, in equal steps.

    Example:
        >>> [growing_share(p, keep=0.2, until=0.5, stages=4) for p in (0.0, 0.1, 0.125, 0.49, 0.5, 1.0)]
        [0.2, 0.2, 0.4, 0.8, 1.0, 1.0]
    """
    stage = min(stages, int(progress / until * stages + 1e-9))
    return round(keep + (1.0 - keep) * stage / stages, 6)


class TokenDropping(Technique):
    """Lets a span of blocks run on some of the tokens only.

    Evaluation uses all tokens where they are dropped as ``"easy"`` or at ``"random"``. Where the ``"masked"`` join
    late the network is another one, and they join late in evaluation too: its checkpoints are marked, so that strict
    loading refuses them without this callback, and after training it refuses to run without it
    (:func:`lit_scale.tokens.release_tokens` lets all tokens through again, for text without masks).

    What is needed of the module and its batches, which are dicts:

    - ``"easy"``: ``batch["input_ids"]`` (B, T), ``batch["labels"]`` and a method ``per_token_loss(batch)`` that returns
      the losses in the labels' shape, and that ``training_step`` itself calls; labels below 0 do not count. Tokens
      whose ``batch["attention_mask"]`` is 0 are dropped first.
    - ``"masked"``: ``batch["input_ids"]`` and ``batch["positions"]`` (B, M), the masked positions, equally many and
      distinct in each sample.
    - ``"random"``: nothing; it serves causal networks and images too.

    Args:
        drop: Which tokens pass the span by: those that are ``"easy"`` to predict, those that are ``"masked"``, or
            others at ``"random"`` in each block.
        keep: Share of the tokens that the span keeps, in (0, 1]; by default 0.5 for ``"easy"``, and for ``"random"``
            0.0625, from where it grows. None for ``"masked"``, where the batch decides.
        before: Blocks before the span, a number or a fraction of all (rounded down): by default half of them for
            ``"easy"``, none for ``"masked"``, one for ``"random"``.
        after: Blocks behind the span, a number or a fraction: by default one, for ``"masked"`` a quarter.
        until: Share of the run after which all tokens run through all blocks; for ``"random"``, at which they have
            grown to all (0.75). By default 1 for ``"easy"``; ``"masked"`` knows no other.
        stages: Steps in which ``"random"`` grows; each is one more shape to compile.
        beta: Weight of the past in the running loss of ``"easy"`` (0.995 in Hou et al.'s code).
        special_ids: Tokens that are always kept by ``"easy"``; by default those that the data module names.
        prefix: Leading tokens that ``"random"`` always keeps; by default as many as the network's
            ``num_prefix_tokens`` says, 1 if it has a ``cls_token``, else 0.
        seed: Of the random choices, which are a function of (seed, rank, batch counter, block).
        blocks: Dotted path of the list of blocks, needed only where it cannot be found.

    Raises:
        ValueError: At construction, in ``setup`` or with the first batch, before anything is trained.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[TokenDropping("random", keep=0.5)], logger=False)
    """

    factor = "tokens"

    def __init__(
        self,
        drop: Drop = "easy",
        *,
        keep: float | None = None,
        before: Count | None = None,
        after: Count | None = None,
        until: float | None = None,
        stages: int = 8,
        beta: float = 0.995,
        special_ids: list[int] | None = None,
        prefix: int | None = None,
        seed: int = 0,
        blocks: str | None = None,
    ) -> None:
        if drop not in _DEFAULTS:
            raise ValueError(f"drop={drop!r}: choose 'easy', 'masked' or 'random'")
        given = {"keep": keep, "before": before, "after": after, "until": until}
        chosen = {name: _DEFAULTS[drop][name] if value is None else value for name, value in given.items()}
        self.drop: Drop = drop
        self.keep, self.until = chosen["keep"], chosen["until"]
        self.before, self.after = number_or_share(chosen["before"]), number_or_share(chosen["after"])
        self.stages, self.beta, self.special_ids, self.prefix = stages, beta, special_ids, prefix
        self.seed, self.blocks = seed, blocks
        self._check_arguments()
        self._share = 1.0  # of the tokens, at this step; masked positions are not counted by it
        self._decided_at = -1
        self._given = GivenPositions(required=drop == "masked")
        self._drawn: list[DrawnPositions] = []
        self._spans: list[TokenSpan] = []
        self._spanned: tuple[int, ...] = ()  # active blocks that the spans were laid over
        self._unwrap: list[Callable[[], None]] = []  # give the module's methods back
        self._losses: RunningLoss | None = None
        self._table: Tensor | None = None  # (V,) running losses of a checkpoint
        self._recording = False  # a training step is at work whose losses count
        self._asked = False  # it has asked for the losses of its tokens
        self._ended = False  # training has; steps are only replayed
        self._stack: BlockStack

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        if self.drop == "masked" and self.keep is not None:
            raise ValueError(
                f"keep={self.keep} with drop='masked': the batch's masked positions decide; pass keep=None"
            )
        if self.drop == "masked" and self.until != 1.0:
            raise ValueError(f"until={self.until} with drop='masked': masks that join late do so in all of the run")
        if self.keep is not None and not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep} is not a share of the tokens in (0, 1], such as 0.5")
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"until={self.until} is not a share of the run in (0, 1]")
        for name, count in (("before", self.before), ("after", self.after)):
            fits = count >= 0 if isinstance(count, int) else 0.0 <= count < 1.0
            if isinstance(count, bool) or not fits:
                raise ValueError(f"{name}={count!r} is neither a number of blocks nor a fraction of them in [0, 1)")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} must be at least 1")
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta={self.beta} is not in [0, 1)")
        if self.prefix is not None and self.prefix < 0:
            raise ValueError(f"prefix={self.prefix} must not be negative")

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        names = "drop keep before after until stages beta special_ids prefix seed blocks"
        return {name: getattr(self, name) for name in names.split()}

    def _range(self, total: int) -> tuple[int, int]:
        """First block of the span, and the one behind its last, in a network of so many."""
        before, after = (
            count if isinstance(count, int) else int(count * total + 1e-9) for count in (self.before, self.after)
        )
        return before, total - (max(1, after) if self.after else 0)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lay the span over the blocks; for evaluation only where masks join late."""
        super().setup(trainer, pl_module, stage)
        self._stack = find_blocks(pl_module, self.blocks)
        span = self._range(len(self._stack))
        if span[0] >= span[1]:
            raise ValueError(
                f"before={self.before} and after={self.after} leave no block of the model's {len(self._stack)} to drop "
                "tokens in; lower one of them"
            )
        late = late_span(self._stack)
        if late is not None and (self.drop != "masked" or late != span):
            raise ValueError(
                f"masked positions of this model pass blocks {late} by; with drop={self.drop!r} and blocks {span} it "
                "would be another; use TokenDropping as it was trained, or call lit_scale.tokens.release_tokens first"
            )
        if any(getattr(other, "freeze_old", False) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "TokenDropping does not go with freeze_old=True: gradients of dropped tokens would pass the frozen "
                "blocks by; use one of them"
            )
        if self.drop == "easy" and stage == "fit":
            self._check_module(trainer, pl_module)
        release_tokens(self._stack)
        self._spanned, self._ended = (), False
        if self.drop == "masked":
            for stack in [self._stack, *(find_blocks(model, self._stack.path) for model in averages(trainer))]:
                mark_late(stack, span)
            for name in ("validation_step", "test_step", "predict_step"):
                self._wrap(trainer, pl_module, name)
            if callable(getattr(pl_module, "per_sample_loss", None)):  # samples may be scored before they are trained
                self._wrap(trainer, pl_module, "per_sample_loss")
        if self.drop == "masked" or stage == "fit":
            self._lay(pl_module)
        if stage == "fit":
            self._table = self._losses = None
            self._wrap(trainer, pl_module, "training_step")
        if self.drop == "easy" and stage == "fit":
            self._wrap_losses(pl_module)

    def _check_module(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What dropping easy tokens needs of the module, and the tokens that are never dropped."""
        sizes = [part.num_embeddings for part in pl_module.modules() if isinstance(part, nn.Embedding)]
        if not callable(getattr(pl_module, "per_token_loss", None)) or not sizes:
            raise ValueError(
                "drop='easy' needs a method per_token_loss(batch) that training_step calls, and an nn.Embedding of "
                f"token ids; {type(pl_module).__name__} has not both; use drop='random', which needs neither"
            )
        self._size = max(sizes)
        data = getattr(trainer, "datamodule", None)
        special = getattr(data, "special_ids", None) if self.special_ids is None else self.special_ids
        if special is None:
            raise ValueError(
                "drop='easy' has to know the special tokens, which are always kept, and the data does not name them; "
                "give special_ids=[...] with those of [MASK], [CLS] and [SEP]"
            )
        if special and not 0 <= min(special) <= max(special) < self._size:
            raise ValueError(f"special_ids={list(special)} are not all token ids of a vocabulary of {self._size}")
        self._special = list(special)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the running losses, now that a checkpoint has been read and the device is known."""
        self._decided_at = -1
        if self.drop == "easy":
            self._losses = RunningLoss(self._size, self._special, self.beta, pl_module.device, self._table)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide, once per optimizer step, which share of the tokens is kept."""
        step = trainer.global_step
        if step != self._decided_at and self.drop != "masked":
            self._decided_at, done = step, progress(trainer)
            assert self.keep is not None
            if self.drop == "random":
                self._share = growing_share(done, self.keep, self.until, self.stages)
            else:
                self._share = self.keep if done < self.until else 1.0
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (step + 1) % every == 0 and self.drop != "masked":
            pl_module.log("token_dropping/kept", self._share)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Bring the running losses up to date with those of all ranks; before anybody saves."""
        if self._losses is None or self._share == 1.0:
            return
        table = self._losses.updated(trainer.world_size)
        if not self._ended:  # a step that is only replayed, to be timed, costs as much and leaves no trace
            self._losses.table = table

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Whatever runs between two batches uses all tokens."""
        self._forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on steps are only replayed."""
        self._ended = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a plain model behind, but for masks that join late."""
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave a plain model behind, but for masks that join late."""
        self._detach(pl_module)

    # -- the technique ------------------------------------------------------------------------------------------------

    def _lay(self, pl_module: LightningModule) -> None:
        """Lay the spans over the blocks that are active now."""
        active = self._stack.active
        if active == self._spanned:
            return
        for span in self._spans:
            span.remove()
        self._spans, self._drawn, self._spanned = [], [], active
        middle = active[slice(*self._range(len(active)))]
        if self.drop == "random":
            prefix = leading_tokens(pl_module) if self.prefix is None else self.prefix
            self._drawn = [DrawnPositions(prefix) for _ in middle]
            self._spans = [TokenSpan(self._stack, [b], drawn) for b, drawn in zip(middle, self._drawn, strict=True)]
        elif middle:
            self._spans = [TokenSpan(self._stack, middle, self._given)]

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        """Choose tokens from the batch of a step before it runs."""
        training, evaluation = name == "training_step", name.endswith("_step") and name != "training_step"

        def step(method: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._lay(pl_module)
            self._choose(trainer, pl_module, batch)
            if training:
                self._asked, self._recording = False, self.drop == "easy" and self._share < 1.0
            try:
                output = method(batch, *args, **kwargs)
            finally:
                if evaluation:  # otherwise a backward pass follows, which may run the blocks again
                    self._forget()
            if self._recording and training and not self._asked:
                raise ValueError(
                    f"drop='easy': {type(pl_module).__name__}.training_step did not call self.per_token_loss(batch); "
                    "let it do so, or use drop='random'"
                )
            if training:
                self._recording = False
            return output

        self._unwrap.append(wrap(pl_module, name, step))

    def _wrap_losses(self, pl_module: LightningModule) -> None:
        """Note the losses of the tokens that the training step asks its module for."""

        def per_token_loss(method: Callable[..., Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
            losses = method(batch, *args, **kwargs)
            if self._recording and self._losses is not None:
                self._asked, labels = True, _entry(batch, "labels", self.drop)
                if losses.shape != labels.shape:
                    raise ValueError(
                        f"per_token_loss returned {tuple(losses.shape)} for labels {tuple(labels.shape)}; return the "
                        "loss of each label, not reduced"
                    )
                self._losses.note(labels, losses)
            return losses

        self._unwrap.append(wrap(pl_module, "per_token_loss", per_token_loss))

    def _choose(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Choose the positions of this batch; those at random are drawn by the blocks from a seed of each."""
        self._forget()
        if self.drop == "masked":
            if not self._given.required:  # the clock prices a step in which nothing is dropped
                return
            ids, positions = _entry(batch, "input_ids", self.drop), _entry(batch, "positions", self.drop)
            scores = torch.ones_like(ids).scatter_(1, positions, 0)
            self._given.set(highest(scores, ids.shape[1] - positions.shape[1]), ids.shape[1])
        elif self._share == 1.0:
            return
        elif self.drop == "easy":
            assert self._losses is not None
            ids, seen = _entry(batch, "input_ids", self.drop), batch.get("attention_mask")
            scores = self._losses.scores(ids, seen if isinstance(seen, Tensor) else None)
            self._given.set(highest(scores, max(1, round(self._share * ids.shape[1]))), ids.shape[1])
        else:
            counter, device = trainer.fit_loop.total_batch_idx, pl_module.device
            for block, drawn in enumerate(self._drawn):
                seed = derive_seed(self.seed, trainer.global_rank, counter, block) & 0xFFFFFFFF
                drawn.share, drawn.seed = self._share, torch.full((), seed, device=device)

    def _forget(self) -> None:
        self._given.kept = None
        for drawn in self._drawn:
            drawn.seed = None
        for span in self._spans:
            span.clear()

    def _detach(self, pl_module: LightningModule) -> None:
        self._forget()
        for unwrap in self._unwrap:
            unwrap()
        self._unwrap = []
        if self.drop != "masked" and hasattr(self, "_stack"):
            release_tokens(self._stack)
            self._spans, self._drawn = [], []
            self._stack.release()

    # -- state and the clock ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The running losses, the same on all ranks."""
        table = self._table if self._losses is None else self._losses.table
        return {} if table is None else {"running_loss": table.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the running losses of a checkpoint."""
        self._table = state_dict.get("running_loss")

    def is_plain(self) -> bool:
        """All tokens run through all blocks."""
        return self._share == 1.0 and self.drop != "masked"

    def plain_shape(self) -> dict[str, Any]:
        """The span keeps all tokens."""
        return {"kept": 1.0}

    def step_shape(self) -> dict[str, Any]:
        """Share of the tokens that the span keeps."""
        return {"kept": "unmasked" if self._given.required else self._share}

    def impose_shape(self, trainer: Trainer, pl_module: LightningModule, shape: dict[str, Any]) -> None:
        """Keep the share of an earlier step; which tokens, the step itself decides."""
        self._forget()
        if self.drop == "masked":
            self._given.required = shape["kept"] == "unmasked"
        else:
            self._share = shape["kept"]


def leading_tokens(module: nn.Module) -> int:
    """How many tokens stand before the patches of an image: class and register tokens."""
    for part in module.modules():
        if isinstance(count := getattr(part, "num_prefix_tokens", None), int):
            return count
    return int(any(name.split(".")[-1] == "cls_token" for name, _ in module.named_parameters()))


def _entry(batch: Any, name: str, drop: Drop) -> Tensor:
    """An entry of the batch that this kind of dropping needs."""
    if not isinstance(batch, Mapping) or name not in batch:
        what = f"has {sorted(batch)}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ValueError(f"drop={drop!r} needs batch[{name!r}], but the batch {what}; see TokenDropping's docstring")
    entry: Tensor = batch[name]
    return entry
