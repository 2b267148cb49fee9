"""Labelled images on disk: a folder for each class, .npz, parquet of the hub's layout, and shards of WebDataset."""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import io
import itertools
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.npz import read_headers, read_rows
from ibnorm_export.errors import IBNormError, quoted, shortened
from ibnorm_export.evaluation.preprocessing import open_picture
from ibnorm_export.files import sha256_of
from ibnorm_export.optional_packages import import_package
from ibnorm_export.parsing import parse_json

__all__ = ["ImageData", "RawImage", "open_images"]

#: Endings of image files; those that torchvision's ImageFolder takes.
_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_IMAGES: Final = ("image", "images", "img", "pixel_values", "x", "data")
_LABELS: Final = ("label", "labels", "fine_label", "y", "target", "targets")

#: Bytes of a member of a shard.
_MEMBER: Final = 64 << 20

_NPZ: Final = "an .npz file of images and labels"

_WHAT: Final = (
    "nothing is downloaded: put there a folder with a folder of images for each class, an .npz file (images, labels), "
    "a .parquet file (image.bytes, label), or .tar shards of WebDataset"
)


@dataclass(frozen=True, slots=True)
class RawImage:
    """One labelled image before it is decoded.

    Args:
        name: where it is in the data.
        label: the number of its class, or its name.
        load: returns a picture of Pillow, or an array that the model takes as it is (channels, height, width).
    """

    name: str
    label: int | str
    load: Callable[[], Any]


class ImageData(Protocol):
    """Labelled images in a fixed order."""

    @property
    def total(self) -> int:
        """Number of images; 0 if that is unknown."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes in the order of their numbers; empty if labels are numbers."""

    @property
    def prepared(self) -> bool:
        """Whether the images are as the model takes them."""

    def sha256(self) -> str:
        """Hash of names and contents."""

    def images(self, start: int) -> Iterator[RawImage]:
        """Yield the images from number `start` on."""


