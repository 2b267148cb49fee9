"""Read ONNX files that may be damaged or hostile.

Nothing here runs a model. External data must be in the file's folder and be as long as the file claims before any
of it is used. In the cache of Hugging Face, the file and its data are symbolic links to one folder of blobs, so data
may be where the file itself is linked to.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, BinaryIO, Final

import google.protobuf.message
import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
import onnx.numpy_helper
from numpy.typing import NDArray

from ibnorm_export.errors import ModelFileError, quoted, shortened
from ibnorm_export.files import has_file

__all__ = ["GENAI_CONFIG_FILE", "MODEL_FILE", "external_files", "is_onnx", "read_model", "read_tensor", "resolve"]

#: Name of the model in a folder.
MODEL_FILE: Final = "model.onnx"

#: What makes a folder one for onnxruntime-genai: how it runs the model.
GENAI_CONFIG_FILE: Final = "genai_config.json"

#: Attributes by which runtimes divide, some of them without a check, which ends the whole process. No other attribute
#: of the standard operators or of ONNX Runtime's does so (tried with 1.31).
_DIVISORS: Final = frozenset({"q_num_heads", "kv_num_heads", "group"})

#: How protobuf encodes the fields of a model: an integer, or a length and as many bytes.
_INTEGER, _WITH_LENGTH = 0, 2

#: Fields that every model has.
_NEEDED_FIELDS: Final = frozenset(
    {
        onnx.ModelProto.IR_VERSION_FIELD_NUMBER,
        onnx.ModelProto.GRAPH_FIELD_NUMBER,
        onnx.ModelProto.OPSET_IMPORT_FIELD_NUMBER,
    }
)

_ELEMENT_TYPES: Final = frozenset(onnx.TensorProto.DataType.values())

#: Types of attributes that have a value.
_ATTRIBUTE_TYPES: Final = frozenset(onnx.AttributeProto.AttributeType.values()) - {onnx.AttributeProto.UNDEFINED}


def resolve(path: str | Path) -> Path:
    """The .onnx file that `path` names: itself, or in a folder model.onnx or onnx/model.onnx (transformers.js)."""
    path = Path(path)
    files = (path / MODEL_FILE, path / "onnx" / MODEL_FILE)
    return next((file for file in files if file.is_file()), path)


def is_onnx(path: Path) -> bool:
    """Whether a file consists of whole fields of an ONNX model, with a graph; what the fields hold is not read."""
    with path.open("rb") as stream:
        try:
            return _outer_fields(stream) >= _NEEDED_FIELDS
        except ValueError:
            return False


def _outer_fields(stream: BinaryIO) -> set[int]:
    """The numbers of the fields of a protobuf message; ValueError if the stream holds anything else."""
    found: set[int] = set()
    size = os.fstat(stream.fileno()).st_size
    while stream.tell() < size:
        number, wire_type = divmod(_variable_integer(stream), 8)
        value = _variable_integer(stream)
        if wire_type == _WITH_LENGTH and value <= size - stream.tell():
            stream.seek(value, os.SEEK_CUR)
        elif wire_type != _INTEGER or number in found or number == 0:
            raise ValueError(f"field {number} is not one of a model")
        found.add(number)
    return found


def _variable_integer(stream: BinaryIO) -> int:
    """The number that the next bytes encode, seven bits each, the lowest first."""
    value = 0
    for shift in range(0, 64, 7):
        byte = int.from_bytes(stream.read(1) or b"\xff")
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("a number has no end")


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, without its external data.

    Raises:
        ModelFileError: the file is missing, unreadable, truncated or not ONNX, a tensor has an element type that this
            version of onnx does not know, or an attribute has no value or one by which no runtime can divide.
    """
    if not path.exists():
        target = shlex.quote(str(path if path.suffix == ".onnx" else path / MODEL_FILE))
        raise ModelFileError(f"{path} does not exist; write it first: ibnorm-export export CHECKPOINT -o {target}")
    if path.is_dir():
        raise ModelFileError(
            f"{path} is a folder without model.onnx; export a checkpoint first: ibnorm-export export "
            f"{shlex.quote(str(path))} -o {shlex.quote(f'{path.resolve().name}.onnx')}"
        )
    try:
        # Without an explicit format, onnx infers it from the suffix and reads model.json as JSON.
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise ModelFileError(
            f"{path} is truncated or is not an ONNX file: {shortened(str(error))}; copy or export it again"
        ) from error
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error
    if not model.graph.node or not model.opset_import:
        raise ModelFileError(f"{path} is truncated or is not an ONNX file: it has no graph; copy or export it again")
    _check_values(model, path)
    for value in (*model.graph.input, *model.graph.output):
        _check_element_type(value.name, value.type.tensor_type.elem_type, path)
    _check_attributes(model.graph, path)
    for body in (model.graph, *model.functions):
        _check_divisors(body, path)
    return model


