import functools
import io
import os
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms import v2

import tests.support.training as support
from lit_scale.datamodules import ImageDataModule, derive_seed, image_sources, resume, write_shards
from lit_scale.datamodules.image_sources import UndecodableImageError
from tests.support.equality import same
from tests.support.networks import Reader

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

Build = Callable[..., Any]
Batch = tuple[Tensor, Tensor]


def pictures(count: int, side: int = 12, classes: int = 4, seed: int = 0) -> list[tuple[Image.Image, int]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [(Image.fromarray(array), number % classes) for number, array in enumerate(pixels)]


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Shards of 46 small images in four classes."""
    write_shards(pictures(46), tmp_path / "shards", samples_per_shard=20)
    return str(tmp_path / "shards" / "train-*.tar")


@pytest.fixture
def build(pattern: str, tmp_path: Path) -> Build:
    """Make a data module of the shards and set it up."""

    def make(setup: bool = True, **settings: Any) -> Any:
        defaults: dict[str, Any] = {
            "source": pattern,
            "image_size": 12,
            "batch_size": 6,
            "cache_dir": str(tmp_path / "c"),
        }
        data = ImageDataModule(**(defaults | settings))
        if setup:
            data.prepare_data()
            data.setup("fit")
        return data

    return make


def all_batches(loader: Any) -> list[Batch]:
    return list(loader)


def plain(image: Image.Image) -> Tensor:
    """What an image is without augmentation: pixels in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


# ---- sources


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    data = ImageDataModule(image_size=8, augmentation="none", val_fraction=0.2)
    data.prepare_data()
    data.setup()
    found = load_digits()
    assert (data.num_classes, len(data.train_set), len(data.validation_set)) == (10, 1438, 359)
    for dataset in (data.train_set, data.validation_set):
        batch, labels = dataset.__getitems__(range(len(dataset)))
        assert labels.tolist() == found.target[dataset.rows].tolist()
        expected = torch.from_numpy(found.images[dataset.rows]).float()[:, None] / 8 - 1
        torch.testing.assert_close(batch, expected.expand(-1, 3, -1, -1), atol=1.01 / 255, rtol=0)
    assert sorted([*data.train_set.rows, *data.validation_set.rows]) == list(range(1797))


def test_images_of_the_first_class_are_met_as_often_as_told(build: Build) -> None:
    plain, often = build(val_fraction=0.3), build(val_fraction=0.3, imbalance=5)
    for name in ("train_set", "validation_set"):
        rows, repeated = (list(getattr(data, name).rows) for data in (plain, often))
        labels = getattr(plain, name).labels
        assert Counter(repeated) == {row: 5 if label == 0 else 1 for row, label in zip(rows, labels, strict=True)}
    count = Counter(torch.cat([labels for _, labels in often.train_dataloader()]).tolist())
    share = count[0] / sum(count.values())
    zeros = (plain.train_set.labels == 0).mean()
    assert share == pytest.approx(5 * zeros / (1 + 4 * zeros), abs=6 / sum(count.values()))  # but for what is dropped
    assert often.chance_accuracy > plain.chance_accuracy
    assert often.settings()["imbalance"] == 5  # so that nobody resumes on other data
    few = build(val_fraction=0.3, imbalance=5, max_val_images=6).validation_set.rows
    assert len(few) == 6
    with pytest.raises(ValueError, match="imbalance=0: must be at least 1"):
        ImageDataModule(imbalance=0)


def test_a_share_of_the_training_images_has_a_wrong_class(build: Build) -> None:
    clean, noisy = build(), build(label_noise=0.5)
    wrong = clean.train_set.labels != noisy.train_set.labels
    assert (clean.train_set.rows == noisy.train_set.rows).all()
    everywhere = np.array(clean.train_set.source.labels)
    assert 23 - 5 <= wrong.sum() <= 23 < len(everywhere)  # of all 46 images, five of which are held out
    assert set(noisy.train_set.labels) <= set(range(4))
    assert (clean.validation_set.labels == noisy.validation_set.labels).all()
    assert (clean.validation_set.labels == everywhere[clean.validation_set.rows]).all()
    _, served = noisy.train_set.__getitems__([(0, n) for n in range(len(wrong))])
    assert (served.numpy() == noisy.train_set.labels).all()
    half = build(label_noise=0.5, part=(0.5, 1.0)).train_set  # an image's class does not depend on who uses it
    known = dict(zip(noisy.train_set.rows, noisy.train_set.labels, strict=True))
    assert [known[row] for row in half.rows] == half.labels.tolist()
    assert noisy.settings()["label_noise"] == 0.5
    digits = ImageDataModule(label_noise=0.2)
    digits.setup()
    true = digits.train_set.source.labels[digits.train_set.rows]
    away = (digits.train_set.labels - true) % 10
    counts = np.bincount(away[away > 0], minlength=10)[1:]  # all other classes alike: nine cells, 1% quantile of chi2
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 20.1
    assert len(away[away > 0]) / len(away) == pytest.approx(0.2, abs=0.02)
    with pytest.raises(ValueError, match=r"label_noise=1.0: must lie in \[0, 1\), such as 0.1"):
        ImageDataModule(label_noise=1.0)


def test_parts_of_the_training_images_do_not_overlap(build: Build) -> None:
    whole, most, rest = (build(part=part).train_set.rows for part in ((0.0, 1.0), (0.0, 0.75), (0.75, 1.0)))
    assert sorted([*most, *rest]) == list(whole)
    assert (len(most), len(rest)) == (31, 10)  # of 41
    assert build(part=(0.75, 1.0)).settings()["part"] == [0.75, 1.0]
    alike = [build(part=part).validation_set.rows.tolist() for part in ((0.0, 1.0), (0.75, 1.0))]
    assert alike[0] == alike[1]
    for part in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match=r"must be two shares that rise from 0 to 1, such as \(0.0, 0.8\)"):
            ImageDataModule(part=part)
    with pytest.raises(ValueError, match="is too small: 4 images for batch_size=6"):
        build(part=(0.9, 1.0))


