"""Folders of torch.distributed.checkpoint: a `.metadata` file, and the pieces of every tensor in `__*.distcp` files.

Format: torch/distributed/checkpoint/metadata.py and filesystem.py of PyTorch 2.13. `.metadata` is a pickle: the size
and the pieces of every tensor, where each piece is (file, offset, length), and the keys that led to it in the state
dict that was saved. A piece is a file of torch.save. PyTorch's own reader loads the pickle without restrictions, so it
is not used.
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ibnorm_export.errors import CheckpointError, quoted
from ibnorm_export.files import has_file
from ibnorm_export.models.containers.plain_classes import plain_classes
from ibnorm_export.models.containers.safe_pickle import (
    Allowed,
    PlainObject,
    RefusedClassError,
    UnreadableError,
    read_pickle,
    shown,
)
from ibnorm_export.models.containers.stored_tensors import (
    DenseTensor,
    OtherTensor,
    StoredTensor,
    UnfitTensorError,
    map_file,
)
from ibnorm_export.models.containers.torch_files import read_torch_bytes

__all__ = ["METADATA_FILE", "read_distributed"]

METADATA_FILE: Final = ".metadata"

_MODULE: Final = "torch.distributed.checkpoint"
_CLASSES: Final = (
    "metadata.Metadata",
    "metadata.TensorStorageMetadata",
    "metadata.BytesStorageMetadata",
    "metadata.ChunkStorageMetadata",
    "metadata.MetadataIndex",
    "metadata.StorageMeta",
    "filesystem._StorageInfo",
)


class _Properties(PlainObject):
    """TensorProperties, whose state is a tuple that starts with the dtype."""

    __slots__ = ()

    def set_state(self, state: object) -> None:
        first = state[0] if isinstance(state, tuple) and state else None
        self.fields["dtype"] = first


def _classes() -> dict[str, Any]:
    allowed = plain_classes()
    for name in (f"{_MODULE}.{name}" for name in _CLASSES):
        allowed[name] = Allowed(name, lambda *_ignored, name=name: PlainObject(name))
    properties = f"{_MODULE}.metadata.TensorProperties"
    allowed[properties] = Allowed(properties, lambda *_ignored: _Properties(properties))
    encoding = f"{_MODULE}.metadata._MEM_FORMAT_ENCODING"
    allowed[encoding] = Allowed(encoding, lambda value=None: value)
    # Python 3.11 writes a member of an enum as getattr(class, name). Here it gives the name, and looks up nothing.
    allowed["builtins.getattr"] = Allowed("builtins.getattr", lambda _target, name: str(name))
    return allowed


def _field(record: object, name: str, kind: type) -> Any:
    """An attribute of a record of the metadata, checked."""
    value = record.fields.get(name) if isinstance(record, PlainObject) else None
    if not isinstance(value, kind):
        raise UnreadableError(f"{name} is {type(value).__name__}")
    return value


def _sizes(record: object, name: str) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = _field(record, name, tuple)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise UnreadableError(f"{name} is not a list of sizes")
    return sizes


@dataclass(frozen=True, slots=True)
class _Piece:
    """A box of a tensor, and where its values are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    data: memoryview
    source: str

    def load(self, dtype: torch.dtype) -> Tensor:
        """The values.

        Raises:
            UnfitTensorError: they are damaged, or not those that the metadata describes.
        """
        try:
            content = read_torch_bytes(self.data, self.source)
        except CheckpointError as error:
            raise UnfitTensorError(f"damaged: {error}") from error
        tensor = content.load() if isinstance(content, (DenseTensor, OtherTensor)) else None
        if tensor is None or tuple(tensor.shape) != self.sizes or tensor.dtype != dtype:
            raise UnfitTensorError(f"damaged: {self.source} does not have the piece that .metadata describes")
        return tensor


@dataclass(frozen=True, slots=True, eq=False)
class _ShardedTensor:
    """A tensor whose pieces are in one or more files."""

    name: str
    _: KW_ONLY
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[_Piece, ...]

    @property
    def identity(self) -> object:
        """Every one is its own: tied tensors are saved twice."""
        return self.name

    def load(self) -> Tensor:
        """The tensor; one that is in one piece is not copied."""
        self._check_pieces()
        if len(self.pieces) == 1:
            return self.pieces[0].load(self.dtype)
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            box = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))
            whole[box] = piece.load(self.dtype)
        return whole

    def _check_pieces(self) -> None:
        """The pieces must cover the tensor, and no place twice; their files must be large enough for them."""
        volume = sum(math.prod(piece.sizes) for piece in self.pieces)
        inside = all(
            len(piece.offsets) == len(piece.sizes) == len(self.shape)
            and all(at + size <= n for at, size, n in zip(piece.offsets, piece.sizes, self.shape, strict=True))
            for piece in self.pieces
        )
        if not inside or volume != math.prod(self.shape):
            raise UnfitTensorError("damaged: its pieces do not cover it")
        if volume * self.dtype.itemsize > sum(len(piece.data) for piece in self.pieces):
            raise UnfitTensorError("damaged: its pieces are larger than their files")
        if any(itertools.starmap(_overlap, itertools.combinations(self.pieces, 2))):
            raise UnfitTensorError("damaged: its pieces overlap")


