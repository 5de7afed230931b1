"""WebDataset shards as a map dataset: tar files whose headers are read once, and whose samples are read by position.

A stream of shards has to share out whole shards, shuffles little, and loses count where it is resumed. With an index
of where each member begins, shards are a data set like any other: `ResumableLoader` shuffles all of it, shares it
equally among ranks and workers, and resumes at the very next batch.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand
from PIL import Image
from torch.utils.data import Dataset

from lit_scale.datamodules.cache import Cache, cache_folder, digest, npy

__all__ = ["IMAGES", "Shards", "expand_shards", "is_pattern", "write_shards"]

IMAGES = ("jpg", "jpeg", "png")
_EXTENSIONS = (*IMAGES, "cls", "txt", "json")  # nothing that would have to be unpickled
_FORMAT = 1  # of the index; raise it when something else is kept of a shard
_OPEN_FILES = 64  # at a time; more shards than that take turns
_BLOCK = 512  # of a tar file
_LABEL = 21  # bytes kept of a `.cls`, enough for the digits of an int64
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes

Index = dict[str, npt.NDArray[Any]]


# ---- which files


def is_pattern(source: str) -> bool:
    """Whether a string names tar files, be it one, a brace pattern or a glob; pipes count, so as to be refused.

    Example:
        >>> is_pattern("train-{000..009}.tar"), is_pattern("notes/*.txt")
        (True, False)
    """
    return source.startswith("pipe:") or re.search(r"\.(tar|tgz|tar\.\w+)$", source, re.IGNORECASE) is not None


def expand_shards(source: str | Sequence[str]) -> list[Path]:
    """The files of a brace pattern as in WebDataset, ``"train-{000..009}.tar"``, of a glob, or of a list of either.

    Args:
        source: Local files only.

    Returns:
        Existing files, in the order of the pattern; those of a glob sorted.

    Raises:
        ValueError: It is a pipe or a URL, matches nothing, names a file twice, or one that does not exist.

    Example:
        >>> expand_shards("pipe:cat train.tar")
        Traceback (most recent call last):
        ValueError: shards 'pipe:cat train.tar': commands are never run; write the files to a local folder first
    """
    shards: list[Path] = []
    for entry in [source] if isinstance(source, str) else source:
        if entry.startswith("pipe:"):
            raise ValueError(f"shards {entry!r}: commands are never run; write the files to a local folder first")
        if "://" in entry:
            raise ValueError(f"shards {entry!r}: remote files are not read; copy them to a local folder first")
        try:
            names = [os.path.expanduser(name) for name in braceexpand(entry)]
        except ValueError as error:
            raise ValueError(f"shards {entry!r}: {error}; write ranges as in train-{{000..009}}.tar") from None
        for name in names:
            matches = [name] if os.path.exists(name) or not glob.has_magic(name) else sorted(glob.glob(name))
            if not matches:
                raise ValueError(f"shards {entry!r}: {name!r} matches no file")
            shards += map(Path, matches)
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise ValueError(f"shard {str(missing[0])!r} does not exist ({len(missing)} of {len(shards)} are missing)")
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise ValueError(f"shard {str(twice)!r} is named twice: its samples would count double")
    if not shards:
        raise ValueError(f"shards {source!r}: there is no shard")
    return shards


# ---- where each member begins


def _split(name: str) -> tuple[str | None, str]:
    """Key and extension as WebDataset tells them apart: ``a/b.c.png`` is the ``c.png`` of ``a/b``."""
    found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", name, re.DOTALL)
    return (found[1], found[2].lower()) if found else (None, "")


def _members(shard: Path) -> Iterator[tuple[str, str, int, int, bytes]]:
    """Key, extension, offset and size of the files in a tar, and what a `.cls` says; checks that the tar is whole."""
    with open(shard, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, extension = _split(member.name)
                    stored = member.isfile() and not member.issparse()
                    end = member.offset_data + (member.size if stored else 0)
                    if end > length:
                        raise ValueError(
                            f"shard {str(shard)!r} is truncated: its member {member.name!r} ends at byte {end}, the "
                            f"file at byte {length}; write or copy it again"
                        )
                    if not stored or key is None or _META.match(member.name):
                        continue
                    label = b""
                    if extension == "cls":
                        label = os.pread(file.fileno(), min(member.size, _LABEL), member.offset_data)
                    yield key, extension, member.offset_data, member.size, label
                end = tar.offset
        except tarfile.TarError as error:
            raise ValueError(
                f"shard {str(shard)!r} cannot be read ({error}): it has to be a whole tar file, not compressed"
            ) from error
        closing = os.pread(file.fileno(), _BLOCK, end)  # tarfile takes any end of the file for the end of the archive
    if closing != bytes(_BLOCK):
        raise ValueError(
            f"shard {str(shard)!r} is truncated or damaged: no further member and no end mark at byte {end} of "
            f"{length}; write or copy it again"
        )


def _scan(shards: Sequence[Path]) -> Index:
    """Keys (N,), labels (N,), shard (N,), and offset and size of each extension (N, E, 2), size -1 where absent."""
    keys: list[bytes] = []
    labels: list[bytes] = []
    numbers: list[int] = []
    rows: list[list[tuple[int, int]]] = []
    for number, shard in enumerate(shards):
        before = len(keys)
        for key, members in groupby(_members(shard), key=lambda member: member[0]):
            row, label = [(0, -1)] * len(_EXTENSIONS), b""
            for _, extension, offset, size, said in members:
                if extension not in _EXTENSIONS:
                    continue
                column = _EXTENSIONS.index(extension)
                if row[column][1] >= 0:
                    raise ValueError(f"shard {str(shard)!r} has two members {key}.{extension}")
                row[column] = offset, size
                label = label or said
            keys.append(key.encode(errors="surrogateescape"))
            labels.append(label)
            numbers.append(number)
            rows.append(row)
        if len(keys) == before:
            raise ValueError(f"shard {str(shard)!r} is empty: it holds no sample")
    return {
        "keys": np.array(keys),
        "labels": np.array(labels),
        "shards": np.array(numbers, np.int32),
        "members": np.array(rows, np.int64),
    }


# ---- the data set


class Shards(Dataset[dict[str, Any]]):
    """The samples of WebDataset shards, by their position; a dict of bytes each, with the key as ``__key__``.

    Members of the same name up to the first dot belong to one sample, ``0001.jpg`` and ``0001.cls``. Only ``jpg``,
    ``jpeg``, ``png``, ``cls``, ``txt`` and ``json`` are read, nothing is ever unpickled, and other members are passed
    over. Because samples are read by position, shards are only files here: fewer of them than ranks times workers is
    fine, and so are shards of unequal size; every rank gets equally many samples, none twice.

    The headers are read once, at about a second for 40,000 members; the index is kept in the cache, by path, size and
    time of each shard. Processes that are forked or spawned open the files anew.

    Args:
        source: Brace pattern, glob, or a list of them; see `expand_shards`.
        need: Members that each sample must have, any extension of each group.
        cache_dir: Folder for the index; None is $LIT_SCALE_CACHE, or ~/.cache/lit_scale.

    Raises:
        ValueError: A shard is missing, empty, truncated, compressed or no tar file, or a sample lacks a member; at
            reading, a shard was changed meanwhile.

    Example:
        >>> pattern = f"{folder}/example-{{000000..000001}}.tar"
        >>> images = [(Image.new("RGB", (8, 8), "red"), 0), (Image.new("RGB", (8, 8), "blue"), 1)]
        >>> _ = write_shards(images, str(folder), name="example", samples_per_shard=1)
        >>> shards = Shards(pattern, need=[IMAGES, ("cls",)], cache_dir=str(folder))
        >>> len(shards), sorted(shards[1]), shards[1]["cls"]
        (2, ['__key__', 'cls', 'png'], b'1')
    """

    def __init__(
        self,
        source: str | Sequence[str],
        *,
        need: Sequence[Sequence[str]] = (),
        cache_dir: str | Path | None = None,
    ) -> None:
        self.paths = expand_shards(source)
        self._stamps = [_stamp(path.stat()) for path in self.paths]
        known = [[os.path.abspath(path), *stamp] for path, stamp in zip(self.paths, self._stamps, strict=True)]
        key = digest(json.dumps([_FORMAT, _EXTENSIONS, known]).encode())
        cache = Cache(cache_folder(cache_dir), "shards", key, ["keys", "labels", "shards", "members"])
        self._files = cache.load()
        if self._files is None:
            self._files = cache.save(**{name: npy(array) for name, array in _scan(self.paths).items()})
        self._open: dict[int, IO[bytes]] = {}
        for group in need:
            columns = [_EXTENSIONS.index(extension) for extension in group]
            lacking = (self._index["members"][:, columns, 1] < 0).all(1)
            if lacking.any():
                first = int(lacking.argmax())
                has = [e for e, (_, size) in zip(_EXTENSIONS, self._index["members"][first], strict=True) if size >= 0]
                raise ValueError(
                    f"{self.name(first)} has no {' or '.join(group)} member, only {', '.join(has) or 'others'} "
                    f"({int(lacking.sum())} of {len(self)} samples lack it)"
                )

    @cached_property
    def _index(self) -> Index:
        """Mapped from the cache, so that processes share the memory."""
        assert self._files is not None
        return {name: np.load(path, mmap_mode="r") for name, path in self._files.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_index"} | {"_open": {}}

    def __len__(self) -> int:
        return len(self._index["keys"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        present = [e for e, (_, size) in zip(_EXTENSIONS, self._index["members"][index], strict=True) if size >= 0]
        return {"__key__": self.key(index)} | {extension: self.read(index, extension) for extension in present}

    def key(self, index: int) -> str:
        """The name of a sample's members up to the dot."""
        return bytes(self._index["keys"][index]).decode(errors="surrogateescape")

    def name(self, index: int) -> str:
        """Which sample that is, for messages."""
        return f"sample {self.key(index)!r} of shard {str(self.paths[self._index['shards'][index]])!r}"

    @property
    def fingerprint(self) -> str:
        """Hash of keys, labels, places and sizes of all samples, wherever the shards lie."""
        assert self._files is not None
        return digest(" ".join(path.stem for path in self._files.values()).encode())

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """The classes that the ``cls`` members give, (N,).

        Raises:
            ValueError: One is not a whole number.
        """
        said = np.asarray(self._index["labels"])
        try:
            return said.astype(np.int64)
        except (ValueError, OverflowError):
            for index, label in enumerate(said):
                if not re.fullmatch(rb"\s*[+-]?\d{1,18}\s*", label):
                    raise ValueError(
                        f"{self.name(index)}: its cls member is {bytes(label)!r}, not the number of a class"
                    ) from None
            raise

    def read(self, index: int, *extensions: str) -> bytes:
        """The content of the first of these members that the sample has.

        Raises:
            ValueError: It has none of them, or the shard is gone or was changed since it was indexed.
        """
        members = self._index["members"][index]
        for extension in extensions:
            offset, size = members[_EXTENSIONS.index(extension)].tolist()
            if size >= 0:
                break
        else:
            raise ValueError(f"{self.name(index)} has no {' or '.join(extensions)} member")
        number = int(self._index["shards"][index])
        data = os.pread(self._descriptor(number), size, offset)
        if len(data) < size:
            raise ValueError(f"shard {str(self.paths[number])!r} ends early: it was cut since it was indexed")
        return data

    def _descriptor(self, number: int) -> int:
        """An open file of this shard; reading by offset leaves nothing that forked processes could disturb."""
        file = self._open.pop(number, None)
        if file is None:
            path = self.paths[number]
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise ValueError(f"shard {str(path)!r} cannot be opened any more ({error})") from error
            if _stamp(os.fstat(file.fileno())) != self._stamps[number]:
                raise ValueError(f"shard {str(path)!r} was changed since it was indexed: start again")
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
        self._open[number] = file  # the last one used is the last one closed
        return file.fileno()


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns]


