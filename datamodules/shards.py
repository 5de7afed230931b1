"""WebDataset shards as a map-style dataset: tar headers are read once, and samples are read by position.

A streaming reader assigns whole shards to workers, shuffles only within a buffer, and loses its position when it is
resumed. With an index of the offset of each member, shards are an ordinary dataset: `ResumableLoader` shuffles all
samples, divides them equally among ranks and workers, and resumes exactly at the next batch.
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
_EXTENSIONS = (*IMAGES, "cls", "txt", "json")  # none of them needs unpickling
_FORMAT = 1  # version of the index; increase it when its content changes
_OPEN_FILES = 64  # maximum number of shards that are open at a time
_BLOCK = 512  # block size of a tar file, in bytes
_LABEL = 21  # bytes kept of a `.cls`, enough for the digits of an int64
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's metadata

Index = dict[str, npt.NDArray[Any]]


# ---- which files


def is_pattern(source: str) -> bool:
    """Whether a string names tar files: a file, a brace pattern or a glob. True for pipes too, which are refused later.

    Example:
        >>> is_pattern("train-{000..009}.tar"), is_pattern("notes/*.txt")
        (True, False)
    """
    return source.startswith("pipe:") or re.search(r"\.(tar|tgz|tar\.\w+)$", source, re.IGNORECASE) is not None


def expand_shards(source: str | Sequence[str]) -> list[Path]:
    """Expand a brace pattern as in WebDataset, ``"train-{000..009}.tar"``, a glob, or a list of them, to paths.

    Args:
        source: Pattern or patterns of local files.

    Returns:
        Existing files, in the order of the pattern; those of a glob are sorted.

    Raises:
        ValueError: If ``source`` is a pipe or a URL, matches nothing, or names a file twice or one that does not exist.

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
    """Key and extension as in WebDataset, divided at the first dot: ``a/b.c.png`` is the ``c.png`` of ``a/b``."""
    found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", name, re.DOTALL)
    return (found[1], found[2].lower()) if found else (None, "")


def _members(shard: Path) -> Iterator[tuple[str, str, int, int, bytes]]:
    """Key, extension, offset, size and, for a `.cls`, content of each member; checks that the tar file is complete."""
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
        closing = os.pread(file.fileno(), _BLOCK, end)  # tarfile accepts an archive that ends anywhere
    if closing != bytes(_BLOCK):
        raise ValueError(
            f"shard {str(shard)!r} is truncated or damaged: no further member and no end mark at byte {end} of "
            f"{length}; write or copy it again"
        )


def _scan(shards: Sequence[Path]) -> Index:
    """Index of keys (N,), labels (N,), shards (N,), and offset and size per extension (N, E, 2); size -1 if absent."""
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
    """The samples of WebDataset shards by position, each a dict of bytes by extension, with the key as ``__key__``.

    Consecutive members with the same name up to the first dot form one sample, such as ``0001.jpg`` and ``0001.cls``.
    Only ``jpg``, ``jpeg``, ``png``, ``cls``, ``txt`` and ``json`` are read. Other members are ignored, and nothing is
    unpickled. Because samples are read by position, there may be fewer shards than ranks times workers, and shards of
    unequal size. With `ResumableLoader` every rank gets equally many samples; with ``drop_last`` none is repeated.

    The headers are read once, at about a second per 40,000 members. The index is cached under the path, size and
    modification time of each shard. Spawned processes open the files again; forked ones read by offset, which is safe.

    Args:
        source: Brace pattern, glob, or a list of them; see `expand_shards`.
        need: Groups of extensions; each sample must have at least one member of each group.
        cache_dir: Folder for the index; None is $LIT_SCALE_CACHE, or ~/.cache/lit_scale.

    Raises:
        ValueError: If a shard is missing, empty, truncated, compressed or not a tar file, or a sample lacks a member;
            when a sample is read, if its shard was changed since it was indexed.

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
        """The index, memory-mapped from the cache, so that processes share the memory."""
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
        """Key of a sample: the name of its members up to the first dot."""
        return bytes(self._index["keys"][index]).decode(errors="surrogateescape")

    def name(self, index: int) -> str:
        """Key and shard of a sample, for messages."""
        return f"sample {self.key(index)!r} of shard {str(self.paths[self._index['shards'][index]])!r}"

    @property
    def fingerprint(self) -> str:
        """Hash of keys, labels, offsets and sizes of all samples; it does not depend on the folder of the shards."""
        assert self._files is not None
        return digest(" ".join(path.stem for path in self._files.values()).encode())

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """The classes in the ``cls`` members, (N,).

        Raises:
            ValueError: If one is not an integer.
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
            ValueError: If the sample has none of them, or its shard was removed or changed since it was indexed.
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
        """Descriptor of this shard's open file. Forked processes can share it, because pread does not move it."""
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
        self._open[number] = file  # in order of use: the least recently used one is closed first
        return file.fileno()


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns]


# ---- writing


def _encoded(image: Image.Image | str | Path, form: str) -> tuple[str, bytes]:
    """Extension and content of an image; jpg and png files are not encoded again."""
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

    A shard gets its name when it is complete. The same samples give the same bytes.

    Args:
        samples: Pairs of an image, or the path of an image file, and its class. Files in jpg or png are stored
            unchanged.
        folder: Target folder; created if it does not exist.
        samples_per_shard: Maximum number of samples per shard; webdataset also starts a new shard after 3 GB.
        name: Prefix of the file names.
        form: Format of all other images: "png", which is lossless, or "jpg" at quality 95.
        progress: Called with the path of each completed shard.

    Returns:
        Paths of the shards.

    Raises:
        ValueError: If the folder already has shards of this name, there is no sample, or an argument is out of range.
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
        writer.post = os.remove  # remove the incomplete shard
        writer.close()
        raise
    writer.close()
    return written
