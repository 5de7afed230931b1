import io
import os
import pickle
import runpy
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from lit_scale.datamodules import ResumableLoader, Shards, TextDataModule, shards, write_shards
from lit_scale.datamodules.shards import IMAGES, expand_shards

ROOT = Path(__file__).resolve().parents[2]
Member = tuple[str, bytes]


def tar(path: Path, *members: Member, form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of these members, written by the standard library."""
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 2 * colour % 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, label: int = 0) -> list[Member]:
    return [(f"{key}.png", png(label)), (f"{key}.cls", str(label).encode())]


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Three shards of 5, 7 and 9 samples whose class is their number."""
    number = 0
    for shard, size in enumerate((5, 7, 9)):
        members = []
        for _ in range(size):
            members += sample(f"{number:04d}", number)
            number += 1
        tar(tmp_path / f"train-{shard}.tar", *members)
    return str(tmp_path / "train-{0..2}.tar")


@pytest.fixture
def index(tmp_path: Path) -> Callable[..., Shards]:
    def make(source: str | list[str], **options: Any) -> Shards:
        return Shards(source, cache_dir=tmp_path / "cache", **options)

    return make


# ---- the index


def test_samples_are_those_that_webdataset_reads(pattern: str, index: Callable[..., Shards]) -> None:
    theirs = list(webdataset.WebDataset(pattern, shardshuffle=False, nodesplitter=None, empty_check=False))
    ours = index(pattern, need=[IMAGES, ("cls",)])
    assert len(ours) == len(theirs) == 21
    for number, expected in enumerate(theirs):
        found = ours[number]
        assert found == {name: expected[name] for name in ("__key__", "png", "cls")}
    assert ours.labels.tolist() == list(range(21))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_members_are_told_apart_as_webdataset_does(
    tmp_path: Path, index: Callable[..., Shards], form: int
) -> None:
    long = "folder/" * 12 + "n\u00fcmber" * 4  # more than a plain header holds in GNU's and the POSIX format
    path = tar(
        tmp_path / "x.tar",
        ("__meta__/info.json", b"{}"),
        ("./a.b/one.JPG", b"image"),
        ("./a.b/one.cls", b"1"),
        ("./a.b/one.pickle", b"never read"),
        ("./a.b/one.mask.png", b"another"),
        ("two.json", b"[2]"),
        ("two.txt", b"zwei"),
        *([] if form == tarfile.USTAR_FORMAT else [(f"{long}.txt", b"three")]),
        form=form,
    )
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, nodesplitter=None, empty_check=False))
    found = index(str(path))
    assert [found.key(i) for i in range(len(found))] == [expected["__key__"] for expected in theirs]
    assert [sorted(found[i]) for i in range(2)] == [["__key__", "cls", "jpg"], ["__key__", "json", "txt"]]
    for number, expected in enumerate(theirs):
        assert all(expected[name] == value for name, value in found[number].items())


def test_members_that_would_have_to_be_unpickled_are_never_read(tmp_path: Path, index: Callable[..., Shards]) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = pickle.dumps(Trap())
    names = ("pyd", "pickle", "pkl", "pth", "npy", "npz", "ten")
    path = tar(tmp_path / "x.tar", *sample("a"), *((f"a.{name}", trap) for name in names))
    assert sorted(index(str(path))[0]) == ["__key__", "cls", "png"]
    assert not (tmp_path / "sprung").exists()


