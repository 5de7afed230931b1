"""A cache of files that are found by what they were made from, written whole or not at all, and checked when read."""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Cache", "cache_folder", "digest", "npy"]


def digest(data: bytes) -> str:
    """Name of some content: 128 bits of BLAKE2b in hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def npy(array: npt.NDArray[Any]) -> bytes:
    """The content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def cache_folder(given: str | Path | None) -> Path:
    """The folder of all caches: the given one, or $LIT_SCALE_CACHE, or ~/.cache/lit_scale."""
    return Path(given or os.environ.get("LIT_SCALE_CACHE") or "~/.cache/lit_scale").expanduser()


def _write_atomically(path: Path, data: bytes) -> None:
    """Put a file in place whole or not at all, also when the machine goes down half way."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Cache:
    """Files named by what is in them, and per key a small index that is written last.

    Two processes that build the same key at the same time cannot mix: each index names complete files only, and a
    file whose content does not hash to its name counts as missing.

    Args:
        root: The folder of all caches.
        kind: Name of the folder in it.
        key: Hash of all that the files are made from.
        names: Of the files.
    """

    def __init__(self, root: Path, kind: str, key: str, names: Sequence[str]) -> None:
        self.root, self.folder = root, root / kind
        self.index = self.folder / f"{key}.json"
        self.names = names

    def load(self) -> dict[str, Path] | None:
        """The files of this key by name, or None unless all are there and whole."""
        try:
            index = json.loads(self.index.read_bytes())
            files = {name: self.folder / index[name] for name in self.names}
            for path in files.values():
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
                if found != path.stem:
                    return None
        except (OSError, ValueError, LookupError, TypeError):  # absent, or an index that is none
            return None
        return files

    def save(self, **contents: bytes) -> dict[str, Path]:
        """Write the files of this key.

        Raises:
            ValueError: The folder cannot be written, or the disk is full.
        """
        endings = {"tokenizer": ".json"}
        files = {name: self.folder / (digest(data) + endings.get(name, ".npy")) for name, data in contents.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, path in files.items():
                _write_atomically(path, contents[name])
            _write_atomically(self.index, json.dumps({name: path.name for name, path in files.items()}).encode())
        except OSError as error:
            raise ValueError(
                f"cache_dir={str(self.root)!r} cannot be written ({error}): pass cache_dir=, or set LIT_SCALE_CACHE, "
                "to a folder with write access and free space"
            ) from error
        return files
