import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from lit_scale.datamodules import cache as module
from lit_scale.datamodules.cache import Cache, cache_folder, digest, npy


def make(root: Path, key: str = "key") -> Cache:
    return Cache(root, "tokens", key, ["train", "tokenizer"])


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "tokens").iterdir()}


def test_files_are_named_by_what_is_in_them_and_found_by_their_key(tmp_path: Path) -> None:
    array = np.arange(5)
    saved = make(tmp_path).save(train=npy(array), tokenizer=b"{}")
    assert saved["train"].name == hashlib.blake2b(npy(array), digest_size=16).hexdigest() + ".npy"
    assert saved["tokenizer"].name == digest(b"{}") + ".json"
    assert names(tmp_path) == {*(path.name for path in saved.values()), "key.json"}
    found = make(tmp_path).load()
    assert found == saved
    assert np.array_equal(np.load(found["train"]), array)
    assert make(tmp_path, "other").load() is None


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_file_that_is_not_whole_counts_as_missing(damage: str, tmp_path: Path) -> None:
    path = make(tmp_path).save(train=b"some content", tokenizer=b"{}")["train"]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"some" if damage == "cut" else b"some Content")
    assert make(tmp_path).load() is None
    make(tmp_path).save(train=b"some content", tokenizer=b"{}")  # and is made again
    assert make(tmp_path).load() is not None


@pytest.mark.parametrize("index", [b"", b"{", b"[]", b"3", b"null", b'{"train": 1}', b'{"train": "x"}', b"\xff"])
def test_an_index_that_is_none_counts_as_missing(index: bytes, tmp_path: Path) -> None:
    cache = make(tmp_path)
    cache.save(train=b"a", tokenizer=b"b")
    cache.index.write_bytes(index)
    assert cache.load() is None


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_save_that_is_cut_short_leaves_the_cache_as_it_was(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make(tmp_path).save(train=b"old", tokenizer=b"old")
    replaced = os.replace
    calls: list[str] = []

    def breaks(source: str, target: str) -> None:
        calls.append(str(target))
        if len(calls) == at:
            raise KeyboardInterrupt
        replaced(source, target)

    monkeypatch.setattr(module.os, "replace", breaks)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path).save(train=b"new", tokenizer=b"newer")
    assert make(tmp_path).load() == before
    assert not list((tmp_path / "tokens").glob("*.tmp"))


def test_two_that_write_one_key_do_not_mix(tmp_path: Path) -> None:
    contents = [(bytes([65 + i]) * 100, bytes([97 + i]) * 100) for i in range(8)]
    threads = [
        threading.Thread(target=lambda one=one, other=other: make(tmp_path).save(train=one, tokenizer=other))
        for one, other in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = make(tmp_path).load()
    assert found is not None
    assert (found["train"].read_bytes(), found["tokenizer"].read_bytes()) in contents


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file in its place")
    with pytest.raises(ValueError, match=r"cache_dir='.*' cannot be written .* set LIT_SCALE_CACHE"):
        make(tmp_path).save(train=b"a", tokenizer=b"b")


def test_the_folder_is_the_given_one_or_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIT_SCALE_CACHE", "/from/outside")
    assert cache_folder("~/here") == tmp_path / "here"
    assert cache_folder(None) == Path("/from/outside")
    monkeypatch.delenv("LIT_SCALE_CACHE")
    assert cache_folder(None) == tmp_path / ".cache" / "lit_scale"


def test_an_array_is_written_as_numpy_reads_it(tmp_path: Path) -> None:
    array = np.array([[1, 2], [3, 70_000]], np.uint32)
    (tmp_path / "x.npy").write_bytes(npy(array))
    again = np.load(tmp_path / "x.npy")
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)