def test_the_index_is_kept_until_a_shard_changes(
    pattern: str, index: Callable[..., Shards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[int] = []
    scan = shards._scan

    def noted(paths: Any) -> Any:
        scans.append(len(paths))
        return scan(paths)

    monkeypatch.setattr(shards, "_scan", noted)
    first = index(pattern)
    assert index(pattern)[20] == first[20]
    assert scans == [3]
    tar(tmp_path / "train-1.tar", *sample("new", 7))
    changed = index(pattern)
    assert scans == [3, 3]
    assert (len(changed), changed.key(5), changed.fingerprint) != (len(first), first.key(5), first.fingerprint)
    assert len(changed) == 15
    assert changed[5]["__key__"] == "new"
    with pytest.raises(ValueError, match=r"shard '.*train-1.tar' was changed since it was indexed"):
        first[5]


def test_the_fingerprint_is_of_the_samples_not_of_the_place(
    pattern: str, index: Callable[..., Shards], tmp_path: Path
) -> None:
    before = index(pattern).fingerprint
    (tmp_path / "elsewhere").mkdir()
    for path in expand_shards(pattern):
        path.rename(tmp_path / "elsewhere" / path.name)
    assert index(str(tmp_path / "elsewhere" / "train-*.tar")).fingerprint == before
    assert index(str(tmp_path / "elsewhere" / "train-{0,2}.tar")).fingerprint != before


def test_a_damaged_index_is_made_again(pattern: str, index: Callable[..., Shards], tmp_path: Path) -> None:
    whole = [index(pattern)[number] for number in range(21)]
    for path in sorted((tmp_path / "cache" / "shards").iterdir()):
        path.write_bytes(path.read_bytes()[:-3])
        found = index(pattern)
        assert [found[number] for number in range(21)] == whole


def test_more_shards_than_files_may_be_open(
    pattern: str, index: Callable[..., Shards], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    found = index(pattern)
    for number in (0, 20, 7, 1, 6, 19, 2):
        assert found[number]["cls"] == str(number).encode()
        assert len(found._open) <= 2


# ---- sharing


class Labels(Shards):
    """The class of each sample, with the process that read it."""

    def __getitem__(self, number: int) -> torch.Tensor:  # type: ignore[override]
        info = torch.utils.data.get_worker_info()
        return torch.tensor([int(self.read(number, "cls")), -1 if info is None else info.id])


@pytest.mark.parametrize(
    ("workers", "contexts"),
    [(0, (None, None)), (2, ("fork", "fork")), pytest.param(2, ("spawn", "fork"), marks=pytest.mark.slow)],
)
def test_one_shard_for_two_ranks_with_two_workers(
    tmp_path: Path, workers: int, contexts: tuple[str | None, ...]
) -> None:
    """Fewer shards than processes: equal counts, nothing twice, everything once but for what drop_last leaves."""
    members = [member for number in range(26) for member in sample(f"{number:02d}", number)]
    path = tar(tmp_path / "only.tar", *members)
    dataset = Labels(str(path), cache_dir=tmp_path / "cache")
    parts = []
    for rank, context in enumerate(contexts):
        loader = ResumableLoader(
            dataset,
            4,
            shuffle=True,
            drop_last=True,
            rank=rank,
            world_size=2,
            num_workers=workers,
            multiprocessing_context=context,
            persistent_workers=workers > 0,
        )
        parts.append([torch.cat(list(loader)) for _ in range(2)])
    for one, two in zip(*parts, strict=True):
        assert len(one) == len(two) == 12
        seen = [*one[:, 0].tolist(), *two[:, 0].tolist()]
        assert len(set(seen)) == 24
        assert {*one[:, 1].tolist()} == ({0, 1} if workers else {-1})
    orders = [tuple(epoch[:, 0].tolist()) for part in parts for epoch in part]
    assert len(set(orders)) == len(orders)


def test_workers_that_are_spawned_map_the_index(pattern: str, index: Callable[..., Shards]) -> None:
    found = index(pattern)
    found[0]
    sent = pickle.dumps(found)
    assert len(sent) < 3000
    assert pickle.loads(sent)[20] == found[20]


# ---- what is refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cat x.tar", r"shards 'pipe:cat x.tar': commands are never run"),
        ("pipe:touch {tmp}/sprung", "commands are never run"),
        ("http://host/x-{0..3}.tar", r"shards 'http://host/x-{0\.\.3}.tar': remote files are not read"),
        ("s3://bucket/x.tar", "remote files are not read"),
        ("{tmp}/none-*.tar", r"'.*/none-\*.tar' matches no file"),
        ("{tmp}/train-{0..3}.tar", r"shard '.*/train-3.tar' does not exist \(1 of 4 are missing\)"),
        ("{tmp}/train-{0..2.tar", "[Uu]nbalanced"),
        ([], r"there is no shard"),
        (["{tmp}/train-0.tar", "{tmp}/train-{0..1}.tar"], r"'.*/train-0.tar' is named twice"),
    ],
)
def test_sources_that_cannot_be(
    pattern: str, index: Callable[..., Shards], tmp_path: Path, source: Any, message: str
) -> None:
    def filled(text: str) -> str:
        return text.replace("{tmp}", str(tmp_path))

    with pytest.raises(ValueError, match=message):
        index(filled(source) if isinstance(source, str) else [filled(one) for one in source])
    assert not (tmp_path / "sprung").exists()


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path, index: Callable[..., Shards]) -> None:
    """At every boundary of a member, inside of headers, of contents and of their padding."""
    path = tar(tmp_path / "x.tar", *sample("a"), *sample("b", 1), *sample("c", 2))
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        members = file.getmembers()
        end = file.offset
    cuts = {point for m in members for point in (m.offset, m.offset + 100, m.offset_data, m.offset_data + m.size - 1)}
    cuts |= {m.offset_data + m.size + 1 for m in members} | {end, end + 511}
    for cut in sorted(cuts - {0}):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"shard '.*/x.tar' (is truncated|cannot be read)"):
            index(str(path))
    path.write_bytes(whole[: end + 512])  # the end mark is there: the rest is padding
    assert len(index(str(path))) == 3


