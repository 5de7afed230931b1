"""Large batches with LAMB (You et al., ICLR 2020, algorithm 2): fewer and larger steps, with layer-wise learning rates.

    w <- w - rate |w| / |r + decay w| (r + decay w),  where r is Adam's update of the layer

With the default, the same number of samples takes 1/16 of the optimizer steps, so 16 times as many devices can share a
step. On one device, which accumulates micro-batches, only the optimizer's own work is saved.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_scale.factors.optimizers import replace_optimizers, run_schedulers, scale_rates
from lit_scale.factors.steps import accumulate, check_epoch, restore_accumulation
from lit_scale.schedules import RateScaling, rate_factor
from lit_scale.technique import Technique, techniques

__all__ = ["LargeBatch"]


class LargeBatch(Technique):
    """Multiplies the batch by accumulation, scales the learning rate, and replaces the optimizer by LAMB.

    A run limited by epochs then sees the same data in fewer optimizer steps; a run limited by ``max_steps`` sees more
    data in the same number of steps. LAMB takes over the parameter groups of the module's optimizer. Groups without
    weight decay are not adapted layer-wise, so put biases and norms into such a group, as
    :func:`lit_scale.factors.optimizers.create_optimizer` does.

    Args:
        times: Factor on the Trainer's own ``accumulate_grad_batches``.
        optimizer: ``"lamb"``, ``"lars"``, or ``"own"`` to keep the module's optimizer.
        lr: Peak learning rate. It replaces the ``max_lr`` of a schedule that has one, otherwise the optimizer's rate;
            None scales the module's rate instead. A rate of LAMB is the relative change of a matrix per step: about
            0.01 to 0.05, or AdamW's rate divided by the standard deviation of the weights.
        scaling: How the module's rate is scaled if ``lr`` is None: ``"sqrt"`` (You et al.), ``"linear"`` or ``"none"``.

    Raises:
        ValueError: At construction; or before the first step, if an epoch ends inside an optimizer step, or if LAMB or
            LARS is to replace an optimizer without weight decay or one that ``EightBitOptimizer`` has already replaced.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=3, callbacks=[LargeBatch(16, lr=0.02)], accelerator="cpu", logger=False)
    """

    factor = "steps"
    joins_late = False
    shares_with = frozenset({"BatchRamp"})

    def __init__(
        self,
        times: int = 16,
        *,
        optimizer: Literal["lamb", "lars", "own"] = "lamb",
        lr: float | None = None,
        scaling: RateScaling = "sqrt",
    ) -> None:
        if times < 1:
            raise ValueError(f"times={times} must be at least 1")
        if optimizer not in ("lamb", "lars", "own"):
            raise ValueError(f"optimizer={optimizer!r}: choose 'lamb', 'lars' or 'own'")
        if lr is not None and not lr > 0:
            raise ValueError(f"lr={lr} must be above 0, or None")
        self._factor = rate_factor(times, scaling)
        self.times, self.optimizer, self.lr, self.scaling = times, optimizer, lr, scaling

    def settings(self) -> dict[str, Any]:
        """The arguments."""
        return {"times": self.times, "optimizer": self.optimizer, "lr": self.lr, "scaling": self.scaling}

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the accumulation, before a scheduler asks for the number of steps."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            restore_accumulation(trainer)  # in case an earlier fit ended with an exception
            accumulate(trainer, trainer.accumulate_grad_batches * self.times)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the module's optimizers, and scale their learning rates."""
        if self.optimizer != "own":
            replace_optimizers(trainer, self._replacement)
        for optimizer in trainer.optimizers:
            factor = self._factor if self.lr is None else self.lr / _peak(trainer, optimizer)
            self.undo_later(scale_rates(optimizer, partial(float, factor)))

    def _replacement(self, optimizer: Optimizer) -> Optimizer:
        if type(optimizer).__name__.endswith("8bit"):
            raise ValueError(
                "callbacks: put LargeBatch in front of EightBitOptimizer, whose optimizer it would replace"
            )
        if not any(group.get("weight_decay") for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer={self.optimizer!r} adapts the parameters that decay, and the module's optimizer has none; "
                "give its matrices a weight decay, however small"
            )
        from timm.optim import Lamb, Lars

        keys = {"lr", "weight_decay"} | ({"betas"} if self.optimizer == "lamb" else set())
        groups = [
            {key: value for key, value in group.items() if key in keys or key not in optimizer.defaults}
            for group in optimizer.param_groups
        ]
        return Lamb(groups) if self.optimizer == "lamb" else Lars(groups, momentum=0.9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an epoch that ends inside an optimizer step."""
        if not any(other.windows for other in techniques(trainer)):
            check_epoch(trainer, [(0, trainer.accumulate_grad_batches)])

    def detach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the optimizers' learning rates and the Trainer's accumulation."""
        super().detach(trainer, pl_module)
        restore_accumulation(trainer)

    # -- the clock ----------------------------------------------------------------------------------------------------

    def step_kind(self) -> dict[str, Any]:
        """Factor on the batch size."""
        return {"batch_times": self.times}


def _peak(trainer: Trainer, optimizer: Optimizer) -> float:
    """The largest rate of the module's schedule, which has already scaled ``lr`` and stored the peak in the groups."""
    rates = [group.get("max_lr", group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for scheduler in run_schedulers(trainer):
        if scheduler.optimizer is optimizer:
            rates += getattr(scheduler, "max_lrs", [])  # CyclicLR stores it in the scheduler
    return max(rates)
