"""Context managers that restore a module or a run, bit for bit, when they exit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

__all__ = ["undone", "unnoticed", "unseen"]

_LOGS = {"log", "log_dict"}  # methods of LightningModule, which raise outside of the loop


def _keep(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


@contextmanager
def unnoticed(module: nn.Module) -> Iterator[None]:
    """Restore metrics, random state and training modes on exit, and log nothing in between."""
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
        random.__exit__(None, None, None)  # given an exception, it would not restore the state


@contextmanager
def unseen(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """As :func:`unnoticed`; also restore the buffers, and keep everything from the loggers."""
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
    """As :func:`unseen`; also restore weights, gradients, and the state of optimizers and gradient scaler, bit for bit.

    The copies are held in main memory.

    Raises:
        MemoryError: If main memory has no room for the copies.
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
        raise MemoryError(
            f"copies of weights and optimizer state need {need / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free"
        )
    copies = [_keep(tensor) for tensor in tensors]
    gradients = [_keep(parameter.grad) for parameter in parameters]
    structures = [{key: tree_map(lambda leaf: leaf, value) for key, value in state.items()} for state in states]
    precision = trainer.precision_plugin.state_dict()
    try:
        with unseen(trainer, pl_module), torch.enable_grad():
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
    """Bytes of main memory that are available; infinity if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _silent(*_: Any, **__: Any) -> None:
    """Replace ``log`` and ``log_dict``: do nothing."""