def test_a_damaged_header_is_refused(tmp_path: Path, index: Callable[..., Shards]) -> None:
    """The standard library takes a header that it cannot read for the end of the archive."""
    path = tar(tmp_path / "x.tar", *sample("a"), *sample("b"))
    with tarfile.open(path) as file:
        second = file.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[second] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as file:
        assert len(file.getmembers()) == 2  # the control
    with pytest.raises(ValueError, match=r"shard '.*/x.tar' is truncated or damaged: .* at byte \d+"):
        index(str(path))


def test_files_that_are_no_shards(tmp_path: Path, index: Callable[..., Shards]) -> None:
    for name, content, message in (
        ("nothing.tar", b"", "cannot be read .*empty"),
        ("empty.tar", bytes(10240), "is empty: it holds no sample"),
        ("noise.tar", np.random.default_rng(0).bytes(4096), "cannot be read .*not compressed"),
        ("directory.tar", None, "does not exist"),
    ):
        path = tmp_path / name
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"shard '.*/{name}' {message}"):
            index(str(path))
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(ValueError, match=r"packed.tar.gz' cannot be read .*not compressed"):
        index(str(tmp_path / "packed.tar.gz"))


def test_samples_that_lack_a_member(tmp_path: Path, index: Callable[..., Shards]) -> None:
    path = str(tar(tmp_path / "x.tar", *sample("a"), ("b.png", png()), ("c.cls", b"1"), ("d.wav", b"")))
    assert len(index(path)) == 4
    with pytest.raises(ValueError, match=r"sample 'b' of shard '.*/x.tar' has no cls member, only png \(2 of 4"):
        index(path, need=[("cls",)])
    with pytest.raises(ValueError, match=r"sample 'c' of shard '.*' has no jpg or jpeg or png member, only cls"):
        index(path, need=[IMAGES])
    with pytest.raises(ValueError, match=r"sample 'b' of shard .* has no cls or txt member"):
        index(path).read(1, "cls", "txt")


def test_members_twice(tmp_path: Path, index: Callable[..., Shards]) -> None:
    with pytest.raises(ValueError, match=r"shard '.*/x.tar' has two members a.cls"):
        index(str(tar(tmp_path / "x.tar", *sample("a"), ("a.cls", b"1"))))


@pytest.mark.parametrize("label", [b"", b"cat", b"1.5", b"9" * 30])
def test_classes_that_are_no_numbers(tmp_path: Path, index: Callable[..., Shards], label: bytes) -> None:
    path = str(tar(tmp_path / "x.tar", *sample("a"), ("b.png", png()), ("b.cls", label)))
    with pytest.raises(ValueError, match=r"sample 'b' of shard '.*/x.tar': its cls member is b'.*', not the number"):
        _ = index(path).labels
    path = str(tar(tmp_path / "y.tar", ("a.cls", b" 12\n"), ("b.cls", b"-1")))
    assert index(path).labels.tolist() == [12, -1]


def test_a_shard_that_goes_away(pattern: str, index: Callable[..., Shards], tmp_path: Path) -> None:
    found = index(pattern)
    (tmp_path / "train-0.tar").unlink()
    assert found[20]["cls"] == b"20"
    with pytest.raises(ValueError, match=r"shard '.*/train-0.tar' cannot be opened any more"):
        found[0]
    os.truncate(tmp_path / "train-2.tar", 700)  # it is open
    with pytest.raises(ValueError, match=r"shard '.*/train-2.tar' ends early"):
        found[20]


# ---- text