def _hash_files(files: Iterable[Path], root: Path) -> str:
    found = hashlib.sha256()
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        found.update(f"{name}\0{sha256_of(file)}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


class _Folder:
    """A folder for each class, named like the class."""

    prepared = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self.class_names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
        # names, because a Path takes ten times the memory of its text
        self._names = tuple(
            file.relative_to(root).as_posix()
            for name in self.class_names
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in _SUFFIXES and file.is_file()
        )
        self.total = len(self._names)

    def sha256(self) -> str:
        return _hash_files((self._root / name for name in self._names), self._root)

    def images(self, start: int) -> Iterator[RawImage]:
        for name in itertools.islice(self._names, start, None):
            yield RawImage(name, name.partition("/")[0], functools.partial(_read, self._root / name))


def _read(file: Path) -> Any:
    return open_picture(file.read_bytes())


class _Npz:
    """Two arrays: images (n, height, width), (n, height, width, 3) or, as the model takes them, (n, c, h, w) floats."""

    class_names: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        headers = read_headers(path, _NPZ)
        self._images, self._labels = (_pick(headers, names, path) for names in (_IMAGES, _LABELS))
        images, labels = headers[self._images], headers[self._labels]
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise IBNormError(
                f"{path}: labels have shape {labels.shape} and dtype {labels.dtype}; they must be one "
                f"whole number for each of {images.shape[0] if images.shape else 0} images"
            )
        self.prepared = bool(np.issubdtype(images.dtype, np.floating))
        legal = len(images.shape) == 4 if self.prepared else len(images.shape) == 3 or images.shape[3:] in ((3,), (4,))
        if not legal or not (self.prepared or images.dtype == np.uint8):
            raise IBNormError(
                f"{path}: images have shape {images.shape} and dtype {images.dtype}; they must be uint8 "
                "(n, height, width) or (n, height, width, 3), or floats (n, channels, height, width)"
            )
        self.total = images.shape[0]
        if not self.total:
            raise IBNormError(f"{path} has no images: its array {self._images} is empty; {_WHAT}")

    def sha256(self) -> str:
        return sha256_of(self._path)

    def images(self, start: int) -> Iterator[RawImage]:
        images, labels = (read_rows(self._path, name, what=_NPZ, start=start) for name in (self._images, self._labels))
        for index, (image, label) in enumerate(zip(images, labels, strict=True), start):
            yield RawImage(f"{self._path.name}:{index}", int(label), functools.partial(self._load, image))

    def _load(self, image: NDArray[Any]) -> Any:
        if self.prepared:
            if not np.isfinite(image).all():
                raise ValueError("it has values that are not finite numbers")
            return image.astype(np.float32)
        pillow = import_package("PIL.Image", extra="evaluate", purpose="reading images")
        return pillow.fromarray(image)


def _pick(names: Iterable[str], wanted: tuple[str, ...], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise IBNormError(f"{path} contains the arrays {quoted(sorted(names))}; it must have one of {', '.join(wanted)}")


class _Parquet:
    """The hub's layout: a column of structs with bytes, and a column of whole numbers."""

    prepared = False

    def __init__(self, files: tuple[Path, ...], root: Path) -> None:
        self._files, self._root = files, root
        self._parquet = import_package("pyarrow.parquet", extra="evaluate", purpose=f"reading {root}")
        self.total = 0
        self.class_names: tuple[str, ...] = ()
        for file in files:
            try:
                with self._parquet.ParquetFile(file) as table:
                    self.total += table.metadata.num_rows
                    schema = table.schema_arrow
            except (OSError, ValueError) as error:  # pyarrow's errors are among these
                raise _damaged(file, error) from error
            self._image, self._label = (_column(schema.names, names, file) for names in (_IMAGES, _LABELS))
            self.class_names = self.class_names or _hub_names(schema.metadata, self._label)

    def sha256(self) -> str:
        return _hash_files(self._files, self._root)

    def images(self, start: int) -> Iterator[RawImage]:
        number = 0
        for file in self._files:
            with self._parquet.ParquetFile(file) as table:
                if number + table.metadata.num_rows <= start:
                    number += table.metadata.num_rows
                    continue
                row = 0
                for batch in _batches(table, file, columns=[self._image, self._label]):
                    images, labels = batch.column(self._image), batch.column(self._label)
                    for image, label in zip(images, labels, strict=True):
                        if number >= start:
                            yield RawImage(f"{file.name}:{row}", self._label_of(label), _bytes_loader(image.as_py()))
                        number, row = number + 1, row + 1

    @staticmethod
    def _label_of(value: Any) -> int | str:
        label = value.as_py()
        return label if isinstance(label, (int, str)) else quoted(label)


def _damaged(file: Path, error: Exception) -> IBNormError:
    return IBNormError(f"{file} cannot be read: {shortened(' '.join(str(error).split()))}")


def _batches(table: Any, file: Path, *, columns: list[str]) -> Iterator[Any]:
    """Rows of a parquet file, 32 at a time.

    Raises:
        IBNormError: the file is damaged.
    """
    batches = table.iter_batches(batch_size=32, columns=columns)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are among these
            raise _damaged(file, error) from error
        yield batch


def _column(names: list[str], wanted: tuple[str, ...], file: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise IBNormError(f"{file} has the columns {quoted(names)}; it must have one of {', '.join(wanted)}")


def _hub_names(metadata: Mapping[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """The class names that `datasets` stores beside the schema; empty if there are none."""
    try:
        features = parse_json((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return ()


def _bytes_loader(content: Any) -> Callable[[], Any]:
    raw = content.get("bytes") if isinstance(content, dict) else content
    return functools.partial(open_picture, raw if isinstance(raw, bytes) else b"")


class _Shards:
    """Shards of WebDataset: files of one sample follow each other and share the name up to the first dot."""

    prepared = False
    class_names: tuple[str, ...] = ()
    total = 0

    def __init__(self, files: tuple[Path, ...], root: Path) -> None:
        self._files, self._root = files, root

    def sha256(self) -> str:
        return _hash_files(self._files, self._root)

    def images(self, start: int) -> Iterator[RawImage]:
        number = 0
        for shard in self._files:
            try:
                for key, members in self._samples(shard):
                    if number >= start:
                        yield _shard_image(f"{shard.name}:{key}", members)
                    number += 1
            except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise IBNormError(f"{shard} is not a tar file, or is damaged: {shortened(str(error))}") from error

    def _samples(self, shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Nothing is unpacked to disk; members are read one after the other, regular files only."""
        current, members = "", dict[str, bytes]()
        with _unpacked(shard) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                # tarfile keeps every member, about 1 KiB each; typeshed does not know this list
                archive.members = []  # type: ignore[attr-defined]  # see above
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not member.isfile() or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != current and members:
                    yield current, members
                    members = {}
                current = key
                if member.size > _MEMBER:
                    raise IBNormError(f"{shard}: {quoted(member.name)} has {member.size} bytes, more than {_MEMBER}")
                content = archive.extractfile(member)
                members[ending.lower()] = b"" if content is None else content.read()
            stream.check_end(archive.offset)
        if members:
            yield current, members


class _TarStream(io.RawIOBase):
    """The bytes of a tar file, the last of which are kept: tarfile takes a cut or damaged file for one that ends there.

    Args:
        inner: the bytes, unpacked.
    """

    def __init__(self, inner: IO[bytes]) -> None:
        self._inner = inner
        self._read = 0
        self._last = b""

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        found = self._inner.read(size)
        self._read += len(found)
        self._last = (self._last + found)[-2 * tarfile.RECORDSIZE :]
        return found

    def check_end(self, offset: int) -> None:
        """Check that a tar file ends where its last member does: with blocks of zeros up to the end of the file.

        Raises:
            ReadError: it does not.
        """
        rest = self._last[offset - self._read :] if offset < self._read else b""
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise tarfile.ReadError("it is cut off, or damaged after its last readable member")
        while piece := self._inner.read(tarfile.RECORDSIZE):
            if any(piece):
                raise tarfile.ReadError("members follow after its end")

    def close(self) -> None:
        """Close the file."""
        self._inner.close()
        super().close()


#: What unpacks a tar file, by its first bytes.
_PACKERS: Final[Mapping[bytes, Callable[[Path], Any]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


def _unpacked(shard: Path) -> _TarStream:
    with shard.open("rb") as stream:
        head = stream.read(8)
    opener = next((found for mark, found in _PACKERS.items() if head.startswith(mark)), None)
    return _TarStream(shard.open("rb") if opener is None else opener(shard))


def _shard_image(name: str, members: Mapping[str, bytes]) -> RawImage:
    image = next((members[ending[1:]] for ending in _SUFFIXES if ending[1:] in members), b"")
    return RawImage(name, _shard_label(name, members), _bytes_loader(image))


def _shard_label(name: str, members: Mapping[str, bytes]) -> int | str:
    """The number in NAME.cls, or the label in NAME.json."""
    try:
        if "cls" in members:
            text = members["cls"].decode().strip()
            return int(text) if text.lstrip("-").isdigit() else text
        record = parse_json(members["json"])
        label = next(record[key] for key in (*_LABELS, "cls") if key in record)
        return label if isinstance(label, (int, str)) else quoted(label)
    except (KeyError, ValueError, TypeError, StopIteration) as error:
        raise IBNormError(
            f"{name} has the files {quoted(sorted(members))}; it must have the number of its class in .cls, or a label "
            "in .json"
        ) from error


def open_images(path: str | Path) -> ImageData:
    """Open labelled images.

    Args:
        path: a folder with one folder for each class, an .npz file, .parquet files, .tar shards, or a folder of these.

    Raises:
        IBNormError: nothing is there, or it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise IBNormError(f"{path} does not exist; {_WHAT}")
    kinds: dict[str, type[_Parquet] | type[_Shards]] = {".parquet": _Parquet, ".tar": _Shards}
    inside = path.rglob("*") if path.is_dir() else iter((path,))
    tables = [file for file in inside if file.suffix.lower() in kinds and file.is_file()]
    for suffix, kind in kinds.items():
        if files := tuple(sorted(file for file in tables if file.suffix.lower() == suffix)):
            return kind(files, path)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _Npz(path)
    if path.is_dir():
        found = _Folder(path)
        if found.total:
            return found
    raise IBNormError(f"{path} has no labelled images; {_WHAT}")
