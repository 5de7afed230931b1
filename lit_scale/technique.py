"""What every technique stands on: the checks at its start, and its mark in the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy, XLAStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lit_scale.progress import Windows

__all__ = ["Factor", "Technique", "averages", "check_techniques", "snake_case", "trained_with"]

Factor = Literal["steps", "samples", "tokens", "blocks", "weights", "bytes"]

_MARK = "lit_scale_techniques"
_UNTESTED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)  # Lightning derives them from tested ones


def snake_case(kind: type) -> str:
    """A class's name as flags, metrics and files have it.

    Example:
        >>> snake_case(Technique)
        'technique'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def averages(trainer: Trainer) -> list[nn.Module]:
    """The averages of the module's weights that Lightning's callbacks keep, each a module like it."""
    averaging = WeightAveraging | StochasticWeightAveraging
    models = [c._average_model for c in trainer.callbacks if isinstance(c, averaging)]  # type: ignore[attr-defined]
    return [model.module if isinstance(model, AveragedModel) else model for model in models if model is not None]


class Technique(Callback):
    """A callback that lowers one factor of a run's cost.

    A subclass names the factor, acts through Lightning's hooks, keeps its state in numbers, strings and tensors, and
    returns its settings from :meth:`settings`. At the start this class refuses what the technique cannot work with;
    at resume it refuses other settings than those of the checkpoint, or a technique that was left out.
    """

    #: The factor of steps x samples x tokens x blocks x weights x bytes that the technique lowers.
    factor: ClassVar[Factor]
    #: Names of techniques on the same factor that this one can share it with.
    shares_with: ClassVar[frozenset[str]] = frozenset()
    #: Whether it can be added to a run that was begun without it.
    joins_late: ClassVar[bool] = True
    #: Where the micro-batches of an optimizer step change over the run; see :mod:`lit_scale.progress`.
    windows: Windows = ()
    #: Strategies it is tested with, and what to write instead of others.
    strategies: ClassVar[tuple[type[Strategy], ...]] = (SingleDeviceStrategy, DDPStrategy)

    @property
    def name(self) -> str:
        """What flags, metrics and files call the technique: ``progressive_stacking``."""
        return snake_case(type(self))

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that must not change when a run is resumed, as plain values."""
        return {}

    def is_plain(self) -> bool:
        """Whether a training step now is exactly the one that a run without the technique makes, at the same price."""
        return False

    def plain_step_kind(self) -> dict[str, Any] | None:
        """The :meth:`step_kind` of a plain step, for the clock to price where a run makes none; None: it cannot."""
        return None

    def step_kind(self) -> dict[str, Any]:
        """What, beside the batch, decides the cost of a training step now; the clock keeps one price for each kind."""
        return {}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Bring the model into the state that ``kind`` (an earlier :meth:`step_kind`) was told in."""

    def skipped_flops(self) -> int:
        """FLOPs of the training step at work that only a kernel for sparse matrices would leave out."""
        return 0

    def on_copy(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Let what this technique keeps per parameter follow another one's copies, as (source, target)."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what the technique cannot work with."""
        if stage != "fit":
            return
        name = type(self).__name__
        if not isinstance(trainer.strategy, self.strategies) or isinstance(trainer.strategy, _UNTESTED):
            raise ValueError(
                f"{name} does not support strategy {type(trainer.strategy).__name__}; use strategy='ddp' or one device"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(f"{name} needs automatic optimization, but {type(pl_module).__name__} turned it off")
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(other, Technique) or other is self:
                continue
            if type(other) is type(self):
                raise ValueError(f"callbacks holds {name} twice; give one of them all the stages")
            shared = type(other).__name__ in self.shares_with or name in other.shares_with
            if other.factor == self.factor and not shared:
                raise ValueError(
                    f"{name} and {type(other).__name__} both change the {self.factor} of a step; use one of them"
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the technique's name and settings in the checkpoint."""
        checkpoint.setdefault(_MARK, {})[type(self).__name__] = self.settings()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other settings or without a technique that the checkpoint was trained with."""
        check_techniques(trainer, checkpoint)


def trained_with(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The techniques that a checkpoint was trained with: class names, and their settings."""
    return checkpoint.get(_MARK, {})


def check_techniques(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuse to resume training without, or with other settings of, the techniques of a checkpoint.

    Raises:
        ValueError: Naming the technique and the setting, or one that cannot join a run which was begun without it.
    """
    if trainer.state.fn != "fit":
        return
    present = {type(t).__name__: t for t in trainer.callbacks if isinstance(t, Technique)}  # type: ignore[attr-defined]
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