def _overlap(one: _Piece, other: _Piece) -> bool:
    axes = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + other_size and b < a + size for a, size, b, other_size in axes)


class _Folder:
    """The metadata of a folder, and its mapped files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        content = read_pickle(io.BytesIO(map_file(folder / METADATA_FILE)), _classes())
        self.entries: dict[Any, Any] = _field(content, "state_dict_metadata", dict)
        paths = content.fields.get("planner_data")
        self.paths: dict[Any, Any] = paths if isinstance(paths, dict) else {}
        self.places: dict[tuple[Any, Any], PlainObject] = {}
        for index, place in _field(content, "storage_data", dict).items():
            offset = index.fields.get("offset") if isinstance(index, PlainObject) else None
            self.places[_field(index, "fqn", str), offset] = place
        self.files: dict[str, memoryview] = {}
        for name in sorted({_field(place, "relative_path", str) for place in self.places.values()}):
            self.files[name] = self._map(name)

    def _map(self, name: str) -> memoryview:
        if Path(name).name != name:
            raise CheckpointError(f"{self.path / METADATA_FILE} points outside its folder: {quoted(name)}")
        if not has_file(self.path, name):
            raise CheckpointError(
                f"{self.path / METADATA_FILE} names {shown(name)}, which is missing; copy the files of every rank into "
                "the folder"
            )
        return map_file(self.path / name)

    def data(self, name: str, offset: tuple[int, ...] | None) -> tuple[memoryview, str]:
        """The bytes of one piece, and what to call it."""
        place = self.places.get((name, offset))
        if place is None:
            raise UnreadableError(f"a piece of {shown(name)} has no place")
        if place.fields.get("transform_descriptors"):
            raise UnreadableError("its files are compressed or encrypted by an extension; save without it")
        file, start, length = (_field(place, "relative_path", str), *_span(place))
        if start + length > len(self.files[file]):
            raise CheckpointError(f"{self.path / file} is truncated: it has no byte {start + length}")
        return self.files[file][start : start + length], str(self.path / file)

    def tensor(self, name: str, entry: PlainObject) -> StoredTensor:
        """One tensor."""
        dtype = _field(_field(entry, "properties", PlainObject), "dtype", torch.dtype)
        pieces = []
        for chunk in _field(entry, "chunks", list):
            offsets = _sizes(chunk, "offsets")
            pieces.append(_Piece(offsets, _sizes(chunk, "sizes"), *self.data(name, offsets)))
        return _ShardedTensor(name, shape=_sizes(entry, "size"), dtype=dtype, pieces=tuple(pieces))

    def value(self, name: str) -> Any:
        """One value that is not a tensor; None if it is not plain data."""
        data, source = self.data(name, None)
        try:
            return read_torch_bytes(data, source)
        except CheckpointError:
            return None  # an object of training, such as a scheduler; nothing of it runs, and no weight is in it


def _span(place: PlainObject) -> tuple[int, int]:
    start, length = _field(place, "offset", int), _field(place, "length", int)
    if start < 0 or length < 0:
        raise UnreadableError("a piece is before the start of its file")
    return start, length


def _insert(tree: dict[Any, Any], path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UnreadableError(f"{key!s:.100} is both a value and a group of values")
    tree[path[-1]] = value


def read_distributed(folder: Path) -> tuple[dict[Any, Any], list[Path]]:
    """The content of a folder of torch.distributed.checkpoint, with a `StoredTensor` for each tensor, and its files.

    Raises:
        CheckpointError: a file is missing or damaged, or `.metadata` contains a class that it never has.
    """
    source = folder / METADATA_FILE
    content: dict[Any, Any] = {}
    try:
        read = _Folder(folder)
        for name, entry in read.entries.items():
            path = read.paths.get(name) or (name,)
            if not isinstance(name, str) or not isinstance(path, tuple) or not isinstance(entry, PlainObject):
                raise UnreadableError("an entry is damaged")
            is_tensor = entry.kind.endswith(".TensorStorageMetadata")
            _insert(content, path, read.tensor(name, entry) if is_tensor else read.value(name))
    except RefusedClassError as error:
        raise CheckpointError(
            f"{source} contains {error.name}, which torch.distributed.checkpoint never writes; nothing was loaded"
        ) from error
    except UnreadableError as error:
        raise CheckpointError(
            f"{source} is truncated, or torch.distributed.checkpoint did not write it: {shown(error)}"
        ) from error
    return content, [source, *(folder / name for name in read.files)]
