"""Gradient noise scale (McCandlish et al. 2018, appendix A.1): estimates the critical batch size.

    E|g_B|^2 = |G|^2 + S / B;  norms at two batch sizes give |G|^2 and S, and B_crit = S / |G|^2

A batch larger than B_crit saves few steps. Gradients of small batches exist anyway, in micro-batches and on ranks, so
the estimate costs two gradient norms per step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_scale.batches import count_samples
from lit_scale.factors.samples import SampleChoice
from lit_scale.progress import windows_of
from lit_scale.technique import techniques
from lit_scale.trainers import writes_logs

__all__ = ["GradientNoiseScale", "signal_and_noise"]


def signal_and_noise(small: Tensor, large: Tensor, small_batch: int, large_batch: int) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of |G|^2 and of S = tr(Sigma), from gradients at two batch sizes.

    Args:
        small: Squared norm of the mean gradient over ``small_batch`` samples.
        large: Squared norm of the mean gradient over ``large_batch`` samples.
        small_batch: Samples of the small batch.
        large_batch: Samples of the large batch.

    Returns:
        |G|^2 and S; single estimates may be negative.

    Example:
        >>> signal_and_noise(torch.tensor(3.0), torch.tensor(2.0), 1, 2)  # |G|^2 = 1 and S = 2: 1 + 2 / 1, 1 + 2 / 2
        (tensor(1.), tensor(2.))
    """
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    noise = (small - large) / (1 / small_batch - 1 / large_batch)
    return signal, noise


