"""A file cache: entries are keyed by a hash of their inputs, written atomically, and verified when they are read."""

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
    """128-bit BLAKE2b hash of the content, in hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def npy(array: npt.NDArray[Any]) -> bytes:
    """The array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def cache_folder(given: str | Path | None) -> Path:
    """The folder of all caches: ``given``, else $LIT_SCALE_CACHE, else ~/.cache/lit_scale."""
    return Path(given or os.environ.get("LIT_SCALE_CACHE") or "~/.cache/lit_scale").expanduser()


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, even if the machine crashes while it is written."""
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
    """Files named by the hash of their content, and per key a small index, which is written last.

    Processes may build the same key at the same time: an index names only complete files, and a file whose content does
    not match its name counts as missing.

    Args:
        root: The folder of all caches.
        kind: Name of the subfolder.
        key: Hash of everything that determines the content of the files.
        names: Names of the files within the key.
    """

    def __init__(self, root: Path, kind: str, key: str, names: Sequence[str]) -> None:
        self.root, self.folder = root, root / kind
        self.index = self.folder / f"{key}.json"
        self.names = names

    def load(self) -> dict[str, Path] | None:
        """Paths of this key's files by name; None if one is missing or damaged."""
        try:
            index = json.loads(self.index.read_bytes())
            files = {name: self.folder / index[name] for name in self.names}
            for path in files.values():
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
                if found != path.stem:
                    return None
        except (OSError, ValueError, LookupError, TypeError):  # absent, or not a valid index
            return None
        return files

    def save(self, **contents: bytes) -> dict[str, Path]:
        """Write this key's files, given as content by name, and return their paths by name.

        Raises:
            ValueError: If the folder cannot be written, or the disk is full.
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
