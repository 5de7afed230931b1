"""Steps that leave no trace: repeated to be timed, or run once more to count the FLOPs of compiled code."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import Metric

__all__ = ["flops_of", "is_compiled", "replay_step", "undone", "unnoticed"]

_LOGS = {"log", "log_dict"}  # of LightningModule, which refuse to work outside of the loop


def is_compiled(module: nn.Module) -> bool:
    """Whether some part of a network went through ``torch.compile`` or ``Module.compile``."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # not even imported
        return False
    return any(isinstance(m, dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in module.modules())


def replay_step(trainer: Trainer, pl_module: LightningModule, batch: Any, update: bool) -> None:
    """One training step as Lightning's automatic optimization does it, outside of the loop.

    Args:
        trainer: The Trainer, whose strategy and precision do the work.
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


def flops_of(trainer: Trainer, pl_module: LightningModule, batch: Any, kind: str) -> int:
    """FLOPs of a step in a network whose compiled parts hide them: forward, and backward in training, once more.

    The extra pass is eager, leaves gradients alone and never talks to other ranks. What the optimizer multiplies is
    not in it.
    """
    training = kind == "train"
    step: Any = pl_module.training_step if training else pl_module.validation_step
    precision = trainer.precision_plugin
    with ExitStack() as stack:
        stack.enter_context(_unseen(trainer, pl_module))
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
    """``batch_idx`` is optional in Lightning's steps."""
    return (batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)


def _keep(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


@contextmanager
def unnoticed(module: nn.Module) -> Iterator[None]:
    """Put metrics, random state and modes back as they were, and log nothing meanwhile."""
    modules = list(module.modules())
    metrics = [(m, m._copy_state_dict(), m._update_count, m._computed) for m in modules if isinstance(m, Metric)]
    modes = [part.training for part in modules]
    members = [part.__dict__ for part in modules if isinstance(part, LightningModule)]
    logging = [(own, {name: own[name] for name in _LOGS & own.keys()}) for own in members]
    random = isolate_rng()
    random.__enter__()
    try:
        for own, _ in logging:
            own.update(dict.fromkeys(_LOGS, _silent))
        yield
    finally:
        for own, before in logging:
            for name in _LOGS - before.keys():
                del own[name]
            own.update(before)
        for metric, state, updates, computed in metrics:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = updates, computed
        for part, mode in zip(modules, modes, strict=True):
            part.training = mode
        random.__exit__(None, None, None)  # it would leave the state as it is if it saw an exception


@contextmanager
def _unseen(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The same, and put buffers back and keep what is written to loggers from them."""
    buffers = [(buffer, _keep(buffer)) for buffer in pl_module.buffers()]
    loggers = trainer.loggers
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        with unnoticed(pl_module):
            yield
    finally:
        trainer.loggers = loggers
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


@contextmanager
def undone(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Put weights, gradients, optimizers, scaler, buffers, metrics and random state back, bit for bit.

    The copies are in main memory.

    Raises:
        MemoryError: There is no room for the copies.
    """
    parameters = list(pl_module.parameters())
    states = [dict(optimizer.state) for optimizer in trainer.optimizers]
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    tensors = [*parameters, *(leaf for leaf in tree_leaves([states, groups]) if isinstance(leaf, Tensor))]
    need = sum(tensor.nbytes for tensor in [*tensors, *(p.grad for p in parameters if p.grad is not None)])
    if need > (free := _free_memory()):
        raise MemoryError(f"copies of weights and optimizer need {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    copies = [_keep(tensor) for tensor in tensors]
    gradients = [_keep(parameter.grad) for parameter in parameters]
    structures = [{key: tree_map(lambda leaf: leaf, value) for key, value in state.items()} for state in states]
    precision = trainer.precision_plugin.state_dict()
    try:
        with _unseen(trainer, pl_module), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for tensor, kept in zip(tensors, copies, strict=True):
                tensor.copy_(kept)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        for optimizer, structure, kept_groups in zip(trainer.optimizers, structures, groups, strict=True):
            optimizer.state.clear()
            optimizer.state.update(structure)
            for group, kept in zip(optimizer.param_groups, kept_groups, strict=True):
                group.update(kept)
        trainer.precision_plugin.load_state_dict(precision)


def _free_memory() -> float:
    """Bytes of main memory that can still be had, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _silent(*_: Any, **__: Any) -> None:
    """Stands in for them."""
