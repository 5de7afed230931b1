"""The base class of all techniques: checks at the start, one decision per optimizer step, logs, and cleanup.

A subclass sets its factor and overrides the methods it needs::

    class MyTechnique(Technique):
        factor = "samples"

        def settings(self): ...                       # constructor arguments, compared at resume
        def setup(self, trainer, pl_module, stage):   # super().setup(...) first; refuse what does not fit
        def decide(self, trainer, pl_module): ...     # once per optimizer step
        def logged(self, trainer): ...                # values to log, by name
        def step_kind(self): ...                      # what decides a step's cost; see also is_plain and the others

For every change to a model, a loader or a Trainer, register a function that reverts it with
:meth:`Technique.undo_later`. It is called at an exception and at the end of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy, XLAStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lit_scale.progress import Windows
from lit_scale.trainers import callbacks_of, writes_logs

__all__ = ["Factor", "Technique", "averages", "check_techniques", "snake_case", "techniques", "trained_with"]

Factor = Literal["steps", "samples", "tokens", "blocks", "weights", "bytes"]

_MARK = "lit_scale_techniques"
_UNTESTED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)  # Lightning derives them from tested ones


def snake_case(kind: type) -> str:
    """The name of a class in snake case, as used in flags, metrics and file names.

    Example:
        >>> class RandomLTD(Technique): ...
        >>> snake_case(Technique), snake_case(RandomLTD)
        ('technique', 'random_ltd')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__).lower()


def averages(trainer: Trainer) -> list[nn.Module]:
    """The modules in which Lightning's averaging callbacks keep averages of the weights."""
    averaging = WeightAveraging | StochasticWeightAveraging
    models = [c._average_model for c in callbacks_of(trainer, Callback) if isinstance(c, averaging)]
    return [model.module if isinstance(model, AveragedModel) else model for model in models if model is not None]


