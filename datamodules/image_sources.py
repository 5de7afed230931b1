"""Sources of images: memory, shards or a folder. Each returns images by position, as uint8 pixels, and their names."""

import io
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lit_scale.datamodules.cache import digest
from lit_scale.datamodules.shards import IMAGES, Shards, is_pattern

__all__ = ["Source", "UndecodableImageError", "find_source", "named_classes"]

_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}  # number of classes of the built-in sources


class UndecodableImageError(ValueError):
    """An image cannot be decoded; the message has its name and the cause."""


class Source(Protocol):
    """Images by position, uint8 (3, H, W), with labels."""

    class_names: list[str] | None

    @property
    def labels(self) -> npt.NDArray[np.int64]: ...  # (N,)

    @property
    def fingerprint(self) -> str: ...

    def image(self, index: int) -> Tensor: ...

    def name(self, index: int) -> str: ...


@dataclass
class _Arrays:
    """Images in memory, uint8 (N, H, W, 3)."""

    title: str
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    class_names: list[str] | None = None

    @cached_property
    def fingerprint(self) -> str:
        return digest(np.ascontiguousarray(self.pixels).tobytes() + self.labels.tobytes())

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"image {index} of {self.title!r}"


@dataclass
class _Shards:
    shards: Shards
    class_names: list[str] | None = None

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self.shards.labels

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    def image(self, index: int) -> Tensor:
        return _decode(self.shards.read(index, *IMAGES), self.shards.name(index))

    def name(self, index: int) -> str:
        return self.shards.name(index)


@dataclass
class _Folder:
    root: Path
    paths: list[str]  # relative to root
    labels: npt.NDArray[np.int64]
    class_names: list[str] | None

    @cached_property
    def fingerprint(self) -> str:
        sizes = [os.path.getsize(self.root / path) for path in self.paths]
        return digest("\n".join(f"{path} {size}" for path, size in zip(self.paths, sizes, strict=True)).encode())

    def image(self, index: int) -> Tensor:
        return _decode((self.root / self.paths[index]).read_bytes(), self.name(index))

    def name(self, index: int) -> str:
        return f"image {str(self.root / self.paths[index])!r}"


def _decode(data: bytes, name: str) -> Tensor:
    """RGB pixels, uint8 (3, H, W)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise UndecodableImageError(
            f"{name} cannot be decoded ({error}): repair or remove it, or pass skip_broken=True"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = (found.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), from values 0 to 16
    return _Arrays("digits", grey[..., None].repeat(3, axis=3), found.target.astype(np.int64), list("0123456789"))


def _cifar(source: str, argument: str, root: Path, download: bool) -> Source:
    from torchvision import datasets

    name, _, part = source.partition("-")
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        found = kind(str(root), train=part != "test", download=download)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{argument}={source!r} cannot be downloaded to {str(root)!r} ({error}): put torchvision's files there, or "
            "write shards where there is a network (recipes/write_shards.py), or use 'digits'"
        ) from error
    return _Arrays(source, found.data, np.array(found.targets, np.int64), list(found.classes))


def _folder(source: str, argument: str) -> Source:
    from torchvision.datasets import ImageFolder

    root = Path(source).expanduser()
    if not root.is_dir():
        raise ValueError(
            f"{argument}={source!r} is neither a folder nor one of {', '.join(_CLASSES)}; shards end in .tar"
        )
    try:
        found = ImageFolder(str(root))
    except FileNotFoundError as error:
        shards = f"; for its shards, write {source.rstrip('/')}/*.tar" if any(root.glob("*.tar")) else ""
        raise ValueError(
            f"{argument}={source!r} has to hold one folder of images per class ({error}){shards}"
        ) from error
    paths = [os.path.relpath(path, root) for path, _ in found.samples]
    return _Folder(root, paths, np.array(found.targets, np.int64), list(found.classes))


def named_classes(source: str | list[str]) -> int | None:
    """Number of classes of a built-in source; None for other sources."""
    return _CLASSES.get(source.removesuffix("-test")) if isinstance(source, str) else None


def find_source(source: str | list[str], argument: str, cache_dir: Path, *, download: bool = False) -> Source:
    """Open the source that an argument of the data module names.

    Args:
        source: ``"digits"``, ``"cifar10"``, ``"cifar100"``, the last two with ``-test`` for their test sets, a folder,
            or shards.
        argument: The argument's name, for messages.
        cache_dir: Folder for indices and downloads.
        download: Whether torchvision may download.

    Raises:
        ValueError: If the source does not exist or cannot be downloaded, or a shard cannot be used (see `Shards`).
    """
    if not isinstance(source, str) or is_pattern(source):
        return _Shards(Shards(source, need=[IMAGES, ("cls",)], cache_dir=cache_dir))
    if source == "digits":
        return _digits()
    if source.removesuffix("-test") in _CLASSES:
        return _cifar(source, argument, cache_dir / "torchvision", download)
    return _folder(source, argument)
