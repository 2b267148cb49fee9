"""Read NumPy files from an untrusted source: .npz with arrays by name, .npy with one array, never pickles.

Headers are read before any array: a few MB of zeros, packed, claim as many GB. Names, types and sizes are checked
first, so a file that is refused costs no more memory than its headers.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError, quoted, shortened

__all__ = ["ArrayHeader", "read_headers", "read_npy", "read_npz", "read_rows"]

#: Bytes of arrays that every file may hold, and how many times its own size a file may hold in addition: token ids and
#: masks, packed, take a tenth of their bytes; only repetition takes a thousandth.
_FREE_BYTES: Final = 64 << 20
_MAX_RATIO: Final = 32

#: Bytes of a row, where an array is read row by row.
_MAX_ROW_BYTES: Final = 64 << 20

#: Arrays in a file, and bytes of the header of each: NumPy's own writes 128.
_MAX_ARRAYS: Final = 10_000
_MAX_HEADER_BYTES: Final = 1 << 14

_MAGIC: Final = b"\x93NUMPY"


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """What the header of an array claims: its shape and type, and whether its first axis is stored with stride 1."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


#: Raises for headers that a caller does not want; nothing has been allocated for the arrays yet.
_Check = Callable[[Mapping[str, ArrayHeader]], None]


def _no_check(headers: Mapping[str, ArrayHeader]) -> None:
    pass


def _read_header(stream: IO[bytes], stored_bytes: int) -> ArrayHeader:
    """Read the header of an array, whose file has `stored_bytes` bytes.

    Raises:
        ValueError: it is not an array of plain values, or its header does not fit its bytes.
    """
    start = stream.read(8)
    if start[:6] != _MAGIC or len(start) < 8:
        raise ValueError("it is not an array; save it with numpy.savez")
    length_bytes = 2 if start[6] == 1 else 4
    length = stream.read(length_bytes)
    size = int.from_bytes(length, "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {size} bytes; it must have at most {_MAX_HEADER_BYTES}")
    text = io.BytesIO(length + stream.read(size))
    if start[6] not in (1, 2, 3):
        raise ValueError(f"it has version {start[6]} of NumPy's format; it must be 1, 2 or 3")
    read = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(text)
    header = ArrayHeader(shape, dtype, fortran)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which run code when they are read; save plain numbers")
    if dtype.itemsize == 0 or any(size < 0 for size in shape):
        raise ValueError(f"its type {shortened(str(dtype))} and shape {quoted(shape)} hold no values")
    if 8 + length_bytes + size + header.size_bytes != stored_bytes:
        raise ValueError(
            f"its header claims {header.size_bytes} bytes for shape {quoted(shape)}, but "
            f"{max(0, stored_bytes - 8 - length_bytes - size)} follow"
        )
    return header