class Technique(Callback):
    """A callback that lowers one factor of a run's cost.

    Lightning calls the hooks; a subclass that overrides a hook calls ``super()`` first. ``setup`` refuses runs that the
    technique does not support. Resuming with other settings than those of the checkpoint, or without a technique that
    it was trained with, is refused too. State must consist of numbers, strings and tensors, so that checkpoints load
    with ``weights_only=True``.

    Steps of equal cost form a *step kind*: the sizes of the batch, and what each technique returns from
    :meth:`step_kind`. The clock (:class:`~lit_scale.cost.CostMeter`) keeps one price for each kind.

    Raises:
        ValueError: In ``setup``, for a strategy that is not in ``strategies``, manual optimization, the same technique
            twice, or another technique on the same factor; at resume, for settings that differ, a technique that is
            missing, or one that cannot be added to a run.

    Example:
        >>> class HalfAtFirst(Technique):
        ...     factor = "samples"
        ...     def decide(self, trainer, pl_module):
        ...         self.share = 0.5 if trainer.global_step < 100 else 1.0
        ...     def logged(self, trainer):
        ...         return {"share": self.share}
        >>> HalfAtFirst().name
        'half_at_first'
    """

    #: The factor of steps x samples x tokens x blocks x weights x bytes that the technique lowers.
    factor: ClassVar[Factor]
    #: Class names of techniques on the same factor that can be combined with this one.
    shares_with: ClassVar[frozenset[str]] = frozenset()
    #: Whether the technique can be added when a run that started without it is resumed.
    joins_late: ClassVar[bool] = True
    #: The optimizer steps at which the number of micro-batches changes; see :mod:`lit_scale.progress`.
    windows: Windows = ()
    #: Strategies that the technique is tested with; others are refused.
    strategies: ClassVar[tuple[type[Strategy], ...]] = (SingleDeviceStrategy, DDPStrategy)

    _decided_at: int = -1  # optimizer step of the latest decision
    _undo: tuple[Callable[[], None], ...] = ()

    @property
    def name(self) -> str:
        """The technique's name in flags, metrics and files, such as ``progressive_stacking``."""
        return snake_case(type(self))

    # -- what a subclass overrides ------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that must not change when a run is resumed, as plain values."""
        return {}

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide what the next optimizer step does.

        Called before the first micro-batch of each optimizer step, so never inside an accumulation window, and
        before the first micro-batch after a resume.
        """

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """Values to log, each under ``<name>/<entry>``; called only at steps whose logs are written."""
        return {}

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model and the Trainer; called at an exception and in ``teardown``, possibly twice.

        It is not called at the end of training, when the clock still replays steps. A subclass reverts changes that
        must not remain during the replay in ``on_train_end``.
        """
        self.undo()

    def on_copy(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Copy per-parameter state after another technique copied weights; pairs are (source, target)."""

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """Whether a training step in the current state computes and costs the same as without the technique."""
        return False

    def step_kind(self) -> dict[str, Any]:
        """The technique's part of the step kind: what, besides the batch, decides the cost of a step at present."""
        return {}

    def plain_step_kind(self) -> dict[str, Any] | None:
        """The :meth:`step_kind` of a plain step, which the clock times if the run makes none; None if there is none."""
        return None

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Bring the model into a state in which steps are of this kind, an earlier result of :meth:`step_kind`."""

    def skipped_flops(self) -> int:
        """FLOPs of the current training step that only kernels for sparse matrices would save."""
        return 0

    # -- what a subclass uses -----------------------------------------------------------------------------------------

    def undo_later(self, *undo: Callable[[], None]) -> None:
        """Register functions that revert changes; :meth:`undo` calls each once, the latest first."""
        self._undo = (*self._undo, *undo)

    def undo(self) -> None:
        """Call the functions that :meth:`undo_later` registered."""
        while self._undo:
            *rest, latest = self._undo
            self._undo = tuple(rest)
            latest()

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before training, runs that the technique does not support."""
        if stage != "fit":
            return
        self._decided_at = -1
        name = type(self).__name__
        if not isinstance(trainer.strategy, self.strategies) or isinstance(trainer.strategy, _UNTESTED):
            raise ValueError(
                f"{name} does not support strategy {type(trainer.strategy).__name__}; use strategy='ddp' or one device"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(f"{name} needs automatic optimization, but {type(pl_module).__name__} turned it off")
        for other in techniques(trainer):
            if other is self:
                continue
            if type(other) is type(self):
                raise ValueError(f"callbacks holds {name} twice; keep one, with the settings of the whole run")
            shared = type(other).__name__ in self.shares_with or name in other.shares_with
            if other.factor == self.factor and not shared:
                raise ValueError(
                    f"{name} and {type(other).__name__} both change the {self.factor} of a step; use one of them"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide, once per optimizer step; then log, at steps whose logs are written."""
        if trainer.global_step != self._decided_at:
            self._decided_at = trainer.global_step
            self.decide(trainer, pl_module)
        if writes_logs(trainer) and (values := self.logged(trainer)):
            pl_module.log_dict({f"{self.name}/{entry}": value for entry, value in values.items()})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach, since Lightning calls no ``teardown`` after an exception."""
        self.detach(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        self.detach(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the technique's class name and settings into the checkpoint."""
        checkpoint.setdefault(_MARK, {})[type(self).__name__] = self.settings()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other settings, or without a technique that the checkpoint was trained with."""
        check_techniques(trainer, checkpoint)


def techniques(trainer: Trainer) -> list[Technique]:
    """The techniques of a run, in the order of its callbacks."""
    return callbacks_of(trainer, Technique)


def trained_with(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The techniques that a checkpoint was trained with: settings by class name."""
    return checkpoint.get(_MARK, {})


def check_techniques(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuse to resume training without, or with other settings of, the techniques of a checkpoint.

    Raises:
        ValueError: If a technique is missing, has other settings, or cannot be added to a run that started without it.
            The message names the technique.
    """
    if trainer.state.fn != "fit":
        return
    present = {type(technique).__name__: technique for technique in techniques(trainer)}
    for name, technique in present.items():
        if not technique.joins_late and name not in trained_with(checkpoint):
            raise ValueError(
                f"the checkpoint was trained without {name}, which has to be there from the first step; leave it out, "
                "or start a new run from the checkpoint's weights"
            )
    for name, settings in trained_with(checkpoint).items():
        if name not in present:
            raise ValueError(
                f"the checkpoint was trained with {name}, which is missing from this Trainer; "
                f"add it: callbacks=[{name}({', '.join(f'{k}={v!r}' for k, v in settings.items())})]"
            )
        for key, now in present[name].settings().items():
            if settings.get(key, now) != now:
                raise ValueError(
                    f"{name}({key}={now!r}) differs from the checkpoint's {key}={settings[key]!r}; "
                    "resume with the same setting, or start a new run"
                )