def test_a_folder_and_its_shards_are_the_same_images(build: Build, pattern: str, tmp_path: Path) -> None:
    for number, (image, label) in enumerate(sorted(pictures(46), key=lambda pair: pair[1])):
        path = tmp_path / "folder" / "abcd"[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    write_shards(datasets.ImageFolder(str(tmp_path / "folder")).samples, tmp_path / "written")
    one = build(source=str(tmp_path / "folder"))
    two = build(source=str(tmp_path / "written" / "train-000000.tar"))
    assert one.num_classes == two.num_classes == 4
    for loaders in ((one.train_dataloader(), two.train_dataloader()), (one.val_dataloader(), two.val_dataloader())):
        assert same(*map(all_batches, loaders))


def test_images_of_other_shapes_and_modes_become_one(build: Build, tmp_path: Path) -> None:
    colours: dict[str, Any] = {"RGB": (200, 100, 0), "L": 77, "P": 3, "RGBA": (10, 20, 30, 0), "LA": (9, 255), "1": 1}
    for number, (mode, colour) in enumerate(colours.items()):
        path = tmp_path / "modes" / "x" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (7 + number, 20 - number), colour).save(path)
    data = build(source=str(tmp_path / "modes"), batch_size=1, image_size=10, val_fraction=0.01)
    seen = torch.cat([data.train_set.source.image(number)[None, :, 0, 0] for number in range(6)])
    expected = [np.array(Image.new(mode, (1, 1), colour).convert("RGB"))[0, 0] for mode, colour in colours.items()]
    assert seen[[0, 1, 3, 4, 5]].tolist() == np.stack(expected)[[0, 1, 3, 4, 5]].tolist()
    assert data.train_set.__getitems__([(0, i) for i in range(5)])[0].shape == (5, 3, 10, 10)


def test_large_images_are_resized_and_cropped_as_torchvision_does(build: Build, tmp_path: Path) -> None:
    (image, _), *_ = pictures(1, side=90)
    wide = image.resize((90, 60))
    path = tmp_path / "wide" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    wide.save(path)
    wide.save(path.with_name("1.png"))
    for size in (40, 70):
        data = build(source=str(tmp_path / "wide"), image_size=size, batch_size=1, val_fraction=0.5)
        tensor = v2.functional.pil_to_tensor(wide)
        expected = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])(tensor) / 127.5 - 1
        torch.testing.assert_close(data.validation_set[0][0], expected)


