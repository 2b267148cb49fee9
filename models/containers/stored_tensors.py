"""Tensors in a file: what a checkpoint says about each, and the tensor itself when it is needed."""

from __future__ import annotations

import math
import mmap
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ibnorm_export.errors import CheckpointError

__all__ = ["DenseTensor", "OtherTensor", "Storage", "StoredTensor", "UnfitTensorError", "map_file"]

#: Elements that an expanded tensor may have beyond its storage; more is a small file that asks for much memory.
_MOST_EXPANDED = 1 << 20


class UnfitTensorError(Exception):
    """A tensor of a checkpoint cannot be used; the message is what it is, after "NAME is"."""


class StoredTensor(Protocol):
    """A tensor of a checkpoint that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def identity(self) -> object:
        """Equal for tied tensors, which are the same values in the file."""

    def load(self) -> Tensor:
        """Read the tensor.

        Raises:
            UnfitTensorError: it is damaged, or of a kind that no model file can hold.
        """


@dataclass(slots=True, eq=False)
class Storage:
    """Bytes in a file that tensors are views of.

    Args:
        element: the type of its elements.
        elements: their number.
        data: the bytes; None until their place in the file is known.
    """

    element: torch.dtype
    elements: int
    data: memoryview | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """All elements as a flat tensor, which shares the file's memory unless the bytes are not aligned."""
        size = self.elements * self.element.itemsize
        if self.data is None or len(self.data) < size:
            there = "no bytes" if self.data is None else f"{len(self.data)} bytes"
            raise UnfitTensorError(f"damaged: its storage has {size} bytes, and the file has {there} of it")
        if size < dtype.itemsize:
            return torch.empty(0, dtype=dtype)
        count = size // dtype.itemsize
        flat = torch.frombuffer(self.data, dtype=dtype, count=count)
        if flat.data_ptr() % dtype.itemsize:
            return torch.frombuffer(bytearray(self.data[: count * dtype.itemsize]), dtype=dtype)
        return flat


@dataclass(frozen=True, slots=True, eq=False)
class DenseTensor:
    """A tensor with a storage.

    Args:
        storage: its bytes.
        offset: first element.
        shape: sizes of the axes.
        stride: elements between neighbours on each axis.
        dtype: the type of its elements.
    """

    storage: Storage
    _: KW_ONLY
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def identity(self) -> object:
        """Equal for tied tensors."""
        return id(self.storage), self.offset, self.shape, self.stride

    def load(self) -> Tensor:
        """The tensor, a view of the mapped file."""
        if self.dtype.is_complex:
            raise UnfitTensorError(f"complex ({_short(self.dtype)}), and ONNX models have real weights")
        values = self.storage.values(self.dtype)
        elements = math.prod(self.shape)
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if min((0, self.offset, *self.shape, *self.stride)) < 0 or (elements and last >= len(values)):
            raise UnfitTensorError(
                f"damaged: shape {self.shape}, stride {self.stride} and offset {self.offset} do not fit its storage of "
                f"{len(values)} elements"
            )
        if elements > max(len(values), _MOST_EXPANDED):
            raise UnfitTensorError(f"damaged: shape {self.shape} has more elements than its storage, {len(values)}")
        return values.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, slots=True, eq=False)
class OtherTensor:
    """A tensor that no model file can hold: quantised, sparse, without values, ...

    Args:
        kind: what it is, after "NAME is".
        shape: sizes of the axes, if known.
    """

    kind: str
    shape: tuple[int, ...] = ()

    @property
    def identity(self) -> object:
        """Every one is its own."""
        return id(self)

    def load(self) -> Tensor:
        """Refuse."""
        raise UnfitTensorError(self.kind)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped: they are read when they are used, and changes do not reach the file.

    Raises:
        CheckpointError: it is empty or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    except PermissionError:
        raise  # every command reports it in the same words
    except ValueError as error:
        raise CheckpointError(f"{path} is empty, so it is truncated or was not written completely") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
