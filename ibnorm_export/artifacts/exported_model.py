"""An exported ONNX file: what it says of itself, its norm nodes and weights, and safe reading.

Nothing here runs a model, so a hostile file can be looked at: external data must lie beside the
file, inside its folder, and be as long as it claims before a byte of it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import google.protobuf.message
import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
import onnx.numpy_helper
from numpy.typing import NDArray

from ibnorm_export.artifacts.metadata import METADATA_FORMAT, ModelMetadata
from ibnorm_export.errors import ModelFileError
from ibnorm_export.op.spec import DOMAIN, OP_TYPES, SKIP_OP_TYPES

__all__ = [
    "CAPACITY",
    "MODEL_FILE",
    "ExportedModel",
    "NormNode",
    "Tensor",
    "resolve",
]

#: What the model is called in a folder of a language model.
MODEL_FILE: Final = "model.onnx"

#: Name of the axis of a cache that is kept in place.
CAPACITY: Final = "capacity"

_DTYPE_NAMES: Final[dict[int, str]] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.BOOL: "bool",
}


def dtype_name(elem_type: int) -> str:
    """Short name of an ONNX element type, e.g. "fp16"."""
    return _DTYPE_NAMES.get(elem_type) or str(onnx.TensorProto.DataType.Name(elem_type)).lower()


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: name, short dtype name, and shape with dynamic axes by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class NormNode:
    """One IBNorm or SkipIBNorm node of the graph; `module` is its path in the torch model."""

    name: str
    module: str
    _: KW_ONLY
    op_type: str
    attributes: Mapping[str, Any]
    scale: str
    bias: str


def _value(info: onnx.ValueInfoProto) -> Tensor:
    tensor = info.type.tensor_type
    shape = tuple(d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in tensor.shape.dim)
    return Tensor(info.name, dtype_name(tensor.elem_type), shape)


class ExportedModel:
    """An ONNX file on disk.

    Args:
        path: the .onnx file; external data is looked for beside it.

    Raises:
        ModelFileError: the file is missing, unreadable, truncated or not ONNX, a tensor in it is of
            no type of ONNX's, or its external data is missing, too short or outside its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = resolve(path)
        if not self.path.exists():
            raise ModelFileError(
                f"{self.path} does not exist; ibnorm-export export CHECKPOINT -o MODEL.onnx writes one"
            )
        if self.path.is_dir():
            raise ModelFileError(
                f"{self.path} is a folder without model.onnx; export a checkpoint first: ibnorm-export "
                f"export {self.path} -o MODEL.onnx"
            )
        try:
            # the format is said, for onnx takes it from the file's suffix otherwise: model.json is no ONNX file either
            self.proto = onnx.load(self.path, format="protobuf", load_external_data=False)
        except google.protobuf.message.DecodeError as error:
            raise ModelFileError(f"{self.path} is truncated or is not an ONNX file: {error}") from error
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if not self.proto.graph.node or not self.proto.opset_import:
            raise ModelFileError(f"{self.path} is truncated or is not an ONNX file: it has no graph")
        self._check_types()
        self._external = self._check_external()

    def _check_types(self) -> None:
        graph = self.proto.graph
        types = [(tensor.name, tensor.data_type) for tensor in graph.initializer]
        types += [(value.name, value.type.tensor_type.elem_type) for value in (*graph.input, *graph.output)]
        known = set(onnx.TensorProto.DataType.values())
        for name, number in types:
            if number not in known:
                raise ModelFileError(
                    f"{self.path}: {name!r} is of element type {number}, which onnx {onnx.__version__} does not know: "
                    "the file is damaged, or of a newer version"
                )

    def _check_external(self) -> tuple[Path, ...]:
        folder = self.path.resolve().parent
        files: dict[str, Path] = {}
        for tensor in onnx.external_data_helper._get_all_tensors(self.proto):
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entry = {e.key: e.value for e in tensor.external_data}
            location = entry.get("location", "")
            try:
                file = (folder / location).resolve()
            except ValueError as error:  # a NUL
                raise ModelFileError(
                    f"{self.path}: external data of {tensor.name!r} lies in {location!r}, which names no file"
                ) from error
            if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
                raise ModelFileError(
                    f"{self.path}: external data of {tensor.name!r} points outside the file's folder: {location!r}"
                )
            if not file.is_file():
                raise ModelFileError(f"{self.path}: its external data {location} is missing; it belongs beside it")
            try:
                offset, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
            except ValueError as error:
                raise ModelFileError(f"{self.path}: external data of {tensor.name!r} has no valid place") from error
            if offset < 0 or length < 0 or offset + length > file.stat().st_size:
                raise ModelFileError(
                    f"{self.path}: its external data {location} is truncated: {tensor.name!r} ends at byte "
                    f"{offset + length}, the file has {file.stat().st_size}"
                )
            files[location] = file
        return tuple(files.values())

    @property
    def external_files(self) -> tuple[Path, ...]:
        """Files of external data, beside the file or in folders there."""
        return self._external

    @cached_property
    def size_bytes(self) -> int:
        """Of the file and its external data."""
        return sum(file.stat().st_size for file in (self.path, *self._external))

    @cached_property
    def metadata(self) -> ModelMetadata:
        """What the export recorded about the model; empty for a file of another tool.

        Raises:
            ModelFileError: an entry is damaged.
        """
        return ModelMetadata.from_props({entry.key: entry.value for entry in self.proto.metadata_props}, self.path)

    def require_metadata(self) -> ModelMetadata:
        """`metadata`, in the format that this version reads.

        Raises:
            ModelFileError: there is none, it is damaged, or it is in another format.
        """
        if self.metadata.is_empty:
            raise ModelFileError(
                f"{self.path} carries no ibnorm metadata: it was not written by `ibnorm-export export`, or a tool "
                "stripped it. Export the checkpoint again"
            )
        if self.metadata.format != METADATA_FORMAT:
            raise ModelFileError(
                f"{self.path} has metadata format {self.metadata.format!r}; this version reads {METADATA_FORMAT!r}. "
                "Export the checkpoint again"
            )
        return self.metadata

    @property
    def opset(self) -> int:
        """Version of the default domain."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    @property
    def dtype(self) -> str:
        """ "fp32", "fp16" or "bf16": the type that the weights are computed in."""
        counts: Counter[str] = Counter()
        for tensor in self.proto.graph.initializer:
            name = dtype_name(tensor.data_type)
            if name in ("fp32", "fp16", "bf16"):
                counts[name] += int(np.prod(tensor.dims))
        return counts.most_common(1)[0][0] if counts else "fp32"

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        weights = {tensor.name for tensor in self.proto.graph.initializer}
        return tuple(_value(v) for v in self.proto.graph.input if v.name not in weights)

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(_value(v) for v in self.proto.graph.output)

    @cached_property
    def norms(self) -> tuple[NormNode, ...]:
        """Every IBNorm and SkipIBNorm node, in the order of the graph."""
        found = []
        for node in self.proto.graph.node:
            if node.domain != DOMAIN or node.op_type not in (*OP_TYPES, *SKIP_OP_TYPES):
                continue
            props = {p.key: p.value for p in node.metadata_props}
            attributes = {}
            for attribute in node.attribute:
                value = onnx.helper.get_attribute_value(attribute)
                attributes[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
            scale, bias = (*node.input[-2:], "", "")[:2]
            module = props.get("module", node.name)
            found.append(
                NormNode(node.name, module, op_type=node.op_type, attributes=attributes, scale=scale, bias=bias)
            )
        return tuple(found)

    @cached_property
    def operators(self) -> dict[str, int]:
        """How many nodes of each op type, most frequent first."""
        counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in self.proto.graph.node)
        return dict(counts.most_common())

    @cached_property
    def weights(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name; values are read with `array`."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def array(self, name: str) -> NDArray[Any]:
        """Value of an initializer; external data is mapped, not read.

        Raises:
            ModelFileError: its bytes do not make the tensor that it claims to be.
        """
        tensor = self.weights[name]
        try:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                return onnx.numpy_helper.to_array(tensor)
            entry = {e.key: e.value for e in tensor.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return np.memmap(
                self.path.parent / entry["location"],
                dtype=dtype,
                mode="r",
                offset=int(entry.get("offset", 0)),
                shape=tuple(tensor.dims),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ModelFileError(f"{self.path}: initializer {name!r} is damaged: {error}") from error


def resolve(path: str | Path) -> Path:
    """The .onnx file that `path` names: itself, or model.onnx in a folder."""
    path = Path(path)
    return path / MODEL_FILE if (path / MODEL_FILE).is_file() else path
