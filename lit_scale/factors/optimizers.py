"""Optimizers: make them by name, replace or rescale those of a run, and copy state between parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lit_scale.factors.blocks import block_lists
from lit_scale.factors.eight_bit import EIGHT_BIT, embedding_weights, make_eight_bit

__all__ = [
    "MomentRule",
    "create_optimizer",
    "hidden_matrices",
    "replace_optimizers",
    "run_schedulers",
    "scale_rates",
    "state_bytes",
    "transfer_state",
]

MomentRule = Literal["copy", "copy_step0", "reset"]


def create_optimizer(
    module: nn.Module, name: str = "adamw", *, lr: float, weight_decay: float = 0.01, **kwargs: Any
) -> Optimizer:
    """Make an optimizer by name, with weight decay on matrices only.

    Biases, norms, other parameters of at most one dimension, and those that a timm model lists in ``no_weight_decay``
    go into a group without decay (Devlin et al. 2019, reference code). ``"lamb"`` and ``"lars"`` do not adapt the rates
    of that group (You et al. 2017, 2020).

    - ``"adamw"``, ``"adam"``, ``"sgd"`` (Nesterov, momentum 0.9) are torch's.
    - ``"lamb"``, ``"lars"``, ``"lion"`` and all other names of ``timm.optim.list_optimizers()`` are timm's.
    - ``"muon"`` (timm's; momentum 0.95, Nesterov) orthogonalizes the updates of hidden matrices, those inside the
      repeated blocks (Jordan et al. 2024). All other parameters, including embeddings and output layers, get AdamW's
      update with timm's Nesterov momentum. Rates are on AdamW's scale.
    - ``"adamw8bit"``, ``"lion8bit"``, ``"lamb8bit"``, ``"adam8bit"``, ``"ademamix8bit"`` and, with decay added to the
      gradient, ``"sgd8bit"``, ``"rmsprop8bit"``, ``"adagrad8bit"`` keep 8-bit state
      (:mod:`lit_scale.factors.eight_bit`); it stays in 32 bits for embeddings and for tensors of fewer than 4096
      elements.

    Args:
        module: The module whose parameters are trained, on the device on which they are trained.
        name: Name of the optimizer.
        lr: Learning rate.
        weight_decay: Weight decay of the matrices.
        **kwargs: Arguments of the optimizer's class, e.g. ``betas=(0.9, 0.98)``.

    Raises:
        ValueError: If the name is unknown (the message lists all), or the device has no 8-bit update.

    Example:
        >>> optimizer = create_optimizer(nn.Linear(2, 3), "adamw", lr=1e-3, weight_decay=0.1)
        >>> sorted((group["weight_decay"], len(group["params"])) for group in optimizer.param_groups)
        [(0.0, 1), (0.1, 1)]
    """
    if name in ("adam", "adamw"):
        kwargs.setdefault("fused", True)  # torch's fused kernel, also on CPUs: one pass over many small tensors
    if name == "adamw":  # not through timm, whose import is slow
        return torch.optim.AdamW(_decay_groups(module, weight_decay), lr=lr, **kwargs)
    if name in EIGHT_BIT:
        groups = _adapted(module, weight_decay) if name == "lamb8bit" else _decay_groups(module, weight_decay)
        kwargs.setdefault("full_precision", embedding_weights(module))
        return make_eight_bit(name, groups, lr=lr, **kwargs)
    from timm.optim import create_optimizer_v2, list_optimizers

    names = cast(list[str], list_optimizers())
    if name.removeprefix("lookahead_") not in names:
        every = sorted({*names, *EIGHT_BIT})
        raise ValueError(f"optimizer={name!r} is unknown; choose one of {', '.join(every)}")
    groups = _decay_groups(module, weight_decay)
    if "lamb" in name or "lars" in name:
        groups = _adapted(module, weight_decay)
    elif "muon" in name:
        groups = _hidden_and_rest(module, groups)
        kwargs = {"momentum": 0.95} | ({"nesterov": True} if name == "muon" else {}) | kwargs
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **kwargs)


Groups = list[dict[str, Any]]


def _decay_groups(module: nn.Module, weight_decay: float) -> Groups:
    """A group of the parameters that do not decay and one of those that do, without empty groups."""
    exempt: Callable[[], Collection[str]] = getattr(module, "no_weight_decay", tuple)  # timm's models have this method
    names = set(exempt())
    groups: dict[float, list[nn.Parameter]] = {0.0: [], weight_decay: []}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or key.endswith(".bias") or key in names
            groups[0.0 if plain else weight_decay].append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]


def _adapted(module: nn.Module, weight_decay: float) -> Groups:
    """The same groups, with matrices adapted even if weight decay is 0: LAMB without adaptation would be Adam."""
    split = _decay_groups(module, weight_decay or 1.0)
    return [
        {"params": group["params"], "weight_decay": decay and weight_decay, "always_adapt": decay > 0}
        for group in split
        for decay in [group["weight_decay"]]
    ]


def _hidden_and_rest(module: nn.Module, groups: Groups) -> Groups:
    """Split each group in two: hidden matrices, and parameters that AdamW updates."""
    hidden = hidden_matrices(module)
    parts = [
        {**group, "params": [p for p in group["params"] if (p in hidden) == chosen], "use_fallback": not chosen}
        for group in groups
        for chosen in (True, False)
    ]
    return [part for part in parts if part["params"]]


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """Parameters of two or more dimensions inside the repeated blocks; without blocks, all except embeddings."""
    stacks = block_lists(module)
    tables = set(embedding_weights(module))
    inside = [p for stack in stacks for p in stack.parameters()] or list(module.parameters())
    return {p for p in inside if p.ndim >= 2 and p not in tables}


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Bytes of the state that optimizers keep; tensors that parameters share are counted once.

    Example:
        >>> net = nn.Linear(8, 8); optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(8)).sum().backward(); optimizer.step()
        >>> state_bytes([optimizer])  # a momentum of 4 bytes for each of 72 parameters
        288
    """
    leaves = [leaf for optimizer in optimizers for leaf in tree_leaves(list(optimizer.state.values()))]
    local: list[Tensor] = [leaf.to_local() if hasattr(leaf, "to_local") else leaf for leaf in leaves]  # of this rank
    tensors = [leaf for leaf in local if isinstance(leaf, Tensor) and leaf.numel()]
    return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())


