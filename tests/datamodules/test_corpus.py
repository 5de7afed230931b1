"""The parts of a corpus by themselves; what becomes of them in a data module stands in test_text.py."""

import math
from pathlib import Path

import numpy as np
import pytest

from lit_scale.datamodules.cache import digest
from lit_scale.datamodules.corpus import (
    encode_all,
    join,
    load_tokenizer,
    read_documents,
    split_documents,
    train_bpe,
)


def documents(count: int = 400) -> dict[str, bytes]:
    texts = [f"document {i}\n".encode() for i in range(count)]
    return dict(sorted((digest(text), text) for text in texts))


# ---- reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts and a copy of one, in folders; an empty file, a hidden one, and two that are no text."""
    for name, content in {
        "a.txt": b"one",
        "deep/er/b.md": "zwei, ü".encode(),
        "deep/copy.txt": b"one",
        "empty.txt": b"",
        ".hidden.txt": b"secret",
        ".git/config": b"secret too",
        "picture.png": b"\x89PNG\0",
        "latin.txt": "ü".encode("latin-1"),
    }.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "corpus"


def test_each_text_is_read_once_by_its_hash(folder: Path) -> None:
    found = read_documents(str(folder))
    assert found == {digest(text): text for text in (b"one", "zwei, ü".encode())}
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [
        ("a.txt", {"one"}),
        (["a.txt", "deep"], {"one", "zwei, ü"}),
        ("**/*.md", {"zwei, ü"}),
        ("*.txt", {"one"}),
        (["deep/er/*", "a.txt", "a.txt"], {"one", "zwei, ü"}),
    ],
)
def test_files_folders_and_globs_name_texts(
    corpus: str | list[str], expected: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert {text.decode() for text in read_documents(corpus).values()} == expected


def test_a_home_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert set(read_documents("~/a.txt").values()) == {b"one"}


@pytest.mark.parametrize("name", ["picture.png", "latin.txt"])
def test_a_file_that_was_named_has_to_be_text(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is not text \(it has a NUL byte or is not UTF-8\)"):
        read_documents(str(folder / name))


@pytest.mark.parametrize("corpus", ["", "nowhere", "nowhere/*.txt", ["a.txt", "nowhere"]])
def test_what_matches_nothing_is_refused(
    corpus: str | list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="matches no file"):
        read_documents(corpus)


def test_a_corpus_has_to_hold_text(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(str(folder / "empty.txt"))


# ---- the split


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.0), (0.25, 0.25), (0.9, 0.05)])
def test_all_documents_fall_on_one_side_and_about_as_many_as_asked_for(val: float, test: float) -> None:
    everything = documents()
    parts = split_documents(everything, val, 3, test)
    assert [sum(name in part for part in parts) for name in everything] == [1] * len(everything)
    assert {name: text for part in parts for name, text in part.items()} == everything
    assert all(list(part) == sorted(part) for part in parts)
    for part, share in zip(parts, (1 - val - test, val, test), strict=True):
        assert abs(len(part) - 400 * share) <= 5 * math.sqrt(400 * share * (1 - share))


def test_a_document_stays_on_its_side_when_others_come_or_go() -> None:
    everything = documents()
    few = dict(list(everything.items())[::2])
    for whole, part in zip(split_documents(everything, 0.2, 0, 0.1), split_documents(few, 0.2, 0, 0.1), strict=True):
        assert part == {name: text for name, text in whole.items() if name in few}


def test_validation_is_the_same_with_and_without_a_test_split() -> None:
    with_test, without = (split_documents(documents(), 0.2, 0, test) for test in (0.3, 0.0))
    assert with_test[1] == without[1]
    assert with_test[2].items() <= without[0].items()


def test_another_seed_is_another_split() -> None:
    first, second = (set(split_documents(documents(), 0.2, seed)[1]) for seed in (0, 1))
    assert abs(len(first & second) - 400 * 0.2**2) < 5 * math.sqrt(400 * 0.04 * 0.96)  # as if drawn anew


@pytest.mark.parametrize(("val", "test"), [(1e-9, 0.0), (0.999, 0.0), (1e-9, 1e-9), (0.5, 0.499)])
def test_no_side_that_was_asked_for_is_empty(val: float, test: float) -> None:
    train, validation, held_out = split_documents(documents(3), val, 0, test)
    assert train
    assert validation
    assert bool(held_out) is bool(test)


def test_one_document_is_cut_at_line_ends() -> None:
    text = b"".join(b"line %d\n" % i for i in range(1_000))
    train, validation, _ = split_documents({digest(text): text}, 0.3, 0)
    pieces = [*train.values(), *validation.values()]
    assert 80 < len(pieces) <= 101
    assert all(piece.endswith(b"\n") and piece in text for piece in pieces)
    assert sum(map(len, pieces)) == len(text)


# ---- tokens


def test_documents_are_joined_with_a_separator_behind_each() -> None:
    arrays = [np.array([1, 2], np.uint32), np.array([], np.uint32), np.array([300], np.uint32)]
    joined = join(arrays, 9, np.uint16)
    assert joined.tolist() == [1, 2, 9, 9, 300, 9]
    assert joined.dtype == np.uint16
    assert join([], 9, np.uint8).tolist() == []


def test_a_byte_level_tokenizer_takes_any_text_there_and_back() -> None:
    texts = [b"the cat, the cat, the cat", "naïve 日本 \U0001f600\n\t".encode(), *(b"%d" % i for i in range(100))]
    tokenizer = load_tokenizer(train_bpe(texts[:1] * 20, 300).encode())
    assert tokenizer.get_vocab_size() <= 300
    encoded = list(encode_all(tokenizer, iter(texts)))
    assert [tokenizer.decode(ids.tolist()).encode() for ids in encoded] == texts
    assert len(encoded[0]) < len(texts[0]) / 2  # what it was trained on is shorter
    assert all(ids.dtype == np.uint32 and ids.max(initial=0) < 300 for ids in encoded)


def test_merges_are_the_most_frequent_pairs() -> None:
    """By hand: of these words l-o stands three times and then lo-w, before any other pair does."""
    tokenizer = load_tokenizer(train_bpe([b"low", b"low", b"lot"], 258).encode())
    assert {"lo", "low"} <= set(tokenizer.get_vocab())
    assert tokenizer.get_vocab_size() == 258
