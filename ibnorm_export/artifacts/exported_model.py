"""An exported ONNX file: its metadata, inputs and outputs, norm nodes and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
from numpy.typing import NDArray

from ibnorm_export.artifacts.metadata import METADATA_FORMAT, ModelMetadata
from ibnorm_export.artifacts.onnx_file import external_files, read_model, read_tensor, resolve
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError, quoted
from ibnorm_export.op.spec import DOMAIN, OP_TYPES, SKIP_OP_TYPES
from ibnorm_export.text_report import counted

__all__ = ["ExportedModel", "NormNode", "Tensor", "dtype_name", "norm_node"]

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
    """An input or output.

    Args:
        name: its name in the graph.
        dtype: short name of the element type.
        shape: an integer for a fixed axis, a name for a dynamic axis; "?" for a dynamic axis without a name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class NormNode:
    """One IBNorm or SkipIBNorm node.

    Args:
        name: name of the node.
        module: path of the norm in the PyTorch model.
        op_type: e.g. "IBNormT" or "SkipIBNormT".
        attributes: values by name.
        scale, bias: names of the initializers.
    """

    name: str
    module: str
    _: KW_ONLY
    op_type: str
    attributes: Mapping[str, Any]
    scale: str
    bias: str


def _tensor(info: onnx.ValueInfoProto) -> Tensor:
    tensor = info.type.tensor_type
    shape = tuple(d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in tensor.shape.dim)
    return Tensor(info.name, dtype_name(tensor.elem_type), shape)


def norm_node(node: onnx.NodeProto) -> NormNode:
    """Read one node of this package's domain."""
    props = {p.key: p.value for p in node.metadata_props}
    attributes = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    scale, bias = (*node.input[-2:], "", "")[:2]
    module = props.get("module", node.name)
    return NormNode(node.name, module, op_type=node.op_type, attributes=attributes, scale=scale, bias=bias)


def _used_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that nodes read, those in subgraphs included."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _used_names(body)


class ExportedModel:
    """An ONNX file on disk; nothing is run.

    Args:
        path: the .onnx file, or a folder with model.onnx.
        data_folder: folder of the external data; None is that of the file, as in every file that is not a temporary
            copy.

    Raises:
        ModelFileError: the file is missing, unreadable, truncated or not ONNX, a tensor has an unknown element type,
            or external data is missing, too short or outside the file's folder.
    """

    def __init__(self, path: str | Path, *, data_folder: Path | None = None) -> None:
        self.path = resolve(path)
        self.data_folder = self.path.parent if data_folder is None else data_folder
        _ = self.external_files  # reads the file, so that a damaged one is an error here

    @classmethod
    def written(cls, path: Path) -> ExportedModel:
        """Return the file that this process has just written and checked; it is read when something of it is asked for.

        Reading takes twice the memory of its weights.
        """
        model = cls.__new__(cls)
        model.path, model.data_folder = path, path.parent
        return model

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model as the file has it, without its external data."""
        return read_model(self.path)

    @cached_property
    def external_files(self) -> tuple[Path, ...]:
        """Files of external data, in `data_folder` or below it."""
        return external_files(self.proto, self.data_folder / self.path.name)

    def __str__(self) -> str:
        norms = "norms expanded" if self.metadata.inlined else counted(len(self.norms), "IBNorm node")
        quantization = self.metadata.quantization
        stored = self.dtype if quantization is None else f"int{quantization.bits} weights"
        return f"{self.path}: {self.size_bytes / 1e6:.1f} MB, {stored}, opset {self.opset}, {norms}"

    @cached_property
    def size_bytes(self) -> int:
        """Size of the file and its external data."""
        return sum(file.stat().st_size for file in (self.path, *self.external_files))

    @cached_property
    def metadata(self) -> ModelMetadata:
        """What the export recorded about the model; empty for a file from another tool.

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
                f"{self.path} has no ibnorm metadata: it was not written by `ibnorm-export export`, or a tool "
                "stripped it. Export the checkpoint again"
            )
        if self.metadata.format != METADATA_FORMAT:
            raise ModelFileError(
                f"{self.path} has metadata format {quoted(self.metadata.format)}; this version reads "
                f"{METADATA_FORMAT!r}. Export the checkpoint again"
            )
        return self.metadata

    @property
    def opset(self) -> int:
        """Version of the default domain; 0 if the file has none."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    @property
    def dtype(self) -> DType:
        """The type that the model computes in: the one that the export recorded, or else that of most weights.

        An optimiser may have stored the weights in another type.

        Raises:
            ModelFileError: a metadata entry is damaged.
        """
        return self.stored_dtype if self.metadata.is_empty else self.metadata.dtype

    @property
    def stored_dtype(self) -> DType:
        """The type of most weights that a node uses."""
        counts: Counter[str] = Counter()
        used = set(_used_names(self.proto.graph))
        for tensor in self.proto.graph.initializer:
            name = dtype_name(tensor.data_type)
            if name in tuple(DType) and tensor.name in used:
                counts[name] += int(np.prod(tensor.dims))
        return DType(counts.most_common(1)[0][0]) if counts else DType.FP32

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs that the caller gives, in order."""
        return tuple(_tensor(value) for value in self.proto.graph.input if value.name not in self.weights)

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        """Outputs, in order."""
        return tuple(_tensor(value) for value in self.proto.graph.output)

    @cached_property
    def norms(self) -> tuple[NormNode, ...]:
        """Every IBNorm and SkipIBNorm node, in the order of the graph."""
        op_types = (*OP_TYPES, *SKIP_OP_TYPES)
        return tuple(norm_node(n) for n in self.proto.graph.node if n.domain == DOMAIN and n.op_type in op_types)

    @cached_property
    def operators(self) -> dict[str, int]:
        """Number of nodes by op type, most frequent first."""
        counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in self.proto.graph.node)
        return dict(counts.most_common())

    @cached_property
    def weights(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name; `array` reads their values."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def array(self, name: str) -> NDArray[Any]:
        """Return the value of an initializer; external data is mapped into memory, not read.

        Raises:
            ModelFileError: its bytes do not fit its declared type and shape.
        """
        return read_tensor(self.weights[name], self.data_folder / self.path.name)
