"""8-bit optimizer state (Dettmers et al., ICLR 2022): each moment is one byte, with a scale for every 256 moments.

The optimizers are those of bitsandbytes, except for its LAMB and LARS: their 8-bit kernels do not apply the trust
ratio, so they are in fact Adam and SGD. ``lamb8bit`` is LAMB's update, computed from bitsandbytes' 8-bit moments.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["EIGHT_BIT", "embedding_weights", "make_eight_bit", "to_eight_bit"]

#: Names of 8-bit optimizers, and the classes of bitsandbytes that keep their moments.
EIGHT_BIT = {
    "adam8bit": "Adam8bit",
    "adamw8bit": "AdamW8bit",
    "ademamix8bit": "AdEMAMix8bit",
    "adagrad8bit": "Adagrad8bit",
    "lamb8bit": "Adam8bit",
    "lion8bit": "Lion8bit",
    "rmsprop8bit": "RMSprop8bit",
    "sgd8bit": "SGD8bit",
}
#: By class name: the 8-bit optimizer that replaces it, and options that must have the value the 8-bit form has.
_SAME: dict[str, tuple[str, tuple[str, ...]]] = {
    "Adam": ("adam8bit", ("amsgrad", "maximize", "weight_decay")),  # torch adds the decay to the gradient
    "AdamW": ("adamw8bit", ("amsgrad", "maximize")),
    "Lamb": (
        "lamb8bit",
        ("caution", "trust_clip", "decoupled_decay", "corrected_weight_decay", "bias_correction", "grad_averaging"),
    ),
    "Lion": ("lion8bit", ("caution", "corrected_weight_decay", "maximize")),
    "SGD": ("sgd8bit", ("nesterov", "dampening", "maximize")),
}
#: Options among these that must be on; the others must be off.
_ON = frozenset({"bias_correction", "grad_averaging"})


def embedding_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weights of the embedding tables, including those that an output layer shares.

    The rows of their gradients differ in size by orders of magnitude, so one scale for 256 values is too coarse; the
    paper keeps their state in 32 bits (section 2.3).
    """
    tables = [part.weight for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    return cast(list[nn.Parameter], tables)


class _FullPrecision:
    """Mixin for bitsandbytes' optimizers: chosen parameters keep their state in 32 bits.

    bitsandbytes' own mechanism is a global table by ``id`` of the parameter, which outlives optimizer and parameter.
    """

    full_precision: frozenset[nn.Parameter] = frozenset()
    param_groups: list[dict[str, Any]]

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        full = self.param_groups[gindex]["params"][pindex] in self.full_precision
        return config | {"optim_bits": 32} if full else config


class _Lamb:
    """Mixin for Adam with 8-bit moments: the layer-wise adaptation of LAMB (You et al. 2020, algorithm 2).

    r = m / (sqrt(v) + eps);  w <- w - lr |w| / |r + decay w| (r + decay w), after clipping the gradient to norm 1.
    Parameters without weight decay are not adapted, as in timm's Lamb.
    """

    param_groups: list[dict[str, Any]]
    max_grad_norm: float | None = 1.0
    _shrink: Tensor | float = 1.0

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.max_grad_norm is not None and gradients:
            self._shrink = (nn.utils.get_total_norm(gradients) / self.max_grad_norm).clamp_(min=1.0)
        # torch wraps the base class's step in its hooks once a plain Adam8bit was made; unwrap it, since the same hooks
        # are already around this step
        base = inspect.unwrap(super().step.__func__, stop=lambda method: not hasattr(method, "hooked"))  # type: ignore[misc]
        base(self)
        return loss

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        weight, gradient, decay = p.detach().clone(), p.grad, group["weight_decay"]
        assert gradient is not None
        p.grad = gradient / self._shrink
        p.zero_()  # so that Adam's kernel leaves its update there, without loss to rounding
        super().update_step(group | {"lr": 1.0, "weight_decay": 0.0}, p, gindex, pindex)  # type: ignore[misc]
        update = p.detach().neg().add_(weight, alpha=decay)
        if decay or group.get("always_adapt", False):
            norm, length = weight.norm(), update.norm()
            update *= torch.where((norm > 0) & (length > 0), norm / length, 1.0)
        p.copy_(weight.sub_(update, alpha=group["lr"]))
        p.grad = gradient


@functools.cache
def _kind(name: str) -> Any:
    # on some processors its import logs a warning about a package that only 4-bit inference needs
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.optim

    base = getattr(bitsandbytes.optim, EIGHT_BIT[name])
    mixins = (_Lamb, _FullPrecision) if name == "lamb8bit" else (_FullPrecision,)
    return type("Lamb8bit" if name == "lamb8bit" else base.__name__, (*mixins, base), {})


def make_eight_bit(
    name: str, groups: Iterable[dict[str, Any]], *, full_precision: Collection[nn.Parameter] = (), **options: Any
) -> Optimizer:
    """Make an optimizer with 8-bit state.

    Args:
        name: One of :data:`EIGHT_BIT`.
        groups: Parameter groups, on the device on which they are trained.
        full_precision: Parameters whose state stays in 32 bits. Parameters with fewer than ``min_8bit_size`` elements
            (bitsandbytes' default: 4096) always keep 32-bit state.
        **options: Arguments of the optimizer's class, such as ``min_8bit_size``.

    Raises:
        ValueError: If bitsandbytes is missing, or has no 8-bit update for the device of the parameters.

    Example:
        >>> net = nn.Linear(128, 64)
        >>> optimizer = make_eight_bit("adamw8bit", [{"params": list(net.parameters())}], lr=1e-3)
        >>> net(torch.ones(1, 128)).sum().backward(); optimizer.step()
        >>> [optimizer.state[p]["state1"].dtype for p in net.parameters()]
        [torch.uint8, torch.float32]
    """
    groups = [dict(group) for group in groups]
    try:
        kind = _kind(name)
        for device in {p.device for group in groups for p in group["params"]}:
            _try_out(kind, device)
    except Exception as error:
        plain = name.removesuffix("8bit")
        raise ValueError(
            f"optimizer={name!r}: bitsandbytes {_version()} makes no 8-bit update here "
            f"({type(error).__name__}: {error}); use optimizer={plain!r}, or train on a CUDA device, or on a CPU "
            "with bitsandbytes 0.50 or later"
        ) from error
    if name == "lamb8bit":
        clip = options.pop("max_grad_norm", 1.0)
        options = {"eps": 1e-6} | options
    if name == "sgd8bit":
        options = {"momentum": 0.9} | options
    optimizer: Any = kind(groups, **options)
    optimizer.full_precision = frozenset(full_precision)
    if name == "lamb8bit":
        optimizer.max_grad_norm = clip
    return optimizer


def _try_out(kind: Any, device: torch.device) -> None:
    """Make one step on a parameter of that device: bitsandbytes does not list which devices have a kernel."""
    if device.type == "meta":
        raise ValueError("the parameters are on the meta device")
    parameter = nn.Parameter(torch.zeros(256, device=device))
    parameter.grad = torch.zeros_like(parameter)
    options: dict[str, Any] = {"momentum": 0.9} if kind.__name__ == "SGD8bit" else {}
    kind([parameter], lr=0.0, min_8bit_size=1, **options).step()


def _version() -> str:
    try:
        return version("bitsandbytes")
    except ImportError:
        return "(not installed)"


def to_eight_bit(optimizer: Optimizer, full_precision: Collection[nn.Parameter] = ()) -> Optimizer:
    """The 8-bit form of an optimizer that has not made a step yet, with the same groups, rates, decays and betas.

    Args:
        optimizer: torch's Adam without weight decay, AdamW or SGD with momentum, or timm's Lamb or Lion.
        full_precision: Parameters that keep 32-bit state.

    Raises:
        ValueError: If there is no 8-bit form that makes the same update.

    Example:
        >>> net = nn.Linear(128, 64)
        >>> to_eight_bit(torch.optim.AdamW(net.parameters(), lr=2e-3)).param_groups[0]["lr"]
        0.002
    """
    kind, module = type(optimizer).__name__, type(optimizer).__module__.partition(".")[0]
    if kind not in _SAME or module not in ("torch", "timm"):
        known = ", ".join(_SAME)
        raise ValueError(
            f"there is no 8-bit form of {type(optimizer).__module__}.{kind}; configure one of {known}, or make the "
            "8-bit one by create_optimizer"
        )
    name, options = _SAME[kind]
    for option in options:
        usual = option in _ON
        if any(bool(group.get(option, usual)) != usual for group in optimizer.param_groups):
            other = f"{option}=False" if usual else option
            raise ValueError(f"the 8-bit form of {kind} does not have {other}; leave it out")
    if name == "sgd8bit" and not all(group["momentum"] for group in optimizer.param_groups):
        raise ValueError("SGD without momentum has no state that 8 bits could make smaller")
    groups = []
    for group in optimizer.param_groups:
        own = {key: value for key, value in group.items() if key not in optimizer.defaults}  # including a scheduler's
        own |= {key: group[key] for key in ("lr", "weight_decay", "always_adapt") if key in group}
        own |= {key: group[key] for key in ("betas", "eps") if key in group}
        if "momentum" in group:
            own["betas"] = (group["momentum"], 0.0)
        groups.append(own)
    clip = {"max_grad_norm": optimizer.defaults["max_grad_norm"]} if name == "lamb8bit" else {}
    return make_eight_bit(name, groups, full_precision=full_precision, **clip)