def _check_values(model: onnx.ModelProto, path: Path) -> None:
    """Check that texts are UTF-8, whose bytes protobuf hands out otherwise, and that types of tensors are known."""
    waiting: list[Any] = [model]
    while waiting:
        message = waiting.pop()
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                waiting.extend((value,) if isinstance(value, google.protobuf.message.Message) else value)
            elif field.type == field.TYPE_STRING:
                texts = (value,) if isinstance(value, (str, bytes)) else value
                if any(isinstance(text, bytes) for text in texts):
                    what = f"{field.name} of a {type(message).__name__}"
                    raise ModelFileError(f"{path}: {what} is not UTF-8: it is damaged")
        if isinstance(message, onnx.TensorProto):  # an initializer, or an attribute of a node or of a function's node
            _check_element_type(message.name, message.data_type, path)


def _check_attributes(graph: onnx.GraphProto, path: Path) -> None:
    """Check that attributes have values: outside a function, one that refers to the function's has none."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name or attribute.type not in _ATTRIBUTE_TYPES:
                raise ModelFileError(
                    f"{path}: the attribute {quoted(attribute.name)} of the node {quoted(node.name)} has no value: the "
                    "file is damaged"
                )
            for subgraph in (attribute.g, *attribute.graphs):
                _check_attributes(subgraph, path)


def _check_divisors(body: onnx.GraphProto | onnx.FunctionProto, path: Path) -> None:
    for node in body.node:
        for attribute in node.attribute:
            if attribute.name in _DIVISORS and attribute.type == onnx.AttributeProto.INT and attribute.i < 1:
                raise ModelFileError(
                    f"{path}: {attribute.name} of the node {quoted(node.name)} is {attribute.i}; it must be 1 or more: "
                    "the file is damaged"
                )
            for subgraph in (attribute.g, *attribute.graphs):
                _check_divisors(subgraph, path)


def _check_element_type(name: str, number: int, path: Path) -> None:
    if number not in _ELEMENT_TYPES:
        raise ModelFileError(
            f"{path}: {quoted(name)} has element type {number}, which onnx {onnx.__version__} does not know: the file "
            "is damaged, or a newer version wrote it"
        )


def external_files(model: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """Check the external data of a model, and return its files.

    Args:
        model: the model, from `read_model`.
        path: the file that it was read from.

    Raises:
        ModelFileError: external data is missing, too short, or outside the file's folder.
    """
    files: dict[str, Path] = {}
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location, file = _external_file(tensor, path)
            files[location] = file
    return tuple(files.values())


def _external_file(tensor: onnx.TensorProto, path: Path) -> tuple[str, Path]:
    entry = {e.key: e.value for e in tensor.external_data}
    location = entry.get("location", "")
    if "\0" in location:
        raise ModelFileError(
            f"{path}: external data of {quoted(tensor.name)} is in {quoted(location)}, which is not a valid file name"
        )
    named = Path(location)
    file = path.parent / named
    folders = (path.parent.resolve(), path.resolve().parent)
    inside = location and not named.is_absolute() and ".." not in named.parts
    if not inside or not any(file.resolve().is_relative_to(folder) for folder in folders):
        raise ModelFileError(
            f"{path}: external data of {quoted(tensor.name)} points outside the file's folder: {quoted(location)}"
        )
    if not has_file(path.parent, location):
        raise ModelFileError(f"{path}: its external data {shortened(location)} is missing; put it next to the model")
    try:
        offset, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
    except ValueError as error:
        raise ModelFileError(
            f"{path}: external data of {quoted(tensor.name)} has no valid offset and length"
        ) from error
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise ModelFileError(
            f"{path}: its external data {shortened(location)} is truncated: {quoted(tensor.name)} ends at byte "
            f"{offset + length}, but the file has {file.stat().st_size} bytes; copy it again"
        )
    return location, file


def read_tensor(tensor: onnx.TensorProto, path: Path) -> NDArray[Any]:
    """Return the value of an initializer; external data is mapped into memory, not read.

    Args:
        tensor: the initializer. Its external data has been checked by `external_files`.
        path: the file that it was read from.

    Raises:
        ModelFileError: its bytes do not fit its declared type and shape.
    """
    try:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        entry = {e.key: e.value for e in tensor.external_data}
        return np.memmap(
            path.parent / entry["location"],
            dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
            mode="r",
            offset=int(entry.get("offset", 0)),
            shape=tuple(tensor.dims),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFileError(
            f"{path}: initializer {quoted(tensor.name)} is damaged: {shortened(str(error))}"
        ) from error
