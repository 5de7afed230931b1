"""Equal to the last bit: states, batches and records of any nesting, with the first difference named."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two values differ first, and how; None: nowhere. NaN equals NaN, and 1 differs from a tensor of 1."""
    place = where or "the value"
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        one, other = torch.from_numpy(one), torch.from_numpy(other)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _first_difference_of_tensors(one, other, place)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in one.keys() ^ other.keys():
            return f"{place} has {key!r} on one side only"
        pairs = [(f"{where}.{key}" if where else str(key), value, other[key]) for key, value in one.items()]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{place} has {len(one)} and {len(other)} items"
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        equal = type(one) is type(other) and (one == other or (one != one and other != other))
        return None if equal else f"{place} is {one!r} and {other!r}"
    return next((found for name, a, b in pairs if (found := first_difference(a, b, name))), None)


def _first_difference_of_tensors(one: Tensor, other: Tensor, place: str) -> str | None:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        sides = [f"{str(side.dtype).removeprefix('torch.')} {tuple(side.shape)}" for side in (one, other)]
        return f"{place} is {' and '.join(sides)}"
    differ = (one != other) & ~((one != one) & (other != other))
    if not differ.any():
        return None
    gap = (one.double() - other.double()).abs()[differ].max().item()
    return f"{place} differs in {int(differ.sum())} of {one.numel()} values, by up to {gap:.3g}"


def same(one: Any, other: Any) -> bool:
    return first_difference(one, other) is None


def assert_same(one: Any, other: Any, where: str = "") -> None:
    found = first_difference(one, other, where)
    assert found is None, found
