"""Token choice: training steps in which a span of blocks runs on part of the tokens.

    x -> blocks before -> x[kept] -> blocks of the span -> x with x[kept] replaced -> blocks after

:mod:`lit_scale.factors.tokens` lets blocks run on chosen positions. The base class here lays such spans over the blocks
that are active, and has the positions chosen from each batch before its step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_scale.factors.blocks import BlockStack, find_blocks
from lit_scale.factors.tokens import TokenSpan, late_span, mark_late, release_tokens
from lit_scale.progress import progress
from lit_scale.schedules import number_or_share
from lit_scale.technique import Technique, averages, trained_with
from lit_scale.trainers import callbacks_of
from lit_scale.wrapping import wrap

__all__ = ["Count", "TokenChoice", "check_share"]

#: A number of blocks, or a fraction of all.
Count = int | float

_EVALUATION = ("validation_step", "test_step", "predict_step")
_FORMERLY = {"masked": "MaskLater", "random": "RandomLTD"}  # what TokenDropping(drop=...) has become


class TokenChoice(Technique):
    """A technique that lets a span of blocks run on part of the tokens; the others pass these blocks by unchanged.

    A subclass says which share of the tokens a step keeps (:meth:`share`), and what it takes from a batch to choose
    them (:meth:`choose`): their positions, or whatever its own :meth:`positions` makes positions of.

    The span counts the blocks that are active. In a network too shallow for ``before`` and ``after`` no token is
    dropped until it has grown.

    Args:
        before: Blocks before the span, a number or a fraction of all (rounded down).
        after: Blocks after the span, a number or a fraction of all (rounded down, but one at least, unless it is 0).
        blocks: Dotted path of the list of blocks, needed only where it cannot be found.

    Raises:
        ValueError: At construction, if ``before`` or ``after`` is no such number; in ``setup``, if they leave no block,
            the blocks are not found, the masks of the module were trained to join late in another way, or
            ``ProgressiveStacking(freeze_old=True)`` is there too; with the first batch, if it lacks what is needed.
    """

    factor = "tokens"
    #: Whether evaluation drops the same tokens, because what is trained is another network.
    lasting: ClassVar[bool] = False
    #: Whether each block of the span keeps tokens of its own.
    block_by_block: ClassVar[bool] = False
    #: Share of the tokens that the step at work keeps, by which the clock tells its price; a word where batches decide.
    kept: Any = 1.0
    #: What :meth:`choose` made of the batch at work; None lets all tokens through.
    chosen: Any = None

    def __init__(self, *, before: Count, after: Count, blocks: str | None) -> None:
        self.before, self.after, self.blocks = number_or_share(before), number_or_share(after), blocks
        for name, count in (("before", self.before), ("after", self.after)):
            fits = count >= 0 if isinstance(count, int) else 0.0 <= count < 1.0
            if isinstance(count, bool) or not fits:
                raise ValueError(f"{name}={count!r} is neither a number of blocks nor a fraction of them in [0, 1)")
        self.spans: list[TokenSpan] = []
        self._spanned: tuple[int, ...] = ()  # active blocks that the spans were laid over
        self._stack: BlockStack

    # -- what a subclass says -----------------------------------------------------------------------------------------

    @abstractmethod
    def choose(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """The positions (B, K) of a batch that are kept, ascending, and the length T of the sequences they are of.

        Or something else, if the subclass has its own :meth:`positions`.
        """

    def share(self, done: float) -> float:
        """Share of the tokens that is kept at a step before which so much of the run is done; 1.0 drops none."""
        return 1.0

    def positions(self, x: Tensor, place: int) -> Tensor | None:
        """Positions (B, K) of a sequence (B, T, C) that a span keeps, by its place among the spans; None for all."""
        if self.chosen is None:
            return None
        kept, length = self.chosen
        if x.shape[:2] != (kept.shape[0], length):
            raise ValueError(
                f"the blocks get (batch, tokens) {tuple(x.shape[:2])}, the batch's input_ids are "
                f"{(kept.shape[0], length)}; tokens can be chosen from a batch only where they are the same"
            )
        return kept

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that cannot be trained so, and prepare to train any other."""

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lay the span over the blocks; for evaluation only if it lasts."""
        super().setup(trainer, pl_module, stage)
        self._stack = find_blocks(pl_module, self.blocks)
        self._check(trainer, span := self._range(len(self._stack)))
        if stage == "fit":
            self.attach(trainer, pl_module)
            self.undo_later(wrap(pl_module, "on_load_checkpoint", _check_former))  # Lightning asks the module first
        release_tokens(self._stack)
        self._spanned = ()
        steps = ["training_step"] if stage == "fit" else []
        if self.lasting:
            for stack in [self._stack, *(find_blocks(model, self._stack.path) for model in averages(trainer))]:
                mark_late(stack, span)
            steps += _EVALUATION
            if callable(getattr(pl_module, "per_sample_loss", None)):  # samples may be scored before they are trained
                steps.append("per_sample_loss")
        if steps:
            self._lay()
        for name in steps:
            self._wrap(trainer, pl_module, name)

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle which share of the tokens the next optimizer step keeps; where the span lasts, its batches do."""
        if not self.lasting:
            self.kept = self.share(progress(trainer))

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """The share, unless batches decide it."""
        return {} if self.lasting else {"kept": self.kept}

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a plain model behind, unless the span lasts."""
        self._forget()
        super().detach(trainer, pl_module)
        if not self.lasting and hasattr(self, "_stack"):
            release_tokens(self._stack)
            self.spans = []
            self._stack.release()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Whatever runs between two batches uses all tokens."""
        self._forget()

    # -- the spans ----------------------------------------------------------------------------------------------------

    def _range(self, total: int) -> tuple[int, int]:
        """First block of the span, and the one behind its last, in a network of so many."""
        before, after = (
            count if isinstance(count, int) else int(count * total + 1e-9) for count in (self.before, self.after)
        )
        return before, total - (max(1, after) if self.after else 0)

    def _check(self, trainer: Trainer, span: tuple[int, int]) -> None:
        name = type(self).__name__
        if span[0] >= span[1]:
            raise ValueError(
                f"before={self.before} and after={self.after} leave no block of the model's {len(self._stack)} to drop "
                "tokens in; lower one of them"
            )
        late = late_span(self._stack)
        if late is not None and (not self.lasting or late != span):
            raise ValueError(
                f"masked positions of this model pass blocks {late} by; with {name} and blocks {span} it would be "
                "another; use MaskLater as it was trained, or call lit_scale.factors.tokens.release_tokens first"
            )
        if any(getattr(other, "freeze_old", False) for other in callbacks_of(trainer, Callback)):
            raise ValueError(
                f"{name} does not go with freeze_old=True: gradients of dropped tokens would pass the frozen blocks "
                "by; use one of them"
            )

    def _lay(self) -> None:
        """Lay the spans over the blocks that are active now."""
        if (active := self._stack.active) != self._spanned:
            for span in self.spans:
                span.remove()
            self._spanned = active
            blocks = active[slice(*self._range(len(active)))]
            groups = [[block] for block in blocks] if self.block_by_block else [blocks] if blocks else []
            self.spans = [
                TokenSpan(self._stack, group, partial(self.positions, place=place))
                for place, group in enumerate(groups)
            ]

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        """Choose tokens from the batch of a step before it runs."""

        def step(method: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._lay()
            self._forget()
            if self.kept != 1.0:
                self.chosen = self.choose(trainer, pl_module, batch)
            try:
                return method(batch, *args, **kwargs)
            finally:
                if name in _EVALUATION:  # elsewhere a backward pass may follow, which may recompute blocks
                    self._forget()

        self.undo_later(wrap(pl_module, name, step))

    def _forget(self) -> None:
        """Let all tokens through until the next choice."""
        self.chosen = None
        for span in self.spans:
            span.clear()

    def entry(self, batch: Any, name: str) -> Tensor:
        """An entry of the batch that this technique needs.

        Raises:
            ValueError: The batch does not have it.
        """
        if not isinstance(batch, Mapping) or name not in batch:
            what = f"has {sorted(batch)}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
            raise ValueError(
                f"{type(self).__name__} needs batch[{name!r}], but the batch {what}; its docstring says what a batch "
                "has to hold"
            )
        entry: Tensor = batch[name]
        return entry

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """All tokens run through all blocks."""
        return bool(self.kept == 1.0)

    def plain_step_kind(self) -> dict[str, Any]:
        """The span keeps all tokens."""
        return {"kept": 1.0}

    def step_kind(self) -> dict[str, Any]:
        """Share of the tokens that the span keeps."""
        return {"kept": self.kept}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Keep the share of an earlier step; which tokens, the step itself decides."""
        self._forget()
        self.kept = kind["kept"]


def check_share(keep: float, until: float) -> None:
    """Refuse shares that are none.

    Args:
        keep: Share of the tokens that the span keeps.
        until: Share of the run after which all tokens run through all blocks.

    Raises:
        ValueError: One of them is not in (0, 1].
    """
    if not isinstance(keep, int | float) or not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep!r} is not a share of the tokens in (0, 1], such as 0.5")
    if not 0.0 < until <= 1.0:
        raise ValueError(f"until={until} is not a share of the run in (0, 1]")


def _check_former(method: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
    """Refuse to resume what was trained when these techniques were one, with an argument for the kind."""
    drop = trained_with(checkpoint).get("TokenDropping", {}).get("drop")
    if drop in _FORMERLY:
        raise ValueError(
            f"the checkpoint was trained with TokenDropping(drop={drop!r}), which is {_FORMERLY[drop]} now and cannot "
            f"resume it; start a new run with callbacks=[{_FORMERLY[drop]}(...)]"
        )
    return method(checkpoint)
