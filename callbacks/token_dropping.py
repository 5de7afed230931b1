"""Token dropping: some blocks of the network run on some tokens only; the others pass them by unchanged.

    easy    (Hou et al., ACL 2022, section 3): m[v] <- 0.995 m[v] + 0.005 loss(v); the middle keeps the largest m[token]
    masked  (Liao et al., EMNLP 2022): masked positions skip the first blocks and join for the last ones only
    random  (random-LTD, Yao et al. 2022): each middle block keeps a random subset of its own, growing to all tokens

What a block costs falls with the tokens that it keeps, and its attention faster still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_scale.factors.blocks import BlockStack, find_blocks
from lit_scale.factors.token_choice import CHOICES, growing_share
from lit_scale.factors.tokens import late_span, mark_late, release_tokens
from lit_scale.progress import progress
from lit_scale.schedules import number_or_share
from lit_scale.technique import Technique, averages
from lit_scale.wrapping import wrap

__all__ = ["TokenDropping", "growing_share"]

Drop = Literal["easy", "masked", "random"]
Count = int | float


class TokenDropping(Technique):
    """Lets a span of blocks run on some of the tokens only.

    Evaluation uses all tokens where they are dropped as ``"easy"`` or at ``"random"``. Where the ``"masked"`` join
    late the network is another one, and they join late in evaluation too: its checkpoints are marked, so that strict
    loading refuses them without this callback, and after training it refuses to run without it
    (:func:`lit_scale.factors.tokens.release_tokens` lets all tokens through again, for text without masks).

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
        if drop not in CHOICES:
            raise ValueError(f"drop={drop!r}: choose 'easy', 'masked' or 'random'")
        given = {"keep": keep, "before": before, "after": after, "until": until}
        chosen = CHOICES[drop].defaults | {name: value for name, value in given.items() if value is not None}
        self.drop: Drop = drop
        self.keep, self.until = chosen["keep"], chosen["until"]
        self.before, self.after = number_or_share(chosen["before"]), number_or_share(chosen["after"])
        self.stages, self.beta, self.special_ids, self.prefix = stages, beta, special_ids, prefix
        self.seed, self.blocks = seed, blocks
        self._choice = CHOICES[drop](**self.settings())
        self._check_arguments()
        self._decided_at = -1
        self._spanned: tuple[int, ...] = ()  # active blocks that the spans were laid over
        self._unwrap: list[Callable[[], None]] = []  # give the module's methods back
        self._ended = False  # training has; steps are only replayed
        self._stack: BlockStack

    def _check_arguments(self) -> None:
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
        if late is not None and (not self._choice.lasting or late != span):
            raise ValueError(
                f"masked positions of this model pass blocks {late} by; with drop={self.drop!r} and blocks {span} it "
                "would be another; use TokenDropping as it was trained, or call "
                "lit_scale.factors.tokens.release_tokens first"
            )
        if any(getattr(other, "freeze_old", False) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "TokenDropping does not go with freeze_old=True: gradients of dropped tokens would pass the frozen "
                "blocks by; use one of them"
            )
        if stage == "fit":
            self._unwrap += self._choice.attach(trainer, pl_module)
        release_tokens(self._stack)
        self._spanned, self._ended = (), False
        steps = ["training_step"] if stage == "fit" else []
        if self._choice.lasting:
            for stack in [self._stack, *(find_blocks(model, self._stack.path) for model in averages(trainer))]:
                mark_late(stack, span)
            steps += ["validation_step", "test_step", "predict_step"]
            if callable(getattr(pl_module, "per_sample_loss", None)):  # samples may be scored before they are trained
                steps.append("per_sample_loss")
        if steps:
            self._lay(pl_module)
        for name in steps:
            self._wrap(trainer, pl_module, name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, now that a checkpoint has been read and the device is known."""
        self._decided_at = -1
        self._choice.start(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide, once per optimizer step, which share of the tokens is kept; of masked ones the batch decides."""
        if self._choice.lasting:
            return
        step = trainer.global_step
        if step != self._decided_at:
            self._decided_at = step
            self._choice.decide(progress(trainer))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (step + 1) % every == 0:
            pl_module.log("token_dropping/kept", self._choice.kept)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Bring what is known of the tokens up to date; before anybody saves."""
        self._choice.learn(trainer.world_size, replayed=self._ended)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Whatever runs between two batches uses all tokens."""
        self._choice.forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on steps are only replayed."""
        self._ended = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a plain model behind, but for masks that join late."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave a plain model behind, but for masks that join late."""
        self._detach()

    # -- the technique ------------------------------------------------------------------------------------------------

    def _range(self, total: int) -> tuple[int, int]:
        """First block of the span, and the one behind its last, in a network of so many."""
        before, after = (
            count if isinstance(count, int) else int(count * total + 1e-9) for count in (self.before, self.after)
        )
        return before, total - (max(1, after) if self.after else 0)

    def _lay(self, pl_module: LightningModule) -> None:
        """Lay the spans over the blocks that are active now."""
        if (active := self._stack.active) != self._spanned:
            for span in self._choice.spans:
                span.remove()
            self._spanned = active
            self._choice.lay(self._stack, active[slice(*self._range(len(active)))], pl_module)

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        """Choose tokens from the batch of a step before it runs."""

        def step(method: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._lay(pl_module)
            self._choice.forget()
            if self._choice.kept != 1.0:
                self._choice.choose(trainer, pl_module, batch)
            try:
                return method(batch, *args, **kwargs)
            finally:
                if name in ("validation_step", "test_step", "predict_step"):  # elsewhere a backward pass may follow
                    self._choice.forget()

        self._unwrap.append(wrap(pl_module, name, step))

    def _detach(self) -> None:
        self._choice.forget()
        for unwrap in self._unwrap:
            unwrap()
        self._unwrap = []
        if not self._choice.lasting and hasattr(self, "_stack"):
            release_tokens(self._stack)
            self._choice.spans = []
            self._stack.release()

    # -- state and the clock ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The running losses, the same on all ranks."""
        table = self._choice.loaded if self._choice.table is None else self._choice.table
        return {} if table is None else {"running_loss": table.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the running losses of a checkpoint."""
        self._choice.loaded, self._choice.table = state_dict.get("running_loss"), None

    def is_plain(self) -> bool:
        """All tokens run through all blocks."""
        return self._choice.kept == 1.0

    def plain_step_kind(self) -> dict[str, Any]:
        """The span keeps all tokens."""
        return {"kept": 1.0}

    def step_kind(self) -> dict[str, Any]:
        """Share of the tokens that the span keeps."""
        return {"kept": self._choice.kept}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Keep the share of an earlier step; which tokens, the step itself decides."""
        self._choice.forget()
        self._choice.kept = kind["kept"]
