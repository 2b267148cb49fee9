"""Weights of a graph that stay in the model until they are written, and are converted and transposed in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from ibnorm_export.artifacts.mapped_pages import release_pages

__all__ = ["WeightTensor"]

#: Elements of a block. A block is large enough for the disk and small beside any model.
_BLOCK_ELEMENTS: Final = 1 << 22


class WeightTensor(ir.Tensor[Any]):
    """A parameter of a PyTorch model, whose values are read, converted and transposed when they are written.

    Args:
        source: the parameter as the checkpoint stores it.
        dtype: the type to write.
        name: its name in the graph.
        transposed: whether the transpose of `source`, a matrix, is written.
    """

    def __init__(self, source: Tensor, dtype: torch.dtype, *, name: str | None, transposed: bool = False) -> None:
        sizes = tuple(reversed(source.shape)) if transposed else tuple(source.shape)
        kind = ir.tensor_adapters.from_torch_dtype(dtype)
        super().__init__(source.detach(), kind, shape=ir.Shape(sizes), name=name)
        self._source = source.detach()
        self._torch_dtype = dtype
        self._transposed = transposed

    def transpose(self, name: str) -> WeightTensor:
        """Return the transpose of this matrix, which is computed when it is written."""
        return WeightTensor(self._source, self._torch_dtype, name=name, transposed=not self._transposed)

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes to write, a block at a time; the pages of a mapped file are given back as they are read."""
        source = self._source
        if not self._transposed:
            flat = source.reshape(-1)
            for part in torch.split(flat, _BLOCK_ELEMENTS):
                yield part.to(self._torch_dtype).view(torch.uint8).numpy()
                release_pages(part)
            return
        rows, columns = source.shape
        step = max(1, _BLOCK_ELEMENTS // max(1, rows))
        for start in range(0, columns, step):
            part = source[:, start : start + step].t()
            block = torch.empty(part.shape, dtype=self._torch_dtype).copy_(part)
            yield block.reshape(-1).view(torch.uint8).numpy()
        release_pages(source)

    def tofile(self, file: BinaryIO) -> None:
        """Write the values, a block at a time."""
        for block in self.blocks():
            file.write(block.data)

    def tobytes(self) -> bytes:
        return b"".join(block.tobytes() for block in self.blocks())

    def numpy(self) -> NDArray[Any]:
        values, start = np.empty(self.nbytes, dtype=np.uint8), 0
        for block in self.blocks():
            values[start : start + block.size] = block
            start += block.size
        return values.view(self.dtype.numpy()).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)
