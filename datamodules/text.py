"""Text for language models: fixed-length sequences from text files, masked (BERT) or unmasked (GPT).

:mod:`lit_scale.datamodules.corpus` reads and tokenizes the files.
"""

import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from lit_scale.datamodules.cache import Cache, cache_folder, digest, npy
from lit_scale.datamodules.corpus import (
    encode_all,
    join,
    load_tokenizer,
    read_documents,
    split_documents,
    train_bpe,
)
from lit_scale.datamodules.masking import mask_tokens, num_predictions
from lit_scale.datamodules.resume import ResumableDataModule, check_at_least
from lit_scale.seeds import derive_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 1  # version of the cache; increase it when the tokens of a document or their order change
_SPECIAL = ("<sep>", "<mask>")  # the last two ids of every vocabulary

Batch = dict[str, torch.Tensor]


class _Sequences(Dataset[Batch]):
    """Rows of a token file, masked when they are read, a whole batch at a time.

    Args:
        path: The tokens, a one-dimensional .npy file.
        length: Tokens per row, T.
        rows: Indices of the rows to use; None uses all.
        mask: `mask_tokens` with all arguments but tokens, epoch and indices bound; None leaves the tokens unchanged.
        epochwise: Whether masks change with the epoch; otherwise they are those of epoch 0.
        sized: Whether keys are (epoch, index, size); a size cuts each row into sequences of that many tokens.
    """

    def __init__(
        self,
        path: Path,
        length: int,
        *,
        rows: npt.NDArray[np.int64] | None = None,
        mask: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None,
        epochwise: bool = False,
        sized: bool = False,
    ) -> None:
        self.path, self.length, self.rows, self.mask = path, length, rows, mask
        self.epochwise, self.sized = epochwise, sized

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """Memory-mapped tokens, (N, T), without those at the end that do not fill a row."""
        flat = np.load(self.path, mmap_mode="r")
        count = len(flat) // self.length
        return flat[: count * self.length].reshape(count, self.length)

    def __getstate__(self) -> dict[str, Any]:
        # a spawned worker maps the file again: pickling the map would copy all tokens
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    @property
    def full_size(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def __len__(self) -> int:
        return len(self.tokens if self.rows is None else self.rows)

    def __getitems__(self, keys: Sequence[int | tuple[int, int] | tuple[int, int, int | None]]) -> Batch:
        pairs = [key[:2] if isinstance(key, tuple) else (0, key) for key in keys]
        epoch = pairs[0][0]
        if pairs[-1][0] != epoch:  # a planned batch may span two epochs
            parts = [self.__getitems__(list(own)) for _, own in itertools.groupby(keys, key=_epoch_of)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        indices = np.array([index for _, index in pairs])
        if self.rows is not None:
            indices = self.rows[indices]
        ids = self.tokens[indices].astype(np.int64)  # (B, T)
        size = keys[0][2] if self.sized and isinstance(keys[0], tuple) and len(keys[0]) == 3 else None
        if size is not None:
            pieces = self.length // size
            ids = ids.reshape(-1, size)  # (B T / size, size): the number of tokens is unchanged
            indices = (indices[:, None] * pieces + np.arange(pieces)).ravel()
        if self.mask is None:
            return {"input_ids": torch.from_numpy(ids)}
        names = ("input_ids", "positions", "labels")
        return dict(zip(names, self.mask(ids, epoch=epoch, indices=indices), strict=True))

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}


def _epoch_of(key: Any) -> int:
    return key[0] if isinstance(key, tuple) else 0


class TextDataModule(ResumableDataModule):
    """Sequences of text for masked or causal language models, from any folder of text files.

    In each split, documents are concatenated, each followed by a separator, and cut into sequences. Batches are dicts
    of int64 tensors: ``input_ids`` (B, T), and with masking ``positions`` and ``labels`` (B, M). Order and masks change
    with the epoch in training; in validation and test they never change, so that losses can be compared between runs.
    Training resumes exactly at the next batch; resuming on other data is refused.

    Args:
        corpus: Text files, folders (all text files below, hidden ones left out) or globs, one document per file; tar
            files such as ``"shards-{0..3}.tar"``, one document per ``.txt`` member; None is the Python sources of the
            standard library without its tests, about 12 MB.
        tokenizer: "bytes", the 256 byte values, without training; or "bpe", a byte-level BPE trained on the training
            documents.
        vocab_size: Vocabulary size of the BPE, special tokens included; None is 8192. With "bytes" it is 258 and cannot
            be set.
        sequence_length: Tokens per sequence, T, at least 8.
        batch_size: Sequences per batch and device.
        val_fraction: Expected share of the documents that is held out for validation, in (0, 1).
        test_fraction: Expected share of the documents that is held out for test, in [0, 1 - ``val_fraction``); 0 makes
            no test set. The test set is for reporting only, not for choosing anything.
        max_val_sequences: Number of sequences, chosen at random once, to validate and to test on; None takes all.
        mask_rate: Share of the positions to predict, in [0, 1); 0.15 in BERT. 0 leaves the text unmasked, for causal
            models.
        seed: Seed of the order and masks of the training data.
        split_seed: Seed of the split and of the masks in validation and test. It is separate from ``seed`` so that runs
            with different seeds are validated on the same data and share the cache.
        num_workers: Worker processes that make the batches; 0, usually fast enough, makes them in the main process.
        cache_dir: Folder for tokens and tokenizers; None is $LIT_SCALE_CACHE, or ~/.cache/lit_scale.

    Raises:
        ValueError: If an argument is out of range; or, when the data is prepared, if the corpus matches nothing, is not
            text or is too short, or the cache folder cannot be written.

    Example:
        >>> data = TextDataModule(sequence_length=128, batch_size=8)
        >>> data.vocab_size, data.mask_id, data.num_predictions
        (258, 257, 19)
        >>> TextDataModule(tokenizer="bpe").vocab_size
        8192
    """

    def __init__(
        self,
        corpus: str | list[str] | None = None,
        tokenizer: Literal["bytes", "bpe"] = "bytes",
        vocab_size: int | None = None,
        sequence_length: int = 64,
        batch_size: int = 32,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        max_val_sequences: int | None = 2048,
        mask_rate: float = 0.15,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if tokenizer not in ("bytes", "bpe"):
            raise ValueError(f"tokenizer={tokenizer!r}: must be 'bytes' or 'bpe'")
        if tokenizer == "bytes" and vocab_size is not None:
            raise ValueError(f"vocab_size={vocab_size} with tokenizer='bytes', which has 258: pass tokenizer='bpe'")
        if vocab_size is not None and vocab_size < 256 + len(_SPECIAL):
            raise ValueError(f"vocab_size={vocab_size}: must be at least 258, for 256 bytes and 2 special tokens")
        check_at_least(sequence_length=(sequence_length, 8), max_val_sequences=(max_val_sequences, 1))
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}: must lie between 0 and 1, such as 0.05")
        if not 0 <= test_fraction < 1 - val_fraction:
            raise ValueError(f"test_fraction={test_fraction}: must lie in [0, 1 - val_fraction), such as 0.05")
        if not 0 <= mask_rate < 1:
            raise ValueError(f"mask_rate={mask_rate}: must be at least 0 (no masking) and below 1, such as 0.15")

        self.corpus = corpus
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or (8192 if tokenizer == "bpe" else 256 + len(_SPECIAL))
        self.sequence_length = sequence_length
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.max_val_sequences = max_val_sequences
        self.mask_rate = mask_rate
        self.split_seed = split_seed
        self.cache_dir = cache_folder(cache_dir)
        self.train_set: _Sequences
        self.validation_set: _Sequences
        self.test_set: _Sequences | None = None
        self._files: dict[str, Path] | None = None  # train, validation, test if there is one, tokenizer of a BPE
        self._corpus_hash = ""

    @property
    def separator_id(self) -> int:
        """The token that ends each document."""
        return self.vocab_size - 2

    @property
    def mask_id(self) -> int:
        """The token that replaces masked tokens."""
        return self.vocab_size - 1

    @property
    def special_ids(self) -> tuple[int, int]:
        """Ids of separator and mask token; they are never drawn as random replacements."""
        return self.separator_id, self.mask_id

    @property
    def num_predictions(self) -> int:
        """M, the number of predicted positions per sequence; 0 without masking."""
        return num_predictions(self.mask_rate, self.sequence_length)

    # ---- from files to tokens

    def prepare_data(self) -> None:
        if self._files is None:
            self._files = self._prepare()

    def _prepare(self) -> dict[str, Path]:
        """Find the token files in the cache, or make them."""
        documents = read_documents(self.corpus, self.cache_dir)
        self._corpus_hash = digest("".join(documents).encode())
        settings: list[Any] = [_FORMAT, self._corpus_hash, self.split_seed, self.val_fraction, self.tokenizer]
        names = ["train", "validation"]
        if self.test_fraction:
            settings.append({"test_fraction": self.test_fraction})
            names.append("test")
        if self.tokenizer == "bpe":
            settings += [self.vocab_size, importlib.metadata.version("tokenizers")]
            names.append("tokenizer")
        cache = Cache(self.cache_dir, "text", digest(json.dumps(settings).encode()), names)
        files = cache.load()
        if files is None:
            files = cache.save(**self._tokenize(documents))
        return files

    def _tokenize(self, documents: dict[str, bytes]) -> dict[str, bytes]:
        """Split and encode the documents, and return the content of the cache files by name."""
        train, validation, test = split_documents(documents, self.val_fraction, self.split_seed, self.test_fraction)
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        contents: dict[str, bytes] = {}
        if self.tokenizer == "bpe":
            contents["tokenizer"] = train_bpe(train.values(), self.vocab_size - len(_SPECIAL)).encode()
            encode = partial(encode_all, load_tokenizer(contents["tokenizer"]))
        for name, texts in (("train", train.values()), ("validation", validation.values()), ("test", test.values())):
            if name == "test" and not self.test_fraction:
                continue
            ids = encode(texts) if self.tokenizer == "bpe" else (np.frombuffer(text, np.uint8) for text in texts)
            contents[name] = npy(join(ids, self.separator_id, dtype))
        return contents

    def setup(self, stage: str | None = None) -> None:
        if self._files is None:  # this rank did not prepare
            self._files = self._prepare()
        mask = None
        if self.mask_rate > 0:
            mask = partial(
                mask_tokens,
                rate=self.mask_rate,
                vocab_size=self.vocab_size,
                mask_id=self.mask_id,
                special_ids=self.special_ids,
            )
        masks = [mask and partial(mask, seed=seed) for seed in (self.seed, self.split_seed)]
        self.train_set = _Sequences(
            self._files["train"], self.sequence_length, mask=masks[0], epochwise=True, sized=True
        )
        held_out = {"validation": _Sequences(self._files["validation"], self.sequence_length, mask=masks[1])}
        self.validation_set = held_out["validation"]
        if self.test_fraction:
            held_out["test"] = self.test_set = _Sequences(self._files["test"], self.sequence_length, mask=masks[1])
        for name, found, needed, advice in (
            ("training", self.train_set, self.batch_size, "batch_size"),
            ("validation", self.validation_set, 1, "sequence_length, raise val_fraction"),
            *([("test", self.test_set, 1, "sequence_length, raise test_fraction")] if self.test_set else []),
        ):
            if len(found) < needed:
                tokens = len(np.load(found.path, mmap_mode="r"))
                raise ValueError(
                    f"corpus={self.corpus!r} is too short: {tokens} tokens for {name} make {len(found)} sequences of "
                    f"sequence_length={self.sequence_length}, but at least {needed} are needed "
                    f"({needed * self.sequence_length} tokens): give more text or lower {advice}"
                )
        for name, sequences in held_out.items():
            if self.max_val_sequences is not None and len(sequences) > self.max_val_sequences:
                chooser = torch.Generator().manual_seed(derive_seed(self.split_seed, name))
                order = torch.randperm(len(sequences), generator=chooser)
                sequences.rows = order[: self.max_val_sequences].sort().values.numpy()
        self.__dict__.pop("unigram_entropy", None)
        self.go_on()

    # ---- what the data is like

    @cached_property
    def unigram_entropy(self) -> float:
        """Loss, in nats per token, of a model that predicts tokens by their frequency, without context.

        It is the cross-entropy of the validation tokens under their frequencies in the training data, with one added to
        each count. Special tokens are left out, as in masking.
        """
        ordinary = self.vocab_size - len(_SPECIAL)
        rows = self.validation_set.rows
        held_out = self.validation_set.tokens if rows is None else self.validation_set.tokens[rows]
        train, validation = (
            np.bincount(tokens.ravel(), minlength=self.vocab_size)[:ordinary]
            for tokens in (self.train_set.tokens, held_out)
        )
        probabilities = (train + 1) / (train.sum() + ordinary)
        return float(-(validation @ np.log(probabilities)) / validation.sum())

    @cached_property
    def _bpe(self) -> "Tokenizer":
        if self._files is None:
            raise ValueError("there is no tokenizer yet: call prepare_data() first")
        return load_tokenizer(self._files["tokenizer"].read_bytes())

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return list(text.encode()) if self.tokenizer == "bytes" else self._bpe.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, with special tokens written as <sep> and <mask>."""
        text = ""
        for special, run in itertools.groupby(map(int, ids), key=lambda token: token >= self.separator_id):
            if special:
                text += "".join(_SPECIAL[token - self.separator_id] for token in run)
            elif self.tokenizer == "bytes":
                text += bytes(run).decode(errors="replace")
            else:
                text += self._bpe.decode(list(run))
        return text

    # ---- resume

    def settings(self) -> dict[str, Any] | None:
        """Everything that training batches depend on; None before setup."""
        if self._files is None:
            return None
        vocabulary = f"bpe {self._files['tokenizer'].name}" if self.tokenizer == "bpe" else "bytes"
        names = "vocab_size sequence_length batch_size val_fraction test_fraction mask_rate seed split_seed"
        return {
            "corpus": self._corpus_hash,
            "tokenizer": vocabulary,
            **{name: getattr(self, name) for name in names.split()},
        }
