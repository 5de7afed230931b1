"""A corpus: read files, remove duplicate documents, split, and tokenize.

Everything depends on the content of the documents, not on file names: equal documents count once, the hash of a
document decides its split, and the hash of all documents is part of the cache key.
"""

import glob
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_scale.datamodules.cache import digest
from lit_scale.datamodules.shards import Shards, is_pattern
from lit_scale.seeds import derive_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["encode_all", "join", "load_tokenizer", "read_documents", "split_documents", "train_bpe"]

_TESTS = {"test", "tests", "idle_test"}


# ---- documents


def _is_text(data: bytes) -> bool:
    """Whether the content is UTF-8 without a NUL byte."""
    if b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text_of(path: Path) -> bytes | None:
    """The content of a file, or None if it is not text."""
    data = path.read_bytes()
    return data if _is_text(data) else None


def _texts_in(shards: Shards) -> Iterator[bytes]:
    """The text of each sample."""
    for index in range(len(shards)):
        text = shards.read(index, "txt")
        if not _is_text(text):
            raise ValueError(f"corpus: the text of {shards.name(index)} has a NUL byte or is not UTF-8")
        yield text


def _files_below(folder: Path, ending: str = "", without: Iterable[str] = ()) -> list[Path]:
    """All files below a folder, except hidden files and folders and folders named in ``without``."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        files += [Path(parent, name) for name in names if not name.startswith(".") and name.endswith(ending)]
    return files


def read_documents(corpus: str | Sequence[str] | None, cache_dir: Path | None = None) -> dict[str, bytes]:
    """Read the distinct documents of a corpus: one per file, or one per sample of a tar file.

    Args:
        corpus: Files, folders, globs or shards as in `TextDataModule`; None reads the sources of the standard library.
        cache_dir: Folder for the index of shards, as in `Shards`.

    Returns:
        Content by its hash, in ascending order of the hashes, without empty documents.

    Raises:
        ValueError: If a path or glob matches nothing, a file that is named explicitly is not text, there is no text at
            all, or a shard is damaged or has a sample without text.
    """
    contents: list[bytes] = []
    named: list[Path] = []
    found: list[Path] = []
    if corpus is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        found = _files_below(library, ".py", {"site-packages", *_TESTS})
    for entry in [corpus] if isinstance(corpus, str) else corpus or []:
        if is_pattern(entry):
            contents += _texts_in(Shards(entry, need=[("txt",)], cache_dir=cache_dir))
            continue
        entry = os.path.expanduser(entry)
        path = Path(entry)  # for "" this is the current folder
        matches = [path] if entry and path.exists() else [Path(match) for match in glob.glob(entry, recursive=True)]
        if not matches:
            raise ValueError(f"corpus={entry!r} matches no file: give text files, folders of them, or globs")
        for match in matches:
            if match.is_dir():
                found += _files_below(match)
            else:
                (named if match is path else found).append(match)

    for path in named:
        text = _text_of(path)
        if text is None:
            raise ValueError(f"corpus={str(path)!r} is not text (it has a NUL byte or is not UTF-8): give UTF-8 files")
        contents.append(text)
    texts = [_text_of(path) for path in found if path.is_file()]
    contents += [text for text in texts if text is not None]
    if skipped := texts.count(None):
        rank_zero_info(f"TextDataModule: {skipped} of {len(texts)} files are not UTF-8 text and were left out")
    documents = {digest(text): text for text in contents if text}
    if not documents:
        raise ValueError(
            f"corpus={corpus!r} holds no text (0 bytes in {len(contents)} text files): give at least one file with text"
        )
    return dict(sorted(documents.items()))


def split_documents(
    documents: dict[str, bytes], val_fraction: float, seed: int, test_fraction: float = 0.0
) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """Divide documents into train, validation and test; the hash of a document and the seed decide its split.

    A document therefore stays in its split when others are added or removed, and the validation documents are the same
    with and without a test split. If a requested split would be empty, the documents nearest to its threshold move
    there; with fewer documents than splits, validation or test stays empty. A corpus of a single document is first cut
    at line ends into at most about a hundred pieces.

    Args:
        documents: Content by hash.
        val_fraction: Expected share of the documents for validation, in (0, 1).
        seed: Seed of the split.
        test_fraction: Expected share of the documents for test, in [0, 1 - ``val_fraction``); 0 makes no test split.

    Returns:
        Documents for training, validation and test, each in the order given.
    """
    if len(documents) == 1:
        (text,) = documents.values()
        size, pieces = max(1, len(text) // 100), [b""]
        for line in text.splitlines(keepends=True):
            if len(pieces[-1]) >= size:
                pieces.append(b"")
            pieces[-1] += line
        documents = dict(sorted((digest(piece), piece) for piece in pieces))
    place = {name: derive_seed(seed, "split", name) / 2**63 for name in documents}  # uniform in [0, 1)
    ranked = sorted(place, key=place.__getitem__)
    first, last = (sum(value < end for value in place.values()) for end in (val_fraction, val_fraction + test_fraction))
    tested = 1 if test_fraction else 0  # at least
    first = min(max(first, 1), len(ranked) - 1 - tested)
    last = min(max(last, first + tested), len(ranked) - 1)
    validation, test = set(ranked[:first]), set(ranked[first:last])
    return (
        {name: text for name, text in documents.items() if name not in validation | test},
        {name: text for name, text in documents.items() if name in validation},
        {name: text for name, text in documents.items() if name in test},
    )


# ---- tokens


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> str:
    """Train a byte-level BPE (Sennrich et al., ACL 2016; on bytes as in GPT-2), without special tokens.

    Args:
        texts: Documents in UTF-8.
        vocab_size: Maximum number of tokens, at least 256.

    Returns:
        The tokenizer as the JSON of the ``tokenizers`` library.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    return tokenizer.to_str()


def join(documents: Iterable[npt.NDArray[Any]], separator: int, dtype: type) -> npt.NDArray[Any]:
    """Concatenate documents into one array, each followed by the separator."""
    end: npt.NDArray[Any] = np.array([separator], dtype)
    return np.concatenate([part for ids in documents for part in (ids.astype(dtype), end)] or [end[:0]])


def encode_all(tokenizer: "Tokenizer", texts: Iterable[bytes]) -> Iterable[npt.NDArray[np.uint32]]:
    """Token ids of each text, in order, without special tokens."""
    remaining = iter(texts)
    while group := [text.decode() for text in itertools.islice(remaining, 64)]:
        for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.uint32)


def load_tokenizer(data: bytes) -> "Tokenizer":
    """Load a tokenizer from the JSON that `train_bpe` returned."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(data.decode())