def _check_total(headers: Mapping[str, ArrayHeader], file_bytes: int) -> None:
    claimed, limit = sum(header.size_bytes for header in headers.values()), _FREE_BYTES + _MAX_RATIO * file_bytes
    if claimed > limit:
        raise ValueError(
            f"its arrays need {claimed} bytes, and a file of {file_bytes} bytes may hold at most {limit}; save arrays "
            "that large with numpy.savez, which does not compress"
        )


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by the name of the array."""
    found: dict[str, zipfile.ZipInfo] = {}
    entries = archive.infolist()
    if len(entries) > _MAX_ARRAYS:
        raise ValueError(f"it has {len(entries)} members; it may have at most {_MAX_ARRAYS}")
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if name in found:
            raise ValueError(f"it has two members named {quoted(name)}")
        found[name] = entry
    return found


def _headers(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> dict[str, ArrayHeader]:
    headers = {}
    for name, entry in members.items():
        with archive.open(entry) as member:
            try:
                headers[name] = _read_header(member, entry.file_size)
            except ValueError as error:
                raise ValueError(f"its member {quoted(name)} cannot be used: {error}") from error
    return headers


def _read_archive(stream: IO[bytes], file_bytes: int, *, check: _Check) -> Arrays:
    with zipfile.ZipFile(stream) as archive:
        members = _members(archive)
        headers = _headers(archive, members)
        _check_total(headers, file_bytes)
        check(headers)
        arrays = {}
        for name, entry in members.items():
            with archive.open(entry) as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
        return arrays


@contextmanager
def _opened(path: str | Path, what: str) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file and give its size; whatever the block raises becomes a ModelFileError that names the file."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as stream:
            yield stream, path.stat().st_size
    except ModelFileError:
        raise
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist; give {what}") from error
    # Deliberately broad: on malformed files, NumPy, zipfile, zlib, lzma and the header parser raise a dozen types of
    # exception (RuntimeError for an encrypted file), and the block only reads.
    except Exception as error:
        reason = shortened(str(error), 1000) or type(error).__name__
        raise ModelFileError(f"{path} is not {what}: {reason}") from error


def read_npz(path: str | Path, what: str, *, check: _Check = _no_check) -> Arrays:
    """Read an .npz file.

    Args:
        path: the file.
        what: what the file should be, with an article, for messages.
        check: called with the headers by name before any array is read; raises `ModelFileError` to refuse the file.

    Returns:
        Arrays by name.

    Raises:
        ModelFileError: the file is missing, damaged or encrypted, does not contain arrays by name, or claims far more
            bytes than it has.
    """
    with _opened(path, what) as (stream, size):
        if stream.read(len(_MAGIC)) == _MAGIC:
            raise ValueError("it contains one array; save each input under its name with numpy.savez")
        stream.seek(0)
        return _read_archive(stream, size, check=check)


def read_headers(path: str | Path, what: str) -> dict[str, ArrayHeader]:
    """Read what the arrays of an .npz file claim, and none of their values; arguments and errors as in `read_npz`."""
    with _opened(path, what) as (stream, _), zipfile.ZipFile(stream) as archive:
        return _headers(archive, _members(archive))


def read_rows(path: str | Path, name: str, *, what: str, start: int = 0) -> Iterator[NDArray[Any]]:
    """Yield the rows of one array of an .npz file, so that memory does not grow with the file.

    Args:
        path: the file.
        name: name of the array, which has at least one axis.
        what: what the file should be, with an article, for messages.
        start: number of the first row.

    Yields:
        Arrays without the first axis.

    Raises:
        ModelFileError: the file is damaged, or a row has more than 64 MiB.
    """
    with _opened(path, what) as (stream, _), zipfile.ZipFile(stream) as archive:
        entry = _members(archive)[name]
        with archive.open(entry) as member:
            header = _read_header(member, entry.file_size)
            count = header.size_bytes // max(1, header.shape[0])
            if count > _MAX_ROW_BYTES:
                raise ValueError(f"a row of {quoted(name)} has {count} bytes; it may have at most {_MAX_ROW_BYTES}")
            if header.fortran and len(header.shape) > 1:  # its rows are not in one piece
                with archive.open(entry) as whole:
                    yield from np.lib.format.read_array(whole, allow_pickle=False)[start:]
                return
            if start:  # where the member is compressed, this reads what it skips
                member.seek(start * count, io.SEEK_CUR)
            for _ in range(start, header.shape[0]):
                content = member.read(count)
                if len(content) < count:
                    raise ValueError(f"{quoted(name)} ends before its last row")
                yield np.frombuffer(content, dtype=header.dtype).reshape(header.shape[1:])


def read_npy(path: str | Path, what: str) -> NDArray[Any]:
    """Read a .npy file, which contains one array; arguments and errors are those of `read_npz`."""
    with _opened(path, what) as (stream, size):
        if stream.read(2) == b"PK":
            raise ValueError("it contains several arrays")
        stream.seek(0)
        _read_header(stream, size)
        stream.seek(0)
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array
