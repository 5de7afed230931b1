"""Images for classifiers, from scanned digits, shards, a folder or CIFAR: batches of one size, optionally augmented."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lit_scale.datamodules.cache import cache_folder
from lit_scale.datamodules.image_sources import Source, UndecodableImageError, find_source, named_classes
from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.datamodules.resume import ResumableDataModule, check_at_least
from lit_scale.seeds import derive_seed

__all__ = ["ImageDataModule"]

_SMALL = 64  # images up to this side are augmented like CIFAR, larger ones like ImageNet
_BROKEN = 0.01  # a larger share of undecodable images means that the data set is damaged

Batch = tuple[Tensor, Tensor]
Key = int | tuple[int, int] | tuple[int, int, int | None]


# ---- data sets


def _fit(image: Tensor, size: int) -> Tensor:
    """Resize the shorter side to ``size``, and crop the central square: (3, S, S)."""
    if image.shape[-2:] == (size, size):
        return image
    return v2.functional.center_crop(v2.functional.resize(image, [size], antialias=True), [size, size])


def _standard(size: int, flip: bool) -> v2.Transform:
    """Pad and crop small images (He et al. 2016, section 4.2), large ones at random scale (Szegedy et al. 2015)."""
    crop = v2.RandomCrop(size, padding=max(1, size // 8)) if size <= _SMALL else v2.RandomResizedCrop(size)
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop


class _Images(Dataset[Batch]):
    """Images of a source, a whole batch at a time.

    Args:
        source: Source of the images.
        rows: Positions in the source to use, (N,).
        classes: Classes of all images of the source; None takes the source's labels.
        size: Side of the images, in pixels.
        augment: Transform of one uint8 image to (3, size, size), drawing from torch's generator; None takes the central
            square.
        train: Whether keys are (epoch, position, size of the batch's images).
        seed: Seed of the augmentation.
        mean: Mean of each channel, with pixels in [0, 1].
        std: Standard deviation of each channel, likewise.
        skip_broken: Whether the next image replaces one that cannot be decoded.
        cache_bytes: Memory for decoded images, over all processes together.
    """

    def __init__(
        self,
        source: Source,
        rows: npt.NDArray[np.int64],
        *,
        classes: npt.NDArray[np.int64] | None = None,
        size: int,
        augment: v2.Transform | None = None,
        train: bool = False,
        seed: int = 0,
        mean: Sequence[float],
        std: Sequence[float],
        skip_broken: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self.source, self.rows, self.size, self.augment, self.seed = source, rows, size, augment, seed
        self.labels = (source.labels if classes is None else classes)[rows]  # (N,)
        self.epochwise = self.sized = train
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.skip_broken = skip_broken
        self.processes = 1  # that share the images of an epoch; set when the loader is made
        self.cache_bytes = cache_bytes
        self._kept: dict[int, Tensor] = {}  # uint8
        self._kept_bytes = 0
        self._broken: set[int] = set()  # positions found in this process and epoch
        self._epoch = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_kept_bytes": 0}  # do not pickle decoded images to a spawned worker

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def full_size(self) -> int:
        """Side of the images in pixels."""
        return self.size

    def _image(self, position: int) -> Tensor:
        """A decoded image, resized to ``size`` unless a random crop needs all of it."""
        image = self._kept.get(position)
        if image is None:
            image = self.source.image(int(self.rows[position]))
            if self.augment is None or self.size <= _SMALL:
                image = _fit(image, self.size)
            if self._kept_bytes + image.nbytes <= self.cache_bytes / self.processes:
                self._kept[position], self._kept_bytes = image, self._kept_bytes + image.nbytes
        return image

    def _readable(self, epoch: int, position: int) -> tuple[Tensor, int]:
        """Image and label; those of the next readable image if this one is broken and ``skip_broken`` is set."""
        for candidate in range(position, position + len(self)):
            try:
                image = self._image(candidate % len(self))
            except UndecodableImageError as error:
                if not self.skip_broken:
                    raise
                self._count_broken(epoch, candidate % len(self), error)
            else:
                return image, int(self.labels[candidate % len(self)])
        raise ValueError(f"none of {len(self)} images can be decoded, among them {self.source.name(int(self.rows[0]))}")

    def _count_broken(self, epoch: int, position: int, error: Exception) -> None:
        """Warn at counts 1, 2, 4...; raise above 1% of the images that this process reads in an epoch."""
        if epoch != self._epoch:
            self._epoch, self._broken = epoch, set()
        if position in self._broken:
            return
        self._broken.add(position)
        count, share = len(self._broken), len(self) / self.processes
        if count > max(1, _BROKEN * share):
            raise ValueError(
                f"{count} of about {share:.0f} images cannot be decoded, more than {_BROKEN:.0%}: the data set is "
                f"damaged. The last one: {error}"
            ) from error
        if count & (count - 1) == 0:
            name = self.source.name(int(self.rows[position]))
            warnings.warn(
                f"{name} cannot be decoded ({error.__cause__}); the next image stands in for it ({count} so far)",
                stacklevel=2,
            )

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        side = None
        images, labels = [], []
        with torch.random.fork_rng(devices=[], enabled=self.augment is not None):
            for key in keys:
                epoch, position, side = (*key, None)[:3] if isinstance(key, tuple) else (0, key, None)
                image, label = self._readable(epoch, position)
                if self.augment is not None:
                    torch.default_generator.manual_seed(derive_seed(self.seed, epoch, position))
                    image = self.augment(image)
                images.append(image)
                labels.append(label)
        batch = torch.stack(images).float().div_(255)  # (B, 3, S, S)
        if side is not None and side != self.size:
            batch = F.interpolate(batch, (side, side), mode="bilinear", antialias=True)
        return batch.sub_(self.mean).div_(self.std), torch.tensor(labels)

    def __getitem__(self, key: Key) -> Batch:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]


class ImageDataModule(ResumableDataModule):
    """Images and their classes, from scanned digits, WebDataset shards, a folder, or CIFAR.

    Batches are tuples of images, float32 (B, 3, S, S), and classes, int64 (B,). Order and augmentation of the training
    images are functions of (seed, epoch, position), for any number of workers. Validation and test take the central
    square of each image and never change. Training resumes exactly at the next batch; resuming on other data is
    refused.

    Args:
        source: ``"digits"``, 1,797 scans of 8 x 8 pixels that come with scikit-learn; a folder with one folder of
            images per class; shards such as ``"train-{000..009}.tar"``, with a ``jpg`` or ``png`` and a ``cls`` per
            sample; or ``"cifar10"``, ``"cifar100"``, which torchvision downloads. ``"cifar10-test"`` is its test set.
        val_source: Validation images, any of the above; None holds out a share of the images of ``source``.
        image_size: Side S in pixels; images of other sizes are resized and cropped.
        batch_size: Images per batch and device.
        num_classes: Number of classes; None takes it from ``source``.
        augmentation: ``"standard"`` pads, crops and flips images of up to 64 pixels; larger ones are cropped at random
            scale and flipped. Digits are not flipped. ``"none"`` only resizes and crops.
        mean: Subtracted from each channel, with pixels in [0, 1].
        std: Divisor of each channel after that. The defaults map pixels to [-1, 1], as timm does for its ViTs.
        imbalance: How often each image of class 0 is repeated, in the training, validation and test images. On a
            balanced source this is the imbalance ratio of Buda et al. (2018): most samples are of one class and soon
            become easy, and the others are rare.
        label_noise: Share of the images of ``source``, in [0, 1), whose class is replaced by a random other one in
            training; ``split_seed`` chooses them. Validation and test keep the true classes.
        part: Begin and end of the part of the training images that is used, as shares, in an order drawn with
            ``split_seed``. (0.0, 0.8) leaves a fifth for another model; (0.8, 1.0) is that fifth.
        test_source: Test images, any of the above. They are for reporting only, not for choosing anything.
        val_fraction: Share of the images that is held out for validation if there is no ``val_source``, in (0, 1).
        test_fraction: Share of the images that is held out for test if there is no ``test_source``, in
            [0, 1 - ``val_fraction``); 0 makes no test set.
        max_val_images: Number of images, chosen at random once, to validate and to test on; None takes all.
        skip_broken: Whether the next image replaces one that cannot be decoded, with a warning. It is still an error if
            more than one image, and more than 1% of those that a process reads in an epoch, cannot be decoded.
        seed: Seed of the order and augmentation of the training images.
        split_seed: Seed of the split, ``part`` and ``label_noise``. It is separate from ``seed`` so that runs with
            different seeds are validated on the same images.
        num_workers: Worker processes that make the batches; 0 makes them in the main process.
        cache_bytes: Memory for decoded training images, over all processes together; the validation and the test
            images get as much each.
        cache_dir: Folder for indices and downloads; None is $LIT_SCALE_CACHE, or ~/.cache/lit_scale.

    Raises:
        ValueError: If an argument is out of range; or, when the source is first read, if it does not exist, cannot be
            downloaded, is damaged or too small, has other classes than the validation or test images, or has a class
            outside of ``num_classes``.

    Example:
        >>> data = ImageDataModule("digits", image_size=16, batch_size=8)
        >>> data.prepare_data(); data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape, data.num_classes
        (torch.Size([8, 3, 16, 16]), torch.Size([8]), 10)
    """

    def __init__(
        self,
        source: str | list[str] = "digits",
        *,
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        image_size: int = 32,
        batch_size: int = 128,
        num_classes: int | None = None,
        augmentation: Literal["none", "standard"] = "standard",
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        imbalance: int = 1,
        label_noise: float = 0.0,
        part: tuple[float, float] = (0.0, 1.0),
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        max_val_images: int | None = None,
        skip_broken: bool = False,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        cache_bytes: int = 2**28,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        check_at_least(
            image_size=(image_size, 1),
            num_classes=(num_classes, 1),
            imbalance=(imbalance, 1),
            max_val_images=(max_val_images, 1),
            cache_bytes=(cache_bytes, 0),
        )
        if augmentation not in ("none", "standard"):
            raise ValueError(f"augmentation={augmentation!r}: must be 'none' or 'standard'")
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"mean={mean}, std={std}: must be three numbers each, those of std above 0")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}: must lie between 0 and 1, such as 0.1")
        if not 0 <= test_fraction < 1 - val_fraction:
            raise ValueError(f"test_fraction={test_fraction}: must lie in [0, 1 - val_fraction), such as 0.1")
        if not 0 <= label_noise < 1:
            raise ValueError(f"label_noise={label_noise}: must lie in [0, 1), such as 0.1")
        if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"part={tuple(part)}: must be two shares that rise from 0 to 1, such as (0.0, 0.8)")
        self.source = source
        self.val_source = val_source
        self.test_source = test_source
        self.image_size = image_size
        self.augmentation = augmentation
        self.mean, self.std = tuple(mean), tuple(std)
        self.imbalance = imbalance
        self.label_noise = label_noise
        self.part = tuple(part)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.max_val_images = max_val_images
        self.skip_broken = skip_broken
        self.split_seed = split_seed
        self.cache_bytes = cache_bytes
        self.cache_dir = cache_folder(cache_dir)
        self.train_set: _Images
        self.validation_set: _Images
        self.test_set: _Images | None = None
        self._given_classes = num_classes
        self._sources: dict[str, Source] = {}  # opened sources, by argument
        self._ready = False

    def _open(self, argument: str, *, download: bool = False) -> Source:
        """The source of this argument, opened on first use."""
        if argument not in self._sources:
            given = getattr(self, argument)
            self._sources[argument] = find_source(given, argument, self.cache_dir, download=download)
        return self._sources[argument]

    @property
    def num_classes(self) -> int:
        """Number of classes: the argument, else that of ``source``, which is opened to find it."""
        if self._given_classes is not None:
            return self._given_classes
        if (known := named_classes(self.source)) is not None:
            return known
        source = self._open("source")
        return len(source.class_names) if source.class_names else int(source.labels.max()) + 1

    @property
    def chance_accuracy(self) -> float:
        """Validation accuracy of always predicting the most frequent class of the validation images."""
        return float(np.bincount(self.validation_set.labels).max() / len(self.validation_set))

    # ---- from files to data sets

    def prepare_data(self) -> None:
        given = [name for name in ("val_source", "test_source") if getattr(self, name) is not None]
        for argument in ("source", *given):
            self._open(argument, download=True)

    def setup(self, stage: str | None = None) -> None:
        train = self._open("source")
        rows = np.arange(len(train.labels))
        order = _permutation(len(rows), self.split_seed, "split")
        held_out: dict[str, tuple[Source, npt.NDArray[np.int64]]] = {}
        for name, fraction in (("val", self.val_fraction), ("test", self.test_fraction)):
            if getattr(self, f"{name}_source") is not None:
                held_out[name] = self._all_of(f"{name}_source", train)
            elif fraction:
                count = min(max(1, round(fraction * len(rows))), len(order) - 1)
                held_out[name], order = (train, np.sort(order[:count])), order[count:]
        rows = np.sort(order)
        begin, end = (round(share * len(rows)) for share in self.part)
        rows = rows[np.sort(_permutation(len(rows), self.split_seed, "part")[begin:end])]
        distinct = len(rows)
        rows = _often(train.labels, rows, self.imbalance)
        if distinct < self.batch_size:
            raise ValueError(f"source={self.source!r} is too small: {distinct} images for batch_size={self.batch_size}")
        for source in (train, *(source for source, _ in held_out.values())):
            self._check_labels(source)
        flip = self.source != "digits"
        settings: dict[str, Any] = {"size": self.image_size, "mean": self.mean, "std": self.std}
        settings |= {"skip_broken": self.skip_broken, "cache_bytes": self.cache_bytes}
        augment = _standard(self.image_size, flip) if self.augmentation == "standard" else None
        noisy = _mislabelled(train.labels, self.num_classes, self.label_noise, self.split_seed)
        self.train_set = _Images(train, rows, classes=noisy, augment=augment, train=True, seed=self.seed, **settings)
        for name, (source, own) in held_out.items():
            own = _often(source.labels, own, self.imbalance)
            if self.max_val_images is not None and len(own) > self.max_val_images:
                seed = "validation" if name == "val" else name
                own = own[np.sort(_permutation(len(own), self.split_seed, seed)[: self.max_val_images])]
            images = _Images(source, own, **settings)
            if name == "val":
                self.validation_set = images
            else:
                self.test_set = images
        self._ready = True
        self.go_on()

    def _all_of(self, argument: str, train: Source) -> tuple[Source, npt.NDArray[np.int64]]:
        """All images of a separate source, whose classes must be those of the training images."""
        source = self._open(argument)
        if None not in (train.class_names, source.class_names) and train.class_names != source.class_names:
            raise ValueError(
                f"{argument}={getattr(self, argument)!r} has classes {source.class_names}, but source={self.source!r} "
                f"has {train.class_names}: both need a folder for each class"
            )
        return source, np.arange(len(source.labels))

    def _check_labels(self, source: Source) -> None:
        classes = self.num_classes
        wrong = (source.labels < 0) | (source.labels >= classes)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{source.name(first)} is of class {source.labels[first]}, but num_classes={classes} allows 0 to "
                f"{classes - 1} ({int(wrong.sum())} of {len(wrong)} images): pass num_classes={source.labels.max() + 1}"
                " or mend the labels"
            )

    def _loader(self, dataset: Any, *, shuffle: bool = False, drop_last: bool = False) -> ResumableLoader:
        loader = super()._loader(dataset, shuffle=shuffle, drop_last=drop_last)
        dataset.processes = getattr(loader.sampler, "num_replicas", 1) * max(1, self.num_workers)
        return loader

    def settings(self) -> dict[str, Any] | None:
        """Everything that training batches depend on; None before setup."""
        if not self._ready:
            return None
        names = ("image_size", "batch_size", "augmentation", "imbalance", "label_noise", "seed")
        shares = {"val_fraction": self.val_source, "test_fraction": self.test_source}
        held_out = {name: getattr(self, name) for name, source in shares.items() if source is None}
        return {
            "source": self._open("source").fingerprint,
            **{name: getattr(self, name) for name in names},
            **{name: list(getattr(self, name)) for name in ("mean", "std", "part")},
            **held_out,
            "split_seed": self.split_seed,
        }


def _often(labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], times: int) -> npt.NDArray[np.int64]:
    """The rows, with those of class 0 repeated ``times`` times."""
    return np.repeat(rows, np.where(labels[rows] == 0, times, 1))


def _mislabelled(labels: npt.NDArray[np.int64], classes: int, share: float, seed: int) -> npt.NDArray[np.int64]:
    """The classes of all images, with a share of them replaced by wrong ones."""
    chosen = _permutation(len(labels), seed, "mislabelled")[: round(share * len(labels))]
    generator = torch.Generator().manual_seed(derive_seed(seed, "wrong class"))
    others = torch.randint(1, max(2, classes), (len(chosen),), generator=generator).numpy()  # offsets from true classes
    noisy = labels.copy()
    noisy[chosen] = (noisy[chosen] + others) % classes
    return noisy


def _permutation(size: int, *seed: int | str) -> npt.NDArray[np.int64]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(*seed))).numpy()