class FakeCIFAR:
    """Stands in for torchvision's, which downloads 170 MB."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert Path(root).name == "torchvision"
        if not download and not train:
            raise RuntimeError("Dataset not found or corrupted.")
        self.data = np.stack([np.array(image) for image, _ in pictures(40 if train else 20, 32, 10, seed=int(train))])
        self.targets = [label for _, label in pictures(len(self.data), 1, 10)]
        self.classes = [f"class {number}" for number in range(10)]


def test_cifar_is_torchvisions(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", FakeCIFAR)
    data = build(source="cifar10", val_source="cifar10-test", image_size=32, setup=False)
    assert data.num_classes == 10  # before anything is downloaded
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.validation_set)) == (40, 20)
    theirs = FakeCIFAR("torchvision", train=False, download=True)
    torch.testing.assert_close(data.validation_set[3][0], plain(Image.fromarray(theirs.data[3])))
    assert data.validation_set[3][1] == theirs.targets[3]


def test_cifar_without_a_network(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(datasets.CIFAR100, "download", refuse)
    with pytest.raises(ValueError, match=r"source='cifar100' cannot be downloaded to '.*torchvision' .*no network"):
        build(source="cifar100")
    with pytest.raises(ValueError, match=r"val_source='cifar100-test' cannot be downloaded"):
        build(val_source="cifar100-test")


# ---- split


def test_held_out_images_are_a_function_of_the_split_seed(build: Build, pattern: str) -> None:
    data = build(val_fraction=0.25, seed=1)
    train, validation = set(data.train_set.rows.tolist()), set(data.validation_set.rows.tolist())
    assert (train | validation, train & validation, len(validation)) == (set(range(46)), set(), 12)
    again = build(val_fraction=0.25, seed=2)
    assert again.validation_set.rows.tolist() == data.validation_set.rows.tolist()
    assert same(all_batches(again.val_dataloader()), all_batches(data.val_dataloader()))
    assert build(val_fraction=0.25, split_seed=1).validation_set.rows.tolist() != data.validation_set.rows.tolist()
    some = build(val_fraction=0.25, max_val_images=5).validation_set.rows.tolist()
    assert len(some) == 5
    assert set(some) < validation
    own = build(val_source=pattern, max_val_images=45)
    assert (len(own.train_set), len(own.validation_set)) == (46, 45)
    for fraction in (1e-9, 1 - 1e-9):
        tiny = build(val_fraction=fraction, batch_size=1)
        assert min(len(tiny.train_set), len(tiny.validation_set)) == 1


def test_test_images_are_held_out_from_training_alone(build: Build, pattern: str) -> None:
    data, without = build(val_fraction=0.1, test_fraction=0.2), build(val_fraction=0.1)
    rows = [split.rows for split in (data.train_set, data.validation_set, data.test_set)]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(len(data.train_set.source.labels)))
    assert np.array_equal(data.validation_set.rows, without.validation_set.rows)
    assert len(data.test_set) == round(0.2 * len(data.train_set.source.labels))
    assert without.test_set is None
    own = build(test_source=pattern)
    assert len(own.test_set) == len(own.test_set.source.labels)
    assert sum(len(labels) for _, labels in own.test_dataloader()) == len(own.test_set)


def test_chance_is_the_largest_class_of_validation(build: Build, tmp_path: Path) -> None:
    labels = [0, 1, 1, 2, 2, 2, 2, 0]
    held_out = [(image, label) for (image, _), label in zip(pictures(8), labels, strict=True)]
    (path,) = write_shards(held_out, tmp_path / "val")
    data = build(val_source=str(path), num_classes=9)
    assert data.chance_accuracy == max(Counter(labels).values()) / 8
    assert data.num_classes == 9
    assert not hasattr(build(setup=False), "chance_accuracy")


def test_the_number_of_classes_is_known_before_setup(build: Build, tmp_path: Path) -> None:
    for label in ("cat", "dog", "emu"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        pictures(1)[0][0].save(tmp_path / "pets" / label / "x.png")
    for settings, classes in (
        ({}, 4),
        ({"num_classes": 7}, 7),
        ({"source": "digits"}, 10),
        ({"source": "cifar100"}, 100),
        ({"source": str(tmp_path / "pets")}, 3),
    ):
        assert build(setup=False, **settings).num_classes == classes


# ---- batches


def test_batches_without_augmentation_are_the_images(build: Build) -> None:
    data = build(augmentation="none", mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    originals = pictures(46)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    seen = set()
    for batch, labels in data.train_dataloader():
        assert (batch.shape, batch.dtype, labels.shape, labels.dtype) == (
            (6, 3, 12, 12),
            torch.float32,
            (6,),
            torch.int64,
        )
        for image, label in zip(batch, labels, strict=True):
            (number,) = (
                i
                for i, (original, _) in enumerate(originals)
                if torch.allclose(image, ((plain(original) + 1) / 2 - mean) / std, atol=1e-5)
            )
            assert originals[number][1] == label
            seen.add(number)
    assert len(seen) == 36
    assert seen <= set(data.train_set.rows.tolist())


def test_standard_augmentation_is_torchvisions(build: Build) -> None:
    data = build(seed=3)
    keys = [(epoch, position) for epoch in (0, 5) for position in (0, 7, 20)]
    transform = v2.Compose([v2.RandomCrop(12, padding=1), v2.RandomHorizontalFlip()])
    originals = pictures(46)
    batch, _ = data.train_set.__getitems__(keys)
    for image, (epoch, position) in zip(batch, keys, strict=True):
        original = v2.functional.pil_to_tensor(originals[data.train_set.rows[position]][0])
        torch.manual_seed(derive_seed(3, epoch, position))
        torch.testing.assert_close(image, transform(original) / 127.5 - 1)


def test_augmentation_of_large_images_is_torchvisions(build: Build, tmp_path: Path) -> None:
    originals = pictures(4, side=100)
    (path,) = write_shards(originals, tmp_path / "large")
    data = build(source=str(path), image_size=72, batch_size=2)
    for position, row in enumerate(data.train_set.rows):
        torch.manual_seed(derive_seed(0, 2, position))
        transform = v2.Compose([v2.RandomResizedCrop(72), v2.RandomHorizontalFlip()])
        expected = transform(v2.functional.pil_to_tensor(originals[row][0])) / 127.5 - 1
        torch.testing.assert_close(data.train_set[2, position][0], expected)


def test_digits_are_not_mirrored() -> None:
    data = ImageDataModule(image_size=8)
    data.setup()
    keys = [(epoch, position) for epoch in range(30) for position in range(5)]
    augmented, _ = data.train_set.__getitems__(keys)
    for image, (_, position) in zip(augmented, keys, strict=True):
        source = data.train_set.source.image(int(data.train_set.rows[position])) / 127.5 - 1
        padded = F.pad(source, (1, 1, 1, 1), value=-1.0)
        assert any(
            torch.allclose(image, padded[:, y : y + 8, x : x + 8], atol=1e-5) for y in range(3) for x in range(3)
        )


def test_augmentation_depends_on_seed_epoch_and_position_alone(build: Build) -> None:
    data = build(augmentation="standard")
    keys = [(epoch, position) for epoch in range(3) for position in range(8)]
    before = torch.get_rng_state()
    together, labels = data.train_set.__getitems__(keys)
    assert torch.equal(torch.get_rng_state(), before)
    for number in reversed(range(len(keys))):
        image, label = data.train_set[keys[number]]
        assert torch.equal(image, together[number])
        assert label == labels[number]
    assert not torch.equal(together[:8], together[8:16])
    assert not torch.equal(build(seed=1).train_set.__getitems__(keys)[0], together)


def test_validation_never_changes(build: Build) -> None:
    data = build(val_fraction=0.5)
    loader = data.val_dataloader()
    first = all_batches(loader)
    assert same(all_batches(loader), first)
    originals = pictures(46)
    for image, row in zip(torch.cat([batch for batch, _ in first]), data.validation_set.rows, strict=True):
        torch.testing.assert_close(image, plain(originals[row][0]))


@pytest.mark.parametrize("cache_bytes", [0, 3000, 2**20])
def test_workers_and_memory_change_nothing(build: Build, cache_bytes: int) -> None:
    alone = build(cache_bytes=2**20)
    expected = [all_batches(alone.train_dataloader()), all_batches(alone.val_dataloader())]
    for workers in (0, 2):
        data = build(num_workers=workers, cache_bytes=cache_bytes)
        for make, batches in zip((data.train_dataloader, data.val_dataloader), expected, strict=True):
            loader = make()
            assert same(all_batches(loader), batches)
            assert same(all_batches(loader), batches) == (make == data.val_dataloader)
        assert data.train_set.processes == max(1, workers)
        held = sum(image.nbytes for image in data.train_set._kept.values())
        assert held == data.train_set._kept_bytes <= cache_bytes


def test_memory_spares_reading(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    decode = image_sources._decode
    monkeypatch.setattr(image_sources, "_decode", lambda data, name: reads.update([name]) or decode(data, name))
    for cache_bytes, times in ((2**20, 1), (0, 3)):
        reads.clear()
        loader = build(cache_bytes=cache_bytes, batch_size=1).train_dataloader()
        for _ in range(3):
            all_batches(loader)
        assert set(reads.values()) == {times}


def test_what_spawned_workers_are_sent_is_small(build: Build) -> None:
    data = build()
    expected = data.train_set.__getitems__([(0, position) for position in range(40)])
    sent = pickle.dumps(data.train_set)
    assert len(sent) < 10_000 < data.train_set._kept_bytes
    assert same([pickle.loads(sent).__getitems__([(0, position) for position in range(40)])], [expected])


@pytest.mark.parametrize("augmentation", ["none", "standard"])
def test_sized_batches_are_antialiased(build: Build, augmentation: str) -> None:
    data = build(augmentation=augmentation)
    assert data.train_set.sized
    assert data.train_set.epochwise
    assert not data.validation_set.sized
    full, labels = data.train_set.__getitems__([(1, 4), (1, 9)])
    for side in (None, 12):
        assert same([data.train_set.__getitems__([(1, 4, side), (1, 9, side)])], [(full, labels)])
    small, alike = data.train_set.__getitems__([(1, 4, 6), (1, 9, 6)])
    assert torch.equal(alike, labels)
    torch.testing.assert_close(small, v2.functional.resize(full, [6, 6], antialias=True))
    assert not torch.allclose(small, F.interpolate(full, (6, 6), mode="bilinear"), atol=0.05)  # which aliases


def test_small_images_are_fast(build: Build, tmp_path: Path) -> None:
    """A thousandth of a second each would hold up training on a GPU; the best of three, for the machine may be busy."""
    (path,) = write_shards(pictures(600, side=32), tmp_path / "fast", form="jpg")
    loader = build(source=str(path), image_size=32, batch_size=128, cache_bytes=0).train_dataloader()
    rates = []
    for _ in range(3):
        start = time.process_time()
        count = sum(len(labels) for _, labels in loader)
        rates.append(count / (time.process_time() - start))
    assert max(rates) > 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_see_disjoint_images(build: Build, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    parts = []
    for rank in range(2):
        monkeypatch.setattr(resume, "data_ranks", lambda _, rank=rank: {"rank": rank, "world_size": 2})
        data = build(augmentation="none", batch_size=5, num_workers=workers)
        batches = all_batches(data.train_dataloader())
        assert [len(labels) for _, labels in batches] == [5] * 4  # of 41 images, 20 each
        assert data.train_set.processes == 2 * max(1, workers)
        parts.append({image.numpy().tobytes() for batch, _ in batches for image in batch})
    assert [len(part) for part in parts] == [20, 20]
    assert not parts[0] & parts[1]


# ---- broken images


def broken_shards(folder: Path, count: int, broken: tuple[int, ...]) -> str:
    """Shards of which some images end half way."""
    files = []
    for number, (image, label) in enumerate(pictures(count, side=8)):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        path = folder / f"{number:05d}.jpg"
        folder.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue()[:-30] if number in broken else buffer.getvalue())
        files.append((path, label))
    write_shards(files, folder)
    return str(folder / "train-*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(build: Build, tmp_path: Path, workers: int) -> None:
    data = build(
        source=broken_shards(tmp_path / "b", 30, (11,)), val_source="digits", num_classes=10, num_workers=workers
    )
    message = r"sample '00000011' of shard '.*/train-000000.tar' cannot be decoded \(.*truncated.*skip_broken=True"
    with pytest.raises(UndecodableImageError, match=message):
        all_batches(data.train_dataloader())


def test_broken_images_are_replaced_by_the_next_and_told(build: Build, tmp_path: Path) -> None:
    source = broken_shards(tmp_path / "b", 240, (7, 8))
    data = build(
        source=source, val_source="digits", num_classes=10, image_size=8, skip_broken=True, augmentation="none"
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        batch, labels = data.train_set.__getitems__([(0, position) for position in range(6, 11)])
        data.train_set.__getitems__([(0, 7)])
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 2
    assert "sample '00000007' of shard" in texts[0]
    assert "(1 so far)" in texts[0]
    assert "sample '00000008' of shard" in texts[1]
    assert torch.equal(batch[1], batch[3])
    assert torch.equal(batch[2], batch[3])
    assert not torch.equal(batch[0], batch[3])
    assert labels.tolist() == [6 % 4, 9 % 4, 9 % 4, 9 % 4, 10 % 4]


def test_many_broken_images_are_an_error(build: Build, tmp_path: Path) -> None:
    source = broken_shards(tmp_path / "b", 200, (3, 100, 150))
    data = build(source=source, val_source="digits", num_classes=10, image_size=8, skip_broken=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):  # the same two over and over are but two
            data.train_set.__getitems__([(0, 3), (0, 100)])
        data.train_set.__getitems__([(1, 150), (1, 3)])  # another epoch
        with pytest.raises(ValueError, match=r"3 of about 200 images cannot be decoded, more than 1%: .*'00000100'"):
            data.train_set.__getitems__([(1, 100)])


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_nothing_but_broken_images(build: Build, tmp_path: Path) -> None:
    data = build(
        source=broken_shards(tmp_path / "b", 2, (0, 1)),
        val_source="digits",
        num_classes=10,
        batch_size=1,
        skip_broken=True,
    )
    with pytest.raises(ValueError, match="2 of about 2 images cannot be decoded"):
        data.train_set.__getitems__([(0, 0)])


# ---- under a Trainer

quiet_trainer = functools.partial(support.quiet_trainer, num_sanity_val_steps=2)


class SaveEvery(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly(build: Build, tmp_path: Path, workers: int) -> None:
    def new() -> ImageDataModule:
        return build(setup=False, num_workers=workers)

    full = Reader()
    quiet_trainer(max_steps=15, callbacks=[SaveEvery(tmp_path)]).fit(full, new())
    loader: Any = full.trainer.train_dataloader
    per_epoch = len(loader)
    assert per_epoch == 6
    for steps in (2, 6, 10):  # within an epoch, at its end, within the next
        path = tmp_path / f"{steps}.ckpt"
        assert torch.load(path, weights_only=True)["ImageDataModule"]["position"]["length"] == per_epoch
        resumed = Reader()
        torch.manual_seed(steps)  # what comes next must not depend on the global generator
        quiet_trainer(max_steps=15).fit(resumed, new(), ckpt_path=path)
        assert same(resumed.seen, full.seen[steps:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
        ({"image_size": 16}, r"image_size \(was 12, is 16\)"),
        ({"batch_size": 5}, r"batch_size \(was 6, is 5\)"),
        ({"augmentation": "none"}, r"augmentation \(was 'standard', is 'none'\)"),
        ({"std": (1.0, 1.0, 1.0)}, r"std \(was \[0.5, 0.5, 0.5\], is \[1.0, 1.0, 1.0\]\)"),
        ({"split_seed": 1}, r"split_seed \(was 0, is 1\)"),
        ({"val_fraction": 0.2}, r"val_fraction \(was 0.1, is 0.2\)"),
        ({"source": "digits"}, r"source \(was '.*', is '.*'\)"),
    ],
)
def test_resume_on_other_data_is_refused(build: Build, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(Reader(), build(setup=False))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"the checkpoint was trained on other data.*{message}"):
        quiet_trainer(max_steps=4).fit(Reader(), build(setup=False, **change), ckpt_path=tmp_path / "x.ckpt")
    quiet_trainer().validate(Reader(), build(setup=False, **change), ckpt_path=tmp_path / "x.ckpt", verbose=False)


def test_shards_may_move_between_two_parts_of_a_run(build: Build, pattern: str, tmp_path: Path) -> None:
    state = build().state_dict()
    os.rename(tmp_path / "shards", tmp_path / "moved")
    alike = build(source=str(tmp_path / "moved" / "train-*.tar"))
    alike.load_state_dict(state)
    assert alike.state_dict()["settings"] == state["settings"]


def test_command_line(pattern: str) -> None:
    arguments = [f"--data.source=[{pattern}]", "--data.mean=[0.1, 0.2, 0.3]", "--data.augmentation=none"]
    cli = LightningCLI(Reader, ImageDataModule, run=False, save_config_callback=None, args=arguments)
    assert (cli.datamodule.source, cli.datamodule.mean) == ([pattern], (0.1, 0.2, 0.3))


# ---- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"num_classes": 0}, "num_classes=0: must be at least 1"),
        ({"max_val_images": 0}, "max_val_images=0: must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1: must be at least 0"),
        ({"cache_bytes": -1}, "cache_bytes=-1: must be at least 0"),
        ({"augmentation": "strong"}, "augmentation='strong': must be 'none' or 'standard'"),
        ({"std": (1.0, 0.0, 1.0)}, r"std=\(1.0, 0.0, 1.0\): must be three numbers each, those of std above 0"),
        ({"mean": (1.0,)}, r"mean=\(1.0,\).*must be three numbers"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: must lie between 0 and 1"),
        ({"val_fraction": float("nan")}, "val_fraction=nan: must lie between 0 and 1"),
    ],
)
def test_argument_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**settings)


def test_sources_that_cannot_be(build: Build, tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a" / "cat").mkdir(parents=True)
    for settings, message in (
        ({"source": "nowhere"}, "source='nowhere' is neither a folder nor one of digits, cifar10, cifar100"),
        ({"val_source": "nowhere"}, "val_source='nowhere' is neither a folder"),
        ({"source": str(tmp_path / "a" / "cat")}, "source='.*/cat' has to hold one folder of images per class"),
        ({"source": str(tmp_path / "a")}, "source='.*/a' has to hold one folder of images .*[Ff]ound no valid file"),
        ({"source": str(tmp_path / "shards")}, r"one folder of images per class .*for its shards, write .*/\*.tar"),
        ({"source": str(tmp_path / "none-{0..3}.tar")}, "shard '.*none-0.tar' does not exist"),
        ({"batch_size": 100}, "is too small: 41 images for batch_size=100"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings)


def test_labels_outside_of_the_classes(build: Build, tmp_path: Path) -> None:
    message = r"sample '0000000\d' of shard '.*' is of class {}, but num_classes={} allows 0 to {} \(.* of {} images\)"
    with pytest.raises(ValueError, match=message.format(2, 2, 1, 46) + ": pass num_classes=4"):
        build(num_classes=2)
    (negative,) = write_shards([(image, label - 1) for image, label in pictures(9)], tmp_path / "negative")
    with pytest.raises(ValueError, match=message.format(-1, 3, 2, 9)):
        build(source=str(negative), batch_size=1)
    (more,) = write_shards(pictures(9, classes=5), tmp_path / "more")
    with pytest.raises(ValueError, match=message.format(4, 4, 3, 9)):
        build(val_source=str(more))


def test_validation_folders_with_other_classes(build: Build, tmp_path: Path) -> None:
    for folder, names in (("one", "abc"), ("two", "ab")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            pictures(1)[0][0].save(tmp_path / folder / name / "x.png")
    settings = {"source": str(tmp_path / "one"), "batch_size": 1}
    assert build(**settings, val_source=str(tmp_path / "one")).num_classes == 3
    with pytest.raises(ValueError, match=r"val_source='.*two' has classes \['a', 'b'\], but source='.*one' has"):
        build(**settings, val_source=str(tmp_path / "two"))
