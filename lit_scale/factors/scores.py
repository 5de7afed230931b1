"""Scores of single samples: their losses, or the norms of their gradients at the output, without training on them.

Scoring passes run without dropout and have no side effects on gradients, buffers, logs or random state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_scale.batches import count_samples, take_samples
from lit_scale.restoring import unnoticed

__all__ = ["check_outputs", "output_gradients", "sample_losses", "watch_outputs"]


@contextmanager
def _scoring(module: nn.Module) -> Iterator[None]:
    """A context for forward passes without dropout, gradients and side effects."""
    cached = torch.is_autocast_cache_enabled()  # a training step must not reuse casts made without gradients
    fused = torch.backends.mha.get_fastpath_enabled()  # FLOPs of torch's fused encoder for inference cannot be counted
    with unnoticed(module), torch.no_grad():
        module.eval()
        torch.set_autocast_cache_enabled(False)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            torch.backends.mha.set_fastpath_enabled(fused)


def _losses(module: Any, batch: Any) -> Tensor:
    """The losses of a batch, (B,), after a check of their shape."""
    losses, count = module.per_sample_loss(batch), count_samples(batch)
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{type(module).__name__}.per_sample_loss returned {found} for {count} samples; return one loss each, "
            f"({count},): reduction='none', and the mean over all other axes"
        )
    return losses


def sample_losses(module: LightningModule, batch: Any) -> Tensor:
    """The loss of each sample, (B,), from a forward pass without dropout and side effects.

    Args:
        module: A module with a method ``per_sample_loss``.
        batch: A batch on the module's device.

    Raises:
        ValueError: If ``per_sample_loss`` does not return one loss per sample.
    """
    with _scoring(module):
        return _losses(module, batch)


def output_gradients(module: LightningModule, batch: Any, output: str | None = None) -> Tensor:
    """Norm of the gradient of each sample's loss at the network's output, (B,), from one forward pass.

    The network runs without gradient, so no activations are kept; only the loss is differentiated. For softmax
    cross-entropy the norm is ||p - y||. There are no side effects.

    Args:
        module: A module with a method ``per_sample_loss``.
        batch: A batch on the module's device.
        output: Dotted path of the layer whose output is taken; None takes the input of the loss function, which must
            be one of ``torch.nn.functional`` or ``log_softmax``.

    Raises:
        ValueError: If no output is found, or its first axis is not the samples.
    """
    return _norms(_output_gradients(module, batch, output), count_samples(batch))


def _output_gradients(
    module: LightningModule, batch: Any, output: str | None, choose: Callable[[Tensor], Tensor] = torch.sum
) -> list[Tensor]:
    outputs: list[Tensor] = []

    def begin(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        outputs.append(x)
        torch.set_grad_enabled(True)  # until the pass is over
        return x

    with _scoring(module), _at_outputs(module, output, begin):
        chosen = choose(_losses(module, batch))
        gradients = torch.autograd.grad(chosen, outputs, allow_unused=True) if outputs else ()
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        raise _no_output(module, output)
    return found


def check_outputs(module: LightningModule, batch: Any, output: str | None = None) -> None:
    """Check on two samples of a batch that each sample has its own output.

    Raises:
        ValueError: If no output is found, its first axis is not the samples, or the loss of a sample depends on the
            output of another.
    """
    few = take_samples(batch, slice(0, 2))
    count = count_samples(few)
    with _eager():
        gradients = _output_gradients(module, few, output, lambda losses: losses[0])
    if _norms(gradients, count)[1:].any():
        raise ValueError(
            f"the loss of one sample of {type(module).__name__} depends on the output of another; samples can be "
            "scored only where the output is (samples, ...) and losses are of one sample each"
        )


@contextmanager
def watch_outputs(module: LightningModule, count: int, output: str | None = None) -> Iterator[list[Tensor]]:
    """Collect the scores of :func:`output_gradients`, up to a common factor, from a training step.

    Args:
        module: The module whose ``training_step`` runs inside the context.
        count: Number of samples of its batch, B.
        output: As for :func:`output_gradients`.

    Yields:
        A list that the step's backward pass fills with squared norms (B,), one tensor for each output. The score is the
        square root of their sum.

    Raises:
        ValueError: If no output is found.
    """
    squares: list[Tensor] = []
    watched = []

    def watch(x: Tensor) -> Tensor:
        if x.requires_grad:
            watched.append(x.register_hook(lambda gradient: squares.append(_squares(gradient, count))))
        return x

    with _at_outputs(module, output, watch):
        yield squares
    if not watched:
        raise _no_output(module, output)


def _norms(gradients: Sequence[Tensor], count: int) -> Tensor:
    """Norm of each sample's part of all gradients, (B,)."""
    return torch.stack([_squares(gradient, count) for gradient in gradients]).sum(0).sqrt()


def _squares(gradient: Tensor, count: int) -> Tensor:
    """Sum of squares of each sample's part (B,) of a gradient (B, ...) or (B x ..., ...)."""
    if gradient.ndim == 0 or gradient.shape[0] % count:
        raise ValueError(
            f"the loss is given an output of shape {tuple(gradient.shape)} for {count} samples; its first axis has "
            "to be the samples, or samples and positions flattened"
        )
    return gradient.detach().float().reshape(count, -1).square().sum(1)


def _no_output(module: nn.Module, output: str | None) -> ValueError:
    where = "is given to no loss of torch.nn.functional" if output is None else f"does not come from output={output!r}"
    return ValueError(
        f"the output of {type(module).__name__} {where}, or is compiled along with it; name the last layer, and leave "
        "it out of torch.compile: output='net.head'"
    )


class _AtLoss(TorchFunctionMode):
    """Applies a function to the input of each loss function."""

    LOSSES = frozenset(
        {
            F.cross_entropy,
            F.binary_cross_entropy_with_logits,
            F.mse_loss,
            F.l1_loss,
            F.smooth_l1_loss,
            F.huber_loss,
            F.log_softmax,
            torch.log_softmax,
            Tensor.log_softmax,
            F.logsigmoid,
        }
    )

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.LOSSES:
            if args:
                args = (self.change(args[0]), *args[1:])
            elif "input" in kwargs:
                kwargs = kwargs | {"input": self.change(kwargs["input"])}
        return func(*args, **kwargs)


@contextmanager
def _at_outputs(module: nn.Module, output: str | None, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    if output is None:
        with _AtLoss(change):
            yield
        return

    def hook(_: nn.Module, __: Any, out: Any) -> Tensor:
        if not isinstance(out, Tensor):
            raise ValueError(f"output={output!r} returns a {type(out).__name__}; name the layer whose tensor is in it")
        return change(out)

    handle = module.get_submodule(output).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _eager() -> Iterator[None]:
    """A context in which nothing is compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