# ---- writing


def _encoded(image: Image.Image | str | Path, form: str) -> tuple[str, bytes]:
    """Extension and content; files that are jpg or png already stay as they are."""
    if not isinstance(image, Image.Image):
        extension = Path(image).suffix[1:].lower()
        if extension in IMAGES:
            return extension, Path(image).read_bytes()
        with Image.open(image) as opened:
            return _encoded(opened.convert("RGB"), form)
    buffer = io.BytesIO()
    image = image if image.mode in ("RGB", "L") else image.convert("RGB")
    image.save(buffer, "JPEG" if form == "jpg" else "PNG", **({"quality": 95} if form == "jpg" else {}))
    return form, buffer.getvalue()


def write_shards(
    samples: Iterable[tuple[Image.Image | str | Path, int]],
    folder: str | Path,
    *,
    samples_per_shard: int = 5000,
    name: str = "train",
    form: str = "png",
    progress: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write images and their classes as WebDataset shards ``name-000000.tar``, ``name-000001.tar``...

    Each appears under its name when it is complete. The same samples make the same bytes.

    Args:
        samples: Image, or path of an image file, and its class; files in jpg or png are stored as they are.
        folder: Made if it does not exist.
        samples_per_shard: At most.
        name: Beginning of the files' names.
        form: Of images that are not files yet: "png", which loses nothing, or "jpg" at quality 95.
        progress: Called with each shard that is complete.

    Returns:
        The shards.

    Raises:
        ValueError: There are such shards already, there is no sample, or an argument is out of its range.
    """
    from webdataset import ShardWriter

    folder = Path(folder)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard}: must be at least 1")
    if form not in ("png", "jpg"):
        raise ValueError(f"form={form!r}: must be 'png' or 'jpg'")
    if not name or "/" in name or set("{}*?[]%\\") & set(name):
        raise ValueError(f"name={name!r}: must be the beginning of a file name, without special characters")
    if present := sorted(folder.glob(f"{name}-[0-9]*.tar")):
        raise ValueError(f"{str(present[0])!r} is there already: remove it or choose another name or folder")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def finish(temporary: str) -> None:
        written.append(Path(temporary.removesuffix(".tmp")))
        os.replace(temporary, written[-1])
        if progress is not None:
            progress(written[-1])

    numbered = enumerate(samples)
    first = next(numbered, None)
    if first is None:
        raise ValueError("there is no sample to write")
    pattern = str(folder).replace("%", "%%") + f"/{name}-%06d.tar.tmp"
    writer = ShardWriter(pattern, samples_per_shard, post=finish, verbose=0, encoder=False, mtime=0)
    try:
        for number, (image, label) in chain([first], numbered):
            extension, data = _encoded(image, form)
            writer.write({"__key__": f"{number:08d}", extension: data, "cls": str(int(label)).encode()})
    except BaseException:
        writer.post = os.remove  # half a shard is none
        writer.close()
        raise
    writer.close()
    return written