class GradientNoiseScale(Callback):
    """Estimates the critical batch size during training, and prints at the end whether a larger batch would pay.

    The small batch is the first micro-batch of an optimizer step on each rank, the large batch is the whole step. The
    estimate from one step is too noisy (|G|^2 may even be negative), so |G|^2 and S are smoothed before their ratio is
    taken. Metrics are ``gradient_noise_scale/critical_batch``, ``.../signal`` and ``.../noise``. The callback does not
    change the run. On one device it needs ``accumulate_grad_batches`` of at least 2.

    With a technique that chooses samples, only the samples that are trained count. While :class:`ImportanceSampling`
    weighs losses, the estimate is that of the weighted gradients, whose noise also falls as S / B, with a smaller S.
    Steps whose micro-batches differ in the number of samples or in weighting are left out. The estimate is for plain
    gradients; the updates of Adam or LAMB have another noise scale, so take it as an order of magnitude.

    Args:
        smoothing: Weight of the past in the moving averages, in [0, 1). The default, 0.99, averages about 100 steps
            (ours).

    Raises:
        ValueError: ``smoothing`` is not in [0, 1).

    Example:
        >>> noise = GradientNoiseScale()
        >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=[noise], accelerator="cpu", logger=False)
        >>> noise.verdict(batch=64)
        'gradient noise scale: nothing is known yet; train longer, with at least 2 micro-batches or ranks a step'
    """

    def __init__(self, smoothing: float = 0.99) -> None:
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing={smoothing} is not in [0, 1)")
        self.smoothing = smoothing
        self.signal = self.noise = torch.zeros(())  # |G|^2 and S, moving sums; divide by _weight for the averages
        self._weight = 0.0
        self._batch = 0  # samples of the latest step
        self._hooks: list[Any] = []
        self._seen: Tensor | None = None  # squared norm of the first micro-batch's gradient, summed over parameters
        self._micro_batches: list[tuple[int, bool]] = []  # of the step: samples trained, whether losses were weighted
        self._brought = 0  # samples of the current batch
        self._watching = False

    def state_dict(self) -> dict[str, Any]:
        """The moving averages."""
        averages = {"signal": self.signal.cpu(), "noise": self.noise.cpu(), "weight": self._weight}
        return averages | {"batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moving averages."""
        self.signal, self.noise = state_dict["signal"], state_dict["noise"]
        self._weight, self._batch = state_dict["weight"], state_dict["batch"]

    @property
    def critical_batch(self) -> float:
        """S / |G|^2 in samples; NaN unless both estimates are positive."""
        signal, noise = float(self.signal), float(self.noise)
        return noise / signal if signal > 0 and noise > 0 else float("nan")

    def verdict(self, batch: int) -> str:
        """Whether a batch larger than ``batch`` samples pays, in one line.

        The steps to a loss are proportional to 1 + B_crit / B, the samples to 1 + B / B_crit (McCandlish et al. 2018,
        section 2).
        """
        critical = self.critical_batch
        if not critical > 0:
            return (
                "gradient noise scale: nothing is known yet; train longer, with at least 2 micro-batches or ranks a "
                "step"
            )
        steps = 1 - (1 + critical / (2 * batch)) / (1 + critical / batch)
        samples = (1 + 2 * batch / critical) / (1 + batch / critical) - 1
        pays = "a larger batch still pays" if batch < critical else "a larger batch hardly pays"
        return (
            f"gradient noise scale: the critical batch is about {critical:,.0f} samples and this run's {batch:,}, so "
            f"{pays}: twice the batch takes {steps:.0%} fewer steps and {samples:.0%} more samples to the same loss"
        )

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register a hook on each parameter, which sees its gradient before accumulation and all-reduce."""
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(self._listen))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if each step has only one gradient."""
        one = trainer.world_size == 1 and trainer.accumulate_grad_batches == 1
        if one and not windows_of(trainer):
            rank_zero_warn(
                "GradientNoiseScale sees one gradient a step and can estimate nothing; pass accumulate_grad_batches of "
                "at least 2, or use several devices"
            )
        self._micro_batches = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure gradients during the first micro-batch of a step."""
        if not self._micro_batches:
            self._seen = None
        self._brought = count_samples(batch)
        self._watching = not self._micro_batches and self._counts(trainer)

    def _counts(self, trainer: Trainer) -> bool:
        return trainer.accumulate_grad_batches * trainer.world_size > 1

    def _listen(self, gradient: Tensor) -> None:
        if self._watching:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            square = torch.linalg.vector_norm(gradient.detach(), dtype=wide).float().square()
            self._seen = square if self._seen is None else self._seen + square

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop measuring, and note how many samples of this micro-batch were trained, which is known only now."""
        self._watching = False
        choices = [choice.trained for choice in techniques(trainer) if isinstance(choice, SampleChoice)]
        self._micro_batches.append(choices[0] if choices else (self._brought, False))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compute both norms, and update the moving averages."""
        window, ranks = trainer.accumulate_grad_batches, trainer.world_size
        counted, self._micro_batches = self._micro_batches, []
        # Skip steps that the end of an epoch cut short; further below, skip gradients that overflowed in 16 bits.
        seen, self._seen = self._seen, None
        if seen is None or len(counted) != window or len(set(counted)) > 1:
            return
        samples, _ = counted[0]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        small = seen * (window / (scaler.get_scale() if scaler is not None else 1.0)) ** 2
        if ranks > 1:
            dist.all_reduce(small)
            small = small / ranks
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        large = torch.nn.utils.get_total_norm(gradients).float().square()
        self._batch = samples * window * ranks
        signal, noise = signal_and_noise(small, large, samples, self._batch)
        if scaler is not None and not bool(signal.isfinite() & noise.isfinite()):
            return
        past = self.smoothing
        self.signal = past * self.signal.to(signal.device) + (1 - past) * signal
        self.noise = past * self.noise.to(noise.device) + (1 - past) * noise
        self._weight = past * self._weight + 1 - past
        if writes_logs(trainer):
            pl_module.log("gradient_noise_scale/signal", (self.signal / self._weight).float())
            pl_module.log("gradient_noise_scale/noise", (self.noise / self._weight).float())
            pl_module.log("gradient_noise_scale/critical_batch", (self.noise / self.signal).float())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print whether a larger batch pays, on rank 0."""
        self._silence()
        if trainer.is_global_zero and self._weight:
            print(self.verdict(self._batch), flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._silence()

    def _silence(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