# -- changing the optimizers of a run ---------------------------------------------------------------------------------


def replace_optimizers(trainer: Trainer, make: Callable[[Optimizer], Optimizer]) -> None:
    """Replace each optimizer that the module has configured; schedulers then act on the new one.

    Call it in ``on_fit_start``, before optimizer state is restored.

    Args:
        trainer: The Trainer.
        make: Returns the new optimizer for an optimizer, with the same number of groups and the same parameters.
    """
    replaced = {optimizer: make(optimizer) for optimizer in trainer.optimizers}
    trainer.strategy.optimizers = [replaced[optimizer] for optimizer in trainer.optimizers]
    for scheduler in run_schedulers(trainer):
        new = replaced.get(scheduler.optimizer)
        if new is not None:
            scheduler.optimizer = new
            _mark_steps(new)


def run_schedulers(trainer: Trainer) -> Iterator[Any]:
    """The schedulers of a run, including the parts of sequential and chained ones."""
    for config in trainer.lr_scheduler_configs:
        yield from (config.scheduler, *getattr(config.scheduler, "_schedulers", ()))


def _mark_steps(optimizer: Optimizer) -> None:
    """Record that steps are made, as a scheduler's constructor does; without it the scheduler would warn."""
    step = type(optimizer).step

    def marked(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return step(optimizer, *args, **kwargs)

    marked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = marked  # type: ignore[method-assign]


def scale_rates(optimizer: Optimizer, factor: Callable[[], float]) -> Callable[[], None]:
    """Scale the learning rates during each step only, so that schedulers never see the scaled values.

    Several scales on one optimizer multiply. A step that is made inside another step is not scaled again.

    Args:
        optimizer: The optimizer.
        factor: Returns the factor; called before each step.

    Returns:
        A function that ends the scaling; it also restores the rates if an exception left them scaled.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1)); optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> end = scale_rates(optimizer, lambda: 4.0)
        >>> weight.sum().backward(); optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (-0.4000000059604645, 0.1)
    """
    kept: list[tuple[dict[str, Any], Any]] = []
    depth = 0  # of nested steps: torch's hooks may be around a subclass's step and around that of its base class

    def scale(*_: Any) -> None:
        nonlocal depth
        depth += 1
        if depth > 1:
            return
        now = factor()
        kept[:] = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, rate in kept:
            group["lr"] = rate * now

    def restore(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth > 0:
            return
        for group, rate in kept:
            group["lr"] = rate
        kept.clear()

    before, after = optimizer.register_step_pre_hook(scale), optimizer.register_step_post_hook(restore)
    hooks = optimizer._optimizer_step_post_hooks
    others = [(key, hooks.pop(key)) for key in list(hooks) if key != after.id]
    hooks.update(others)  # run this hook first: the last scale to be applied is the first to be removed

    def end() -> None:
        nonlocal depth
        before.remove()
        after.remove()
        depth = 1
        restore()

    return end


# -- moving state -----------------------------------------------------------------------------------------------------


def _counts_per_group(optimizer: Optimizer) -> bool:
    """Whether the step counter is kept per group (timm's LAMB) instead of per parameter."""
    return any("step" in group for group in optimizer.param_groups)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _zeroed(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)


def transfer_state(
    optimizers: Iterable[Optimizer], pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], rule: MomentRule = "copy"
) -> None:
    """Copy the optimizer state of the source of each pair to its target.

    Works for every optimizer that keeps its state in ``optimizer.state[parameter]``: all of torch, timm and
    bitsandbytes. 8-bit moments and their scales are copied without conversion.

    Args:
        optimizers: The optimizers of the run.
        pairs: (source, target) parameters of equal shape. A pair whose source has no state in an optimizer is skipped.
        rule: ``"copy"`` clones moments and step counter. ``"copy_step0"`` clones the moments and sets the counter to 0,
            so that bias correction starts again (Gong et al. 2019, reference code with ``--double-optimizer``).
            ``"reset"`` discards the state of all parameters, old ones included (the default of that code).

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
