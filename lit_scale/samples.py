"""Samples: the losses of single samples, scores of them without training, and steps on part of a batch.

Techniques that choose samples ask a module for one method, ``per_sample_loss(batch) -> (B,)``, of which its
``training_step`` returns the mean. Batches are tensors, or tuples, lists, dicts and dataclasses of them, nested as they
may be; the samples are the first axis.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_scale.cost import tensors
from lit_scale.datamodules.loader import Plan, derive_seed
from lit_scale.replay import unnoticed
from lit_scale.technique import Technique
from lit_scale.wrapping import wrap

__all__ = [
    "SampleChoice",
    "check_outputs",
    "count_samples",
    "output_gradients",
    "round_share",
    "sample_losses",
    "take_samples",
    "watch_outputs",
]

Step = Callable[[Any], Any]

_LESSON = """{technique} needs the losses of single samples, but {module} has no method per_sample_loss(batch) \
that returns them; add one, and let training_step return its mean:

    def per_sample_loss(self, batch):
        images, labels = batch
        logits = self(images)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")  # (B,)

    def training_step(self, batch, batch_idx):
        loss = self.per_sample_loss(batch).mean()
        self.log("train/loss", loss)
        return loss
"""


# -- part of a batch --------------------------------------------------------------------------------------------------


def count_samples(batch: Any) -> int:
    """How many samples a batch holds: the first axis of its first tensor that has one.

    Raises:
        ValueError: It holds no such tensor.
    """
    for tensor in tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError(f"the batch, a {type(batch).__name__}, holds no tensor whose first axis could be its samples")


def take_samples(batch: Any, index: Tensor | slice) -> Any:
    """A batch of the same form with some of the samples.

    Numbers, and tensors whose first axis is 1, belong to all samples and stay as they are.

    Args:
        batch: Tensors in any nesting.
        index: Of the samples, (b,), repeated ones too; or a slice, which copies nothing.

    Raises:
        ValueError: A tensor's first axis is not the samples.

    Example:
        >>> batch = {"ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "text": ("a", "b", "c"), "scale": torch.tensor(0.5)}
        >>> take_samples(batch, torch.tensor([2, 0]))
        {'ids': tensor([[5, 6],
                [1, 2]]), 'text': ('c', 'a'), 'scale': tensor(0.5000)}
    """
    return _take(batch, index, count_samples(batch), top=True)


def _take(part: Any, index: Tensor | slice, count: int, top: bool = False) -> Any:
    if isinstance(part, Tensor):
        if part.ndim == 0 or part.shape[0] == 1 != count:
            return part
        if part.shape[0] != count:
            raise ValueError(
                f"a tensor of the batch has shape {tuple(part.shape)}, whose first axis is not its {count} samples; "
                "give every tensor as (samples, ...), and what all samples share as (1, ...)"
            )
        return part[index]
    if isinstance(part, Mapping):
        taken = {name: _take(value, index, count) for name, value in part.items()}
        if not isinstance(part, MutableMapping):
            return taken
        whole = copy.copy(part)
        whole.update(taken)
        return whole
    if isinstance(part, list | tuple):
        if not top and _one_each(part, count):
            chosen = range(count)[index] if isinstance(index, slice) else index.tolist()
            return type(part)([part[i] for i in chosen])
        values = [_take(value, index, count) for value in part]
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return dataclasses.replace(part, **{name: _take(value, index, count) for name, value in vars(part).items()})
    return part


def _one_each(part: Sequence[Any], count: int) -> bool:
    """Whether a list holds an item for each sample: texts, or tensors of various sizes."""
    held = list(tensors(part))
    return len(part) == count and (not held or any(t.ndim and t.shape[0] != count for t in held))


# -- scores -----------------------------------------------------------------------------------------------------------


@contextmanager
def _scoring(module: nn.Module) -> Iterator[None]:
    """A forward pass that is no step: without dropout and gradient, and nobody takes notice."""
    cached = torch.is_autocast_cache_enabled()  # weights that are cast without gradients must not be trained with
    fused = torch.backends.mha.get_fastpath_enabled()  # torch's own encoder for inference, whose FLOPs nobody can count
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
    """The losses of a batch, checked."""
    losses, count = module.per_sample_loss(batch), count_samples(batch)
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{type(module).__name__}.per_sample_loss returned {found} for {count} samples; return one loss each, "
            f"({count},): reduction='none', and the mean over all other axes"
        )
    return losses


def sample_losses(module: LightningModule, batch: Any) -> Tensor:
    """The loss of each sample (B,), from a forward pass without dropout that leaves no trace.

    Args:
        module: With a method ``per_sample_loss``.
        batch: On the module's device.
    """
    with _scoring(module):
        return _losses(module, batch)


def output_gradients(module: LightningModule, batch: Any, output: str | None = None) -> Tensor:
    """Norm of each sample's loss gradient at what the network puts out (B,), from one forward pass.

    Everything before the output runs without gradient, so the pass keeps no activations, and there is no backward pass
    but through the loss itself. For softmax cross-entropy it is ||p - y||. Nothing of it leaves a trace.

    Args:
        module: With a method ``per_sample_loss``.
        batch: On the module's device.
        output: Path of the module that puts out; None takes what is given to the loss, a function of
            ``torch.nn.functional`` or the logarithm of a softmax.

    Raises:
        ValueError: No output was met, or its first axis is not the samples.
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
    """Refuse a module whose output is not one for each sample; from two samples of a batch.

    Raises:
        ValueError: No output was met, its first axis is not the samples, or a sample's loss depends on another's.
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
    """Collect the same scores from a training step, up to a common factor, on its own way forward and backward.

    Args:
        module: Whose ``training_step`` runs inside.
        count: Samples of its batch.
        output: As for :func:`output_gradients`.

    Yields:
        A list that the step's backward pass fills with squares (B,), one tensor for each output; the score is the
        root of their sum.

    Raises:
        ValueError: No output was met.
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
    """Changes what is given to a loss function."""

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
    """Without compiling anything."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# -- techniques -------------------------------------------------------------------------------------------------------


class SampleChoice(Technique):
    """A technique that trains on part of the samples it is given.

    A subclass says what a training step does with its batch (:meth:`train`), and, where a loader can be asked ahead, of
    how many samples it chooses (:meth:`samples`). All ranks take equally many. Random choices are a function of
    (seed, rank, batch counter).

    Raises:
        ValueError: In ``setup``, if the module has no ``per_sample_loss``; the message holds one.
    """

    factor = "samples"
    _loader: Any = None  # one that can be asked ahead
    _ended = False  # training has; steps are only replayed
    _weights: Tensor | None = None  # of the samples that are trained right now, (b,)
    _asked = False  # the training step has asked for their losses
    _unwrap: tuple[Callable[[], None], ...] = ()

    # -- what a subclass says -----------------------------------------------------------------------------------------

    @abstractmethod
    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """What the training step returns.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            step: The module's own step; call it once, with a batch of as many samples on all ranks.
            batch: All samples.
        """

    def samples(self, number: int, count: int) -> int:
        """How many samples the loader takes for a batch, by its number since the run began, in place of ``count``."""
        return count

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand around the training step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not callable(getattr(pl_module, "per_sample_loss", None)):
            raise ValueError(_LESSON.format(technique=type(self).__name__, module=type(pl_module).__name__))
        self._detach()
        self._ended = False

        def step(method: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self.train(trainer, pl_module, lambda own: method(own, *args, **kwargs), batch)

        self._unwrap = (
            wrap(pl_module, "training_step", step, outermost=True),
            wrap(pl_module, "per_sample_loss", self._weigh),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the loader for more samples, if it can be asked."""
        loader: Any = trainer.train_dataloader
        if type(self).samples is not SampleChoice.samples and getattr(loader, "takes_plan", False):
            self._loader, before = loader, loader.plan
            loader.plan = functools.partial(self._plan, before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the loader as it was; from now on steps are only replayed."""
        self._ended = True
        if self._loader is not None:
            self._loader.plan = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave loader and module as they were."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave loader and module as they were."""
        self._detach()

    def _detach(self) -> None:
        for unwrap in self._unwrap:
            unwrap()
        if self._loader is not None:
            self._loader.plan = None
        self._unwrap, self._loader, self._weights = (), None, None

    def _plan(self, before: Plan | None, number: int) -> tuple[int | None, int]:
        size, count = (None, self._loader.batch_size) if before is None else before(number)
        return size, self.samples(number, count)

    # -- what subclasses use ------------------------------------------------------------------------------------------

    def number(self, trainer: Trainer) -> int:
        """The number of the batch at work, since the run began."""
        if self._loader is None:
            return trainer.fit_loop.total_batch_idx
        position = self._loader.state_dict()
        return position["epoch"] * position["length"] + position["batches"] - 1

    def generator(self, trainer: Trainer, seed: int) -> torch.Generator:
        """Of this batch's random choices, the same on every device and whenever the run was resumed."""
        counter = trainer.fit_loop.total_batch_idx
        return torch.Generator().manual_seed(derive_seed(seed, trainer.global_rank, counter))

    def weighted(self, pl_module: LightningModule, step: Step, batch: Any, weights: Tensor) -> Any:
        """The module's own step, with the losses of its samples multiplied by ``weights`` (b,)."""
        self._weights, self._asked = weights, False
        try:
            output = step(batch)
        finally:
            self._weights = None
        if not self._asked:
            raise ValueError(
                f"{type(pl_module).__name__}.training_step did not call self.per_sample_loss(batch), whose losses "
                f"{type(self).__name__} has to weigh; let it return self.per_sample_loss(batch).mean()"
            )
        return output

    def _weigh(self, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        losses = method(*args, **kwargs)
        if self._weights is None:
            return losses
        if losses.shape != self._weights.shape:
            raise ValueError(
                f"per_sample_loss returned {tuple(losses.shape)} for {len(self._weights)} samples; return one loss each"
            )
        self._asked = True
        return losses * self._weights.to(losses)


def round_share(share: float, count: int) -> int:
    """A share of so many samples: a whole number, at least one.

    Example:
        >>> round_share(0.1, 160), round_share(0.1, 3)
        (16, 1)
    """
    return max(1, math.floor(share * count + 0.5))
