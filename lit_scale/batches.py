"""Batches: iterate over their tensors, count their samples, and take some of the samples.

A batch is a tensor, or any nesting of tuples, lists, dicts and dataclasses of tensors. The first axis of each tensor is
that of the samples.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Plan", "count_samples", "take_samples", "tensors"]

#: Maps the number of a batch since the run began to the size of its samples (pixels of a side, tokens of a sequence;
#: None is full size) and their number.
Plan = Callable[[int], tuple[int | None, int]]


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order, from any nesting of containers."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors(value)
    elif dataclasses.is_dataclass(batch):
        yield from tensors(vars(batch))


def count_samples(batch: Any) -> int:
    """Number of samples in a batch: the length of the first axis of its first tensor that is not a scalar.

    Raises:
        ValueError: If the batch holds no such tensor.
    """
    for tensor in tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError(f"the batch, a {type(batch).__name__}, holds no tensor whose first axis could be its samples")


def take_samples(batch: Any, index: Tensor | slice) -> Any:
    """Take some of the samples, as a batch of the same form.

    Numbers, scalar tensors, and tensors whose first axis has length 1 belong to all samples and are left unchanged.

    Args:
        batch: Tensors in any nesting.
        index: Indices of the samples, (b,), repetitions allowed; or a slice, which copies no tensor.

    Raises:
        ValueError: If the first axis of a tensor is not that of the samples.

    Example:
        >>> import torch
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
    """Whether a list holds one item per sample: strings, or tensors of different sizes."""
    held = list(tensors(part))
    return len(part) == count and (not held or any(t.ndim and t.shape[0] != count for t in held))
