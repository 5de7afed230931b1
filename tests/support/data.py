"""Tiny data: every sample is a function of its index, so that two runs can be compared to the last bit.

`loader(name)` makes what the network of that name in `tests.support.networks` takes. `pictures` are pairs of image and
label, `Images` and `SizedImages` larger images in a dictionary, `numbers` four numbers a sample. `write_corpus` leaves
a folder of text files.
"""

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.seeds import derive_seed

LENGTH = 8  # tokens of a text
VOCABULARY = 24
MASK = 0  # the token that hides another
CLASSES = 4
SIDE, PATCH = 8, 2  # of a picture and of its patches, in pixels
PATCHES = (SIDE // PATCH) ** 2
FULL_SIDE, FULL_PATCH = 16, 4  # of an image that can be made smaller


class Indexed(Dataset[Any]):
    """Sample i is what `make` does with a generator that i has seeded."""

    def __init__(self, make: Callable[[torch.Generator], Any], size: int = 32, *, of: str = "sample") -> None:
        self.make, self.size, self.of = make, size, of

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(torch.Generator().manual_seed(derive_seed(self.of, index)))


def _bright(generator: torch.Generator, side: int) -> tuple[Tensor, Tensor]:
    """An image whose brightness is its class."""
    label = torch.randint(CLASSES, (), generator=generator)
    return torch.randn(3, side, side, generator=generator) + label, label


def _image(generator: torch.Generator, side: int = SIDE) -> dict[str, Tensor]:
    image, label = _bright(generator, side)
    return {"image": image, "label": label}


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    start = torch.randint(VOCABULARY, (1,), generator=generator)
    ids = (start + torch.arange(LENGTH)) % VOCABULARY  # counting up, so there is something to learn
    return {"input_ids": ids, "label": ids[0] % CLASSES}


def _masked(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _text(generator)["input_ids"]
    positions = torch.randperm(LENGTH, generator=generator)[:2]
    return {"input_ids": ids.index_fill(0, positions, MASK), "positions": positions, "labels": ids[positions]}


_SAMPLES: dict[str, Callable[[torch.Generator], dict[str, Tensor]]] = {
    "bert": _masked,
    "timm_vit": _image,
    "plain_torch": _image,
    "hf_bert": _text,
    "hf_gpt2": _text,
    "torch_encoder": _text,
    "masked_hf_bert": _masked,
    "masked_torch_encoder": _masked,
}


def loader(name: str, *, size: int = 32, batch_size: int = 4, shuffle: bool = True, **options: Any) -> ResumableLoader:
    """Samples that fit the network of this name."""
    return ResumableLoader(Indexed(_SAMPLES[name], size), batch_size, shuffle=shuffle, **options)


class Pictures(Indexed):
    """Pairs of a small image, whose brightness is its class, and that class."""

    def __init__(self, size: int = 32) -> None:
        super().__init__(functools.partial(_bright, side=SIDE), size, of="picture")


def pictures(*, size: int = 32, batch_size: int = 4, shuffle: bool = True, **options: Any) -> ResumableLoader:
    return ResumableLoader(Pictures(size), batch_size, shuffle=shuffle, **options)


class Images(Indexed):
    """Images of full size, with their classes."""

    def __init__(self, size: int = 48) -> None:
        super().__init__(functools.partial(_image, side=FULL_SIDE), size, of="image")


class SizedImages(Images):
    """The same images in the size of the key, as `ImageDataModule` makes them."""

    epochwise = sized = True
    full_size = FULL_SIDE

    def __getitem__(self, key: Any) -> dict[str, Tensor]:
        _, index, size = key
        sample: dict[str, Tensor] = super().__getitem__(index)
        if size is not None:
            shape: Any = (size, size)
            sample["image"] = F.interpolate(sample["image"][None], shape, mode="bilinear", antialias=True)[0]
        return sample


def sized_loader(batch_size: int = 4, *, size: int = 48, **options: Any) -> ResumableLoader:
    return ResumableLoader(SizedImages(size), batch_size, shuffle=True, drop_last=True, **options)


def full_loader(batch_size: int = 4) -> ResumableLoader:
    """Images of full size, from a loader that knows nothing of sizes."""
    return ResumableLoader(Images(), batch_size, shuffle=True, drop_last=True)


def as_loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """Batches that are there already."""
    given: Any = batches
    return DataLoader(given, batch_size=None)


def val_loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(Images(8), batch_size)


class Numbers(Dataset[Tensor]):
    """Sample i is four random numbers seeded by i."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


def numbers(workers: int = 0) -> ResumableLoader:
    return ResumableLoader(Numbers(), batch_size=2, shuffle=True, seed=3, num_workers=workers)


@functools.cache
def _documents(count: int = 40, size: int = 1500) -> tuple[str, ...]:
    """Deterministic pseudo-English: invented words, a few of them frequent, in a handful of sentence shapes."""
    rng = random.Random(0)

    def words(number: int, ending: str = "") -> list[str]:
        syllables = [
            onset + vowel
            for onset in ("b", "d", "f", "gr", "k", "l", "m", "n", "pl", "s", "t", "v")
            for vowel in "aeiou"
        ]
        return [
            "".join(rng.choices(syllables, k=rng.randint(1, 3))) + rng.choice("nrst") + ending for _ in range(number)
        ]

    kinds = {"N": words(120), "V": words(60, "s"), "A": words(60, "y"), "R": words(20, "ly")}
    weights = {kind: [1 / (rank + 1) for rank in range(len(members))] for kind, members in kinds.items()}
    shapes = [
        "the N V the A N.",
        "a A N V R.",
        "the N of the N V a N, and the N V.",
        "when the N V, the A N V R.",
        "no N V the N but the A N.",
    ]

    def fill(word: str) -> str:
        kind, rest = word[0], word[1:]
        return rng.choices(kinds[kind], weights[kind])[0] + rest if kind in kinds else word

    documents = []
    for _ in range(count):
        text = ""
        while len(text) < size:
            sentence = " ".join(map(fill, rng.choice(shapes).split()))
            text += sentence.capitalize() + rng.choice([" ", " ", " ", "\n"])
        documents.append(text.rstrip() + "\n")
    return tuple(documents)


def write_corpus(folder: Path) -> Path:
    """A folder of 40 small text files, about 60 kB altogether, the same in every run."""
    folder.mkdir()
    for index, text in enumerate(_documents()):
        (folder / f"{index:02d}.txt").write_text(text)
    return folder
