"""Token choice: the base class of techniques in which a span of blocks runs on part of the tokens.

    x -> blocks before -> x[kept] -> blocks of the span -> x with x[kept] replaced -> blocks after

:mod:`lit_scale.factors.tokens` makes blocks run on chosen positions. This class puts such spans on the active blocks,
and has the subclass choose positions for each batch before its step.
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
_FORMERLY = {"masked": "MaskLater", "random": "RandomLTD"}  # techniques that replace TokenDropping(drop=...)


class TokenChoice(Technique):
    """A technique that runs a span of blocks on part of the tokens; the other tokens skip these blocks unchanged.

    A subclass defines which share of the tokens a step keeps (:meth:`share`) and which ones (:meth:`choose`).

    ``before`` and ``after`` count active blocks. While a growing network is too shallow for them, no tokens are
    dropped.

    Args:
        before: Number of blocks, or fraction of all (rounded down), before the span.
        after: Number of blocks, or fraction of all (rounded down, but at least 1 unless it is 0), after the span.
        blocks: Dotted path of the list of blocks, needed only if it cannot be found.

    Raises:
        ValueError: At construction, if ``before`` or ``after`` is out of range. In ``setup``, if they leave no block
            for the span, the blocks are not found, the module was trained with :class:`MaskLater` and other settings,
            or ``ProgressiveStacking(freeze_old=True)`` is used too. At the first batch, if it lacks an entry.
    """

    factor = "tokens"
    #: Whether evaluation drops tokens too, because the network was trained to compute that function.
    lasting: ClassVar[bool] = False
    #: Whether each block of the span keeps its own choice of tokens.
    block_by_block: ClassVar[bool] = False
    #: Share of the tokens that the current step keeps, part of the step kind; a string if the batch decides it.
    kept: Any = 1.0
    #: Result of :meth:`choose` for the current batch; None keeps all tokens.
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

    # -- what a subclass overrides ------------------------------------------------------------------------------------

    @abstractmethod
    def choose(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """The positions (B, K) that are kept, ascending, and the length T of the sequences.

        A subclass that overrides :meth:`positions` may return something else.
        """

    def share(self, done: float) -> float:
        """Share of the tokens that is kept when the fraction ``done`` of the run is done; 1.0 drops none."""
        return 1.0

    def positions(self, x: Tensor, place: int) -> Tensor | None:
        """Positions (B, K) of the sequence ``x`` (B, T, C) that the span number ``place`` keeps; None for all."""
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
        """Put the span on the blocks for training, and if ``lasting`` for evaluation."""
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
            if callable(getattr(pl_module, "per_sample_loss", None)):  # another technique may score samples
                steps.append("per_sample_loss")
        if steps:
            self._lay()
        for name in steps:
            self._wrap(trainer, pl_module, name)

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide which share of the tokens the next optimizer step keeps; if ``lasting``, the batch decides it."""
        if not self.lasting:
            self.kept = self.share(progress(trainer))

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """The share that is kept, unless the batch decides it."""
        return {} if self.lasting else {"kept": self.kept}

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the plain model, unless ``lasting``."""
        self._forget()
        super().detach(trainer, pl_module)
        if not self.lasting and hasattr(self, "_stack"):
            release_tokens(self._stack)
            self.spans = []
            self._stack.release()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep all tokens between two batches."""
        self._forget()

    # -- the spans ----------------------------------------------------------------------------------------------------

    def _range(self, total: int) -> tuple[int, int]:
        """First block of the span, and the one after its last, in a network of ``total`` blocks."""
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
                f"masked positions of this model pass blocks {late} by; with {name} on blocks {span} it would compute "
                "another function; use MaskLater with the settings it was trained with, or call "
                "lit_scale.factors.tokens.release_tokens first"
            )
        if any(getattr(other, "freeze_old", False) for other in callbacks_of(trainer, Callback)):
            raise ValueError(
                f"{name} does not go with freeze_old=True: gradients of dropped tokens would bypass the frozen blocks; "
                "use one of them"
            )

    def _lay(self) -> None:
        """Put the spans on the blocks that are active now."""
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
        """Wrap a step of the module so that tokens are chosen from its batch before it runs."""

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
        """Keep all tokens until the next choice."""
        self.chosen = None
        for span in self.spans:
            span.clear()

    def entry(self, batch: Any, name: str) -> Tensor:
        """An entry of the batch.

        Raises:
            ValueError: If the batch does not have it.
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
        """Whether all tokens run through all blocks."""
        return bool(self.kept == 1.0)

    def plain_step_kind(self) -> dict[str, Any]:
        """The span keeps all tokens."""
        return {"kept": 1.0}

    def step_kind(self) -> dict[str, Any]:
        """Share of the tokens that the span keeps."""
        return {"kept": self.kept}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Keep the share of a step of this kind; the step itself chooses the tokens."""
        self._forget()
        self.kept = kind["kept"]


def check_share(keep: float, until: float) -> None:
    """Refuse shares that are not in (0, 1].

    Args:
        keep: Share of the tokens that the span keeps.
        until: Fraction of the run from which on all tokens run through all blocks.

    Raises:
        ValueError: If one of them is not in (0, 1].
    """
    if not isinstance(keep, int | float) or not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep!r} is not a share of the tokens in (0, 1], such as 0.5")
    if not 0.0 < until <= 1.0:
        raise ValueError(f"until={until} is not a share of the run in (0, 1]")


def _check_former(method: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
    """Refuse to resume a checkpoint of the earlier ``TokenDropping(drop=...)``, which comprised three techniques."""
    drop = trained_with(checkpoint).get("TokenDropping", {}).get("drop")
    if drop in _FORMERLY:
        raise ValueError(
            f"the checkpoint was trained with TokenDropping(drop={drop!r}), which is {_FORMERLY[drop]} now and cannot "
            f"resume it; start a new run with callbacks=[{_FORMERLY[drop]}(...)]"
        )
    return method(checkpoint)
