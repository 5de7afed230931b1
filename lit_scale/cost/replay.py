"""Steps outside of the training loop: replayed to be timed, or run once more to count the FLOPs of compiled code."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_scale.restoring import unseen

__all__ = ["flops_of", "is_compiled", "replay_step"]


def is_compiled(module: nn.Module) -> bool:
    """Whether some part of a network was compiled by ``torch.compile`` or ``Module.compile``."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # not even imported
        return False
    return any(isinstance(m, dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in module.modules())


def replay_step(trainer: Trainer, pl_module: LightningModule, batch: Any, update: bool) -> None:
    """Make one training step like Lightning's automatic optimization, outside of the training loop.

    Args:
        trainer: The Trainer, whose strategy and precision plugin are used.
        pl_module: Its module.
        batch: The batch, on the device.
        update: Whether the optimizer steps, or gradients only accumulate.
    """
    optimizer = trainer.optimizers[0]

    def closure() -> Tensor:
        output: Any = trainer.strategy.training_step(*_arguments(pl_module.training_step, batch))
        loss: Tensor = (output["loss"] if isinstance(output, dict) else output) / trainer.accumulate_grad_batches
        optimizer.zero_grad()
        trainer.strategy.backward(loss, optimizer)
        return loss

    if update:
        trainer.strategy.optimizer_step(optimizer, closure, pl_module)
    else:
        closure()


def flops_of(trainer: Trainer, pl_module: LightningModule, batch: Any, phase: str) -> int:
    """Count the FLOPs of a step of a compiled network, by running it once more without compilation.

    The extra pass is a forward pass, and in training a backward pass too. It does not change gradients and does not
    communicate with other ranks. FLOPs of the optimizer are not included.
    """
    training = phase == "train"
    step: Any = pl_module.training_step if training else pl_module.validation_step
    precision = trainer.precision_plugin
    with ExitStack() as stack:
        stack.enter_context(unseen(trainer, pl_module))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(precision.train_step_context() if training else precision.val_step_context())
        output = step(*_arguments(step, batch))
        if training:
            loss = output["loss"] if isinstance(output, dict) else output
            trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trained, allow_unused=True)
    return int(counter.get_total_flops())


def _arguments(step: Any, batch: Any) -> tuple[Any, ...]:
    """Arguments of a step: ``batch_idx`` is optional in Lightning."""
    return (batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
