"""Sources by themselves: equal pixels wherever they come from, and messages that name what is wrong."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lit_scale.datamodules.image_sources import UndecodableImageError, find_source, named_classes

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)  # six images of 5 x 4
LABELS = [0, 0, 1, 1, 1, 0]


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        path = tmp_path / "images" / "ab"[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path: Path) -> str:
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            for name, data in ((f"{index}.png", png(pixels)), (f"{index}.cls", b"%d" % label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(tmp_path / "s-0.tar")


def find(source: Any, cache: Path) -> Any:
    return find_source(source, "source", cache)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_pixels_and_labels_are_those_that_were_written(kind: str, request: Any, tmp_path: Path) -> None:
    found = find(str(request.getfixturevalue(kind)), tmp_path / "cache")
    order = sorted(range(6), key=lambda i: (LABELS[i], i)) if kind == "folder" else range(6)  # by class, by name
    assert found.labels.tolist() == [LABELS[i] for i in order]
    for index, own in enumerate(order):
        image = found.image(index)
        assert image.dtype == torch.uint8
        assert torch.equal(image, torch.from_numpy(PIXELS[own]).permute(2, 0, 1))
    assert found.class_names == (["a", "b"] if kind == "folder" else None)


def test_digits_are_scikit_learns_in_grey(tmp_path: Path) -> None:
    found, expected = find("digits", tmp_path), load_digits()
    assert found.labels.tolist() == expected.target.tolist()
    image = found.image(7)
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[0], image[2])
    np.testing.assert_allclose(image[0].numpy() / 255, expected.images[7] / 16, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_any_mode_become_red_green_and_blue(mode: str, folder: Path, tmp_path: Path) -> None:
    ending = "tiff" if mode == "CMYK" else "png"
    Image.fromarray(PIXELS[0]).convert(mode).save(folder / "a" / f"0.{ending}")
    if mode == "CMYK":
        (folder / "a" / "0.png").unlink()
    image = find(str(folder), tmp_path).image(0)
    assert (image.dtype, image.shape) == (torch.uint8, (3, 5, 4))


def test_the_fingerprint_follows_the_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = find(str(folder), tmp_path).fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert find(str(moved), tmp_path).fingerprint == first
    (moved / "a" / "0.png").write_bytes((moved / "a" / "0.png").read_bytes() + b" ")
    changed = find(str(moved), tmp_path).fingerprint
    (moved / "a" / "0.png").rename(moved / "b" / "0.png")
    assert len({first, changed, find(str(moved), tmp_path).fingerprint}) == 3


def test_an_image_that_cannot_be_decoded_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "b" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    found = find(str(folder), tmp_path)
    index = found.paths.index("b/3.png")
    with pytest.raises(UndecodableImageError, match=r"image '.*b/3\.png' cannot be decoded .*: repair or remove it"):
        found.image(index)
    assert found.name(index) == f"image '{folder / 'b' / '3.png'}'"
    assert found.image(0).shape == (3, 5, 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "source='nowhere' is neither a folder nor one of digits, cifar10, cifar100; shards end in .tar"),
        ("empty", "has to hold one folder of images per class"),
        ("tars", r"for its shards, write tars/\*\.tar"),
        ("cifar10", "source='cifar10' cannot be downloaded to .* put torchvision's files there"),
    ],
)
def test_what_is_not_there_is_refused(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        find(source, tmp_path / "cache")


def test_named_sources_tell_their_classes() -> None:
    assert [named_classes(name) for name in ("digits", "cifar10-test", "cifar100")] == [10, 10, 100]
    assert named_classes("a/folder") is None
    assert named_classes(["a.tar"]) is None
