"""Optimizers: construction by name, and moving state from parameter to parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

__all__ = ["MomentRule", "create_optimizer", "transfer_state"]

MomentRule = Literal["copy", "copy_step0", "reset"]


def create_optimizer(
    module: nn.Module, name: str = "adamw", *, lr: float, weight_decay: float = 0.01, **kwargs: Any
) -> Optimizer:
    """Make an optimizer by name through timm, with weight decay on matrices only.

    Biases, norms and other parameters of at most one dimension go into a group without decay (Devlin et al. 2019,
    reference code).

    Args:
        module: Whose parameters are trained.
        name: Any name of ``timm.optim.list_optimizers()``.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        **kwargs: Passed to the optimizer's class, e.g. ``betas=(0.9, 0.98)``.

    Raises:
        ValueError: If the name is unknown; the message lists all.

    Example:
        >>> optimizer = create_optimizer(nn.Linear(2, 3), "adamw", lr=1e-3, weight_decay=0.1)
        >>> sorted((group["weight_decay"], len(group["params"])) for group in optimizer.param_groups)
        [(0.0, 1), (0.1, 1)]
    """
    if name in ("adam", "adamw"):
        kwargs.setdefault("fused", True)  # torch's fused kernel, on CPU too: one pass over small tensors
    if name == "adamw" and not hasattr(module, "no_weight_decay"):
        # What timm would make, without importing it: that takes longer than all else before the first step.
        groups: dict[float, list[nn.Parameter]] = {0.0: [], weight_decay: []}
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups[0.0 if parameter.ndim <= 1 or key.endswith(".bias") else weight_decay].append(parameter)
        return torch.optim.AdamW(
            [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params], lr=lr, **kwargs
        )
    from timm.optim import create_optimizer_v2, list_optimizers

    names = cast(list[str], list_optimizers())
    if name not in names:
        raise ValueError(f"optimizer={name!r} is unknown; timm has {', '.join(names)}")
    return create_optimizer_v2(module, opt=name, lr=lr, weight_decay=weight_decay, **kwargs)


def _counts_per_group(optimizer: Optimizer) -> bool:
    """Whether the step counter lives in the groups (timm's LAMB) instead of beside the moments."""
    return any("step" in group for group in optimizer.param_groups)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _zeroed(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)


def transfer_state(
    optimizers: Iterable[Optimizer], pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], rule: MomentRule = "copy"
) -> None:
    """Give the target of each pair the optimizer state of its source, by parameter and not by position.

    Works for every optimizer that keeps its state in ``optimizer.state[parameter]``: all of torch, timm and
    bitsandbytes, whose 8-bit moments and their scales are copied as they are.

    Args:
        optimizers: The optimizers of the run; each takes the pairs that it owns.
        pairs: (source, target) parameters of equal shape.
        rule: ``"copy"`` clones moments and step; ``"copy_step0"`` clones the moments and sets the step to 0, so that
            bias correction starts anew (Gong et al. 2019, reference code with ``--double-optimizer``); ``"reset"``
            forgets the state of every parameter, old ones too (ibid., the default there).

    Raises:
        ValueError: For ``"copy_step0"`` with an optimizer that counts its steps per group.

    Example:
        >>> a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([a, b]); a.sum().backward(); optimizer.step()
        >>> transfer_state([optimizer], [(a, b)])
        >>> torch.equal(optimizer.state[b]["exp_avg"], optimizer.state[a]["exp_avg"])
        True
    """
    pairs = list(pairs)
    for optimizer in optimizers:
        if rule == "reset":
            optimizer.state.clear()
            for group in optimizer.param_groups:
                if "step" in group:
                    group["step"] = _zeroed(group["step"])
            continue
        if rule == "copy_step0" and _counts_per_group(optimizer):
            raise ValueError(
                f"moments='copy_step0' needs a step counter per parameter, but {type(optimizer).__name__} keeps one "
                "per group; use moments='copy' or 'reset'"
            )
        for source, target in pairs:
            state = optimizer.state.get(source)
            if not state:
                continue
            clone = tree_map(_cloned, dict(state))
            if rule == "copy_step0" and "step" in clone:
                clone["step"] = _zeroed(clone["step"])
            optimizer.state[target] = clone
