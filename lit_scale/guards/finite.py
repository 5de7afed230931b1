"""Finite updates: stop a run before an optimizer step with a loss or gradient that is not finite."""

import math

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["FiniteGuard", "NonFiniteError"]


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the optimizer step that would have used it was not made."""


class FiniteGuard(Callback):
    """Stops all ranks before an optimizer step if a loss or a gradient is NaN or infinite.

    It checks every loss of the accumulation window and all gradients. While all are finite, this costs one device
    synchronisation per step and, between ranks, the reduction of one scalar. Under a GradScaler only losses are
    checked, because the scaler finds its scale by infinite gradients. Weights and optimizer state remain those of the
    previous step. Buffers (BatchNorm) already include the bad batch: resume from a checkpoint of an earlier step, not
    from one that was saved on the exception.

    Raises:
        NonFiniteError: With step, epoch, batch, the loss or the first parameters, and remedies to try.

    Example:
        >>> trainer = Trainer(callbacks=[FiniteGuard()], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    _losses: list[tuple[int, Tensor]]  # batch index and loss of each micro-batch since the last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((trainer.fit_loop.batch_idx, loss.detach().sum()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        gradients = []
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            parameters = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            gradients = [g for g in map(_local_gradient, parameters) if g.numel()]
        # The 2-norm is fast, and finite only if all gradients are. Because that of large finite gradients can overflow,
        # the largest magnitude decides in that case. It takes twenty times as long on a CPU.
        for norm in (2.0, math.inf):
            total = torch.nn.utils.get_total_norm(gradients, norm_type=norm)
            probes = [total.to(pl_module.device), *(loss for _, loss in losses)]
            finite = torch.stack([probe.isfinite().to(pl_module.device) for probe in probes]).all().int()
            if trainer.world_size > 1:
                dist.all_reduce(finite, op=dist.ReduceOp.MIN)
            if finite.item():
                return
        bad = [(index, loss.item()) for index, loss in losses if not loss.isfinite()]
        batch, value = bad[0] if bad else (trainer.fit_loop.batch_idx, 0.0)
        parts = {name: _local_gradient(p) for name, p in pl_module.named_parameters() if p.grad is not None}
        names = [name for name, gradient in parts.items() if not gradient.isfinite().all()]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        what = f"the gradient is not finite in {shown}" if names else "another rank met a non-finite loss"
        raise NonFiniteError(
            f"{f'the loss is {value}' if bad else what}, before optimizer step {trainer.global_step + 1} (epoch "
            f"{trainer.current_epoch}, batch {batch}). That step was not made. Look at this batch; try a lower "
            "learning rate, a longer warm-up, gradient_clip_val=1.0, or precision 'bf16-mixed' or '32-true' instead of "
            "'16-mixed'; Trainer(detect_anomaly=True) finds the operation. Then resume from the last checkpoint."
        )


def _local_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The values of a gradient that this rank holds: the shard of a DTensor, the entries of a sparse tensor."""
    gradient = parameter.grad
    assert gradient is not None
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return gradient._values() if gradient.is_sparse else gradient
