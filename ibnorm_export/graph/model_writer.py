"""Write an ONNX model without a second copy of its weights in memory, and check it without reading them again.

Protocol Buffers write a message from one buffer that holds all of it. Here the message without the large tensors is
made first, and those are put in between while the file is written. The bytes are those that onnx.save writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from ibnorm_export.graph.weight_tensors import WeightTensor

__all__ = ["message_without_values", "without_weights", "write_model"]

#: Larger tensors are written one by one; smaller ones are part of the message, where shape inference reads them.
#: What is computed when it is written is written one by one too, whatever its size: it may need much memory.
_LARGE_BYTES: Final = 1 << 16

_Message = TypeVar("_Message", onnx.ModelProto, onnx.GraphProto, onnx.TensorProto)


class _WithoutValues(ir.Tensor[Any]):
    """A tensor in place of one that is written later."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        super().__init__(
            np.empty(0),
            ir.DataType.DOUBLE,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        self._dtype = tensor.dtype  # the base class would refuse values of another type

    def tobytes(self) -> bytes:
        return b""


def _is_large(tensor: ir.TensorProtocol) -> bool:
    if isinstance(tensor, ir.LazyTensor):
        return True
    if isinstance(tensor, (ir.ExternalTensor, ir.StringTensor)) or tensor.nbytes <= _LARGE_BYTES:
        return False
    return not isinstance(tensor, ir.serde.TensorProtoTensor) or tensor.raw.HasField("raw_data")


def _varint(number: int) -> bytes:
    """A number in the base-128 form of Protocol Buffers."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _start(field: int, length: int) -> bytes:
    """What precedes a field of `length` bytes: its number with wire type 2, and the length."""
    return _varint(field << 3 | 2) + _varint(length)


def _only(message: _Message, numbers: range) -> bytes:
    """Serialise the fields of a message that have these numbers."""
    part = type(message)()
    for field, value in message.ListFields():
        if field.number not in numbers:
            continue
        if field.is_repeated:
            getattr(part, field.name).extend(value)
        elif field.type == field.TYPE_MESSAGE:
            getattr(part, field.name).CopyFrom(value)
        else:
            setattr(part, field.name, value)
    return bytes(part.SerializeToString())


#: A larger number than that of any field.
_END: Final = 1 << 29

#: Part of a file: bytes, or a tensor whose values come next.
_Part = bytes | ir.TensorProtocol


def _tensor_parts(message: onnx.TensorProto, tensor: ir.TensorProtocol | None) -> list[_Part]:
    """One initializer of a graph."""
    number = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
    if tensor is None:
        whole = message.SerializeToString()
        return [_start(number, len(whole)) + whole]
    values = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
    before = _only(message, range(values)) + _start(values, tensor.nbytes)
    after = _only(message, range(values + 1, _END))
    return [_start(number, len(before) + tensor.nbytes + len(after)) + before, tensor, after]


def _parts(message: onnx.ModelProto, tensors: list[ir.TensorProtocol | None]) -> Iterator[_Part]:
    """The file in order. Fields are written in the order of their numbers, as Protocol Buffers do."""
    graph, initializers = message.graph, onnx.GraphProto.INITIALIZER_FIELD_NUMBER
    parts: list[_Part] = [_only(graph, range(initializers))]
    for initializer, tensor in zip(graph.initializer, tensors, strict=True):
        parts += _tensor_parts(initializer, tensor)
    parts.append(_only(graph, range(initializers + 1, _END)))
    size = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)
    number = onnx.ModelProto.GRAPH_FIELD_NUMBER
    yield _only(message, range(number)) + _start(number, size)
    yield from parts
    yield _only(message, range(number + 1, _END))


def _write_values(tensor: ir.TensorProtocol, stream: BinaryIO) -> None:
    """Write the values of a tensor, which must be as many bytes as were announced."""
    start = stream.tell()
    if isinstance(tensor, WeightTensor):
        tensor.tofile(stream)
    else:
        array = np.ascontiguousarray(tensor.numpy()) if isinstance(tensor, ir.LazyTensor) else None
        stream.write(tensor.tobytes() if array is None else array.reshape(-1).view(np.uint8).data)
    if stream.tell() - start != tensor.nbytes:
        raise RuntimeError(f"{tensor.name} has {stream.tell() - start} bytes; its type and shape need {tensor.nbytes}")


def message_without_values(
    built: ir.Model, left_out: Callable[[ir.TensorProtocol], bool]
) -> tuple[onnx.ModelProto, list[ir.TensorProtocol | None]]:
    """Return a model as a message in which some initializers have no values.

    Args:
        built: the model; it is not changed.
        left_out: whether an initializer has no values there.

    Returns:
        The message, and by initializer the tensor that was left out, or None.
    """
    values = [v for v in built.graph.initializers.values() if v.const_value is not None]
    stored = [v.const_value for v in values if v.const_value is not None]
    omitted = [tensor if left_out(tensor) else None for tensor in stored]
    try:
        for value, tensor in zip(values, omitted, strict=True):
            if tensor is not None:
                value.const_value = _WithoutValues(tensor)
        return ir.serde.serialize_model(built), omitted
    finally:
        for value, tensor in zip(values, stored, strict=True):
            value.const_value = tensor


def write_model(built: ir.Model, file: Path) -> onnx.ModelProto:
    """Write a model of less than 2 GiB as one file, with one block of one weight in memory at a time.

    Args:
        built: the model; it is not changed.
        file: the file to write.

    Returns:
        The model without its large weights; see `without_weights`.
    """
    message, large = message_without_values(built, _is_large)
    with file.open("wb") as stream:
        for part in _parts(message, large):
            if isinstance(part, bytes):
                stream.write(part)
            else:
                _write_values(part, stream)
    return message


def without_weights(message: onnx.ModelProto) -> onnx.ModelProto:
    """Make inputs of the initializers of a model that have no values here, so that it can be checked without them.

    Args:
        message: a model whose large initializers are in another file, or were left out by `write_model`. It is changed.

    Returns:
        The same model; the type and shape of every value are what they were.
    """
    graph = message.graph
    inputs = {value.name for value in graph.input}
    kept = []
    for tensor in graph.initializer:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not external and (not tensor.HasField("raw_data") or tensor.raw_data or 0 in tensor.dims):
            kept.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return message
