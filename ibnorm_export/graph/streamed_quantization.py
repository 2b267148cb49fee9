"""Quantise the matrices of a model one by one, when they are written.

The quantizer works on a message that holds all weights. Here it gets a stand-in of one value for each matrix, and so
makes the nodes and names of the whole model without their values. Each matrix is quantised separately, when it is
written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Final

import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
from numpy.typing import NDArray

from ibnorm_export.graph.model_writer import message_without_values
from ibnorm_export.graph.quantization import Quantization, quantize, quantize_matrix

__all__ = ["quantize_when_written"]

#: Smaller tensors stay in the message.
_SMALL_BYTES: Final = 1 << 16


@dataclass(slots=True)
class _LastParts:
    """The parts of the matrix that was quantised last: of all matrices of a model, only its parts are kept."""

    matrix: _Matrix | None = None
    parts: dict[str, NDArray[Any]] = field(default_factory=dict)


class _Matrix:
    """A matrix and its parts when it is quantised. They are made together, and each is kept until it is read.

    Args:
        tensor: the matrix, (k, n).
        last: what the matrices of a model share, so that the parts of one of them are in memory at a time.
        bits: bits of each value.
        block_size: number of values along k in a block.
    """

    def __init__(self, tensor: ir.TensorProtocol, last: _LastParts, *, bits: int, block_size: int) -> None:
        self._tensor = tensor
        self._last = last
        self._bits = bits
        self._block_size = block_size

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._tensor.shape.numpy()
        return rows, columns

    def read(self, part: str) -> ir.Tensor[Any]:
        """One of the parts, "_scales" for example."""
        last = self._last
        if last.matrix is not self or part not in last.parts:
            last.matrix, last.parts = self, {}  # before the new ones are made
            last.parts = quantize_matrix(self._tensor.numpy(), bits=self._bits, block_size=self._block_size)
        return ir.Tensor(last.parts.pop(part))

    def part(self, name: str, suffix: str) -> ir.LazyTensor:
        """One of the parts as a tensor of a graph that is read later."""
        rows, columns = self.shape
        blocks, packed = -(-rows // self._block_size), 8 // self._bits
        shape, dtype = {
            f"_Q{self._bits}": ((columns, blocks, self._block_size // packed), ir.DataType.UINT8),
            "_scales": ((columns, blocks), self._tensor.dtype),
            "_zero_points": ((columns, -(-blocks // packed)), ir.DataType.UINT8),
        }[suffix]
        read = functools.partial(self.read, suffix)
        return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)


def _stand_in(tensor: onnx.TensorProto) -> None:
    """Leave one value of a matrix, which is 0."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.ClearField("dims")
    tensor.dims.extend((1, 1))
    tensor.raw_data = bytes(dtype.itemsize)


def quantize_when_written(built: ir.Model, wanted: Quantization) -> ir.Model:
    """Return what `quantize` returns, with one matrix in memory at a time, when the model is written.

    Args:
        built: the model; do not use it afterwards.
        wanted: how to store the matrices.

    Raises:
        ExportError: the model has no constant matrices.
        BackendUnavailable: onnxruntime is not installed.
    """
    factors = {node.inputs[1] for node in built.graph if node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1}
    stored = {name: value.const_value for name, value in built.graph.initializers.items()}
    matrices = {
        value.name: tensor
        for value in factors
        if value is not None and (tensor := stored.get(value.name or "")) is not None and len(tensor.shape) == 2
    }
    message, omitted = message_without_values(built, lambda t: t.nbytes > _SMALL_BYTES or t.name in matrices)
    for tensor in message.graph.initializer:
        if tensor.name in matrices:
            _stand_in(tensor)
    message = quantize(message, wanted)
    kept = {tensor.name: tensor for tensor in omitted if tensor is not None}
    parts: dict[str, ir.TensorProtocol] = {}
    last = _LastParts()
    for node in message.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type != "MatMulNBits":
            continue
        bits, block_size = attributes["bits"].i, attributes["block_size"].i
        name = node.input[1].removesuffix(f"_Q{bits}")
        matrix = _Matrix(matrices[name], last, bits=bits, block_size=block_size)
        attributes["K"].i, attributes["N"].i = matrix.shape
        for part in node.input[1:]:
            parts[part] = matrix.part(part, part.removeprefix(name))
    result = ir.serde.deserialize_model(message)
    for name, value in result.graph.initializers.items():
        tensor = parts.get(name, kept.get(name))
        if tensor is not None:
            value.const_value = tensor
            value.shape = ir.Shape(tensor.shape.numpy())
    return result