def test_text_in_shards(tmp_path: Path, tiny_corpus: Path) -> None:
    texts = [path.read_bytes() for path in sorted(tiny_corpus.iterdir())]
    for shard in range(2):
        tar(tmp_path / f"t-{shard}.tar", *((f"{i}.txt", text) for i, text in enumerate(texts) if i % 2 == shard))

    def settings(corpus: str | list[str]) -> Any:
        data = TextDataModule(corpus, batch_size=4, cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        data.setup("fit")
        return data.settings()

    assert settings(str(tmp_path / "t-{0..1}.tar")) == settings(str(tiny_corpus))
    assert settings([str(tmp_path / "t-0.tar"), str(tmp_path / "t-1.tar")]) == settings(str(tiny_corpus))


def test_text_in_shards_that_cannot_be(tmp_path: Path) -> None:
    def read(corpus: str) -> None:
        TextDataModule(corpus, cache_dir=str(tmp_path / "cache")).prepare_data()

    latin = tar(tmp_path / "latin.tar", ("a.txt", b"fine"), ("b.txt", b"\xe9t\xe9"))
    with pytest.raises(ValueError, match=r"the text of sample 'b' of shard '.*/latin.tar' .* not UTF-8"):
        read(str(latin))
    with pytest.raises(ValueError, match=r"sample 'a' of shard '.*' has no txt member, only png, cls"):
        read(str(tar(tmp_path / "images.tar", *sample("a"))))
    with pytest.raises(ValueError, match=r"shard '.*/none.tar' does not exist"):
        read(str(tmp_path / "none.tar"))
    with pytest.raises(ValueError, match="commands are never run"):
        read("pipe:cat x.tar")
    with pytest.raises(ValueError, match="remote files are not read"):
        read("https://host/x-{0..3}.tar")


# ---- writing


def pictures(count: int) -> list[tuple[Image.Image, int]]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    return [(Image.fromarray(array), number % 3) for number, array in enumerate(pixels)]


def test_what_is_written_is_read_back(tmp_path: Path, index: Callable[..., Shards]) -> None:
    images = pictures(11)
    seen: list[Path] = []
    written = write_shards(images, tmp_path / "100% new", samples_per_shard=4, name="val", progress=seen.append)
    assert written == seen == sorted((tmp_path / "100% new").iterdir())
    assert [path.name for path in written] == [f"val-{number:06d}.tar" for number in range(3)]
    urls = list(map(str, written))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, empty_check=False).decode("pil"))
    ours = index([str(path) for path in written])
    assert len(theirs) == len(ours) == 11
    for number, (image, label) in enumerate(images):
        for data in (theirs[number]["png"].tobytes(), Image.open(io.BytesIO(ours[number]["png"])).tobytes()):
            assert data == image.tobytes()
        assert theirs[number]["cls"] == ours.labels[number] == label
    again = write_shards(images, tmp_path / "again", samples_per_shard=4, name="val")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_files_stay_as_they_are(tmp_path: Path, index: Callable[..., Shards]) -> None:
    image = pictures(1)[0][0]
    for name in ("a.jpg", "b.PNG", "c.bmp"):
        image.save(tmp_path / name)
    paths = [tmp_path / name for name in ("a.jpg", "b.PNG", "c.bmp")]
    (path,) = write_shards([(path, 1) for path in paths], tmp_path / "out")
    found = index(str(path))
    assert found[0]["jpg"] == paths[0].read_bytes()
    assert found[1]["png"] == paths[1].read_bytes()
    assert Image.open(io.BytesIO(found[2]["png"])).tobytes() == image.tobytes()


def test_half_a_shard_is_none(tmp_path: Path) -> None:
    def failing() -> Any:
        yield from pictures(5)
        raise RuntimeError("out of images")

    with pytest.raises(RuntimeError, match="out of images"):
        write_shards(failing(), tmp_path / "out", samples_per_shard=3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard=0: must be at least 1"),
        ({"form": "gif"}, "form='gif': must be 'png' or 'jpg'"),
        ({"name": "a/b"}, "name='a/b': must be the beginning of a file name"),
        ({"name": "x{1}"}, r"name='x\{1\}'"),
        ({"samples": []}, "there is no sample to write"),
        ({"name": "old"}, r"'.*/old-000000.tar' is there already"),
    ],
)
def test_writing_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_shards(pictures(1), tmp_path, name="old")
    with pytest.raises(ValueError, match=message):
        write_shards(options.pop("samples", pictures(2)), tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["old-000000.tar"]


def test_the_script_writes_a_folder(
    tmp_path: Path, index: Callable[..., Shards], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["write_shards.py", *map(str, args)])
        runpy.run_path(str(ROOT / "recipes" / "write_shards.py"), run_name="__main__")
        return capsys.readouterr().out

    for number, (image, label) in enumerate(pictures(7)):
        path = tmp_path / "pictures" / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    said = run(tmp_path / "pictures", tmp_path / "out", "--samples-per-shard=5", "--name=x")
    assert "class 2: class2" in said
    assert f"2 shards: read them with --data.source '{tmp_path}/out/x-*.tar'" in said
    found = index(str(tmp_path / "out" / "x-{000000..000001}.tar"))
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    assert [found[number]["png"] for number in range(7)] == [path.read_bytes() for path in files]
    assert [f"class{label}" for label in found.labels] == [path.parent.name for path in files]

    for args, message in (
        ((tmp_path / "pictures", tmp_path / "out", "--name=x"), "write_shards: '.*' is there already"),
        (("nowhere", tmp_path / "new"), "write_shards: 'nowhere' is neither a folder nor one of cifar10"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*args)
