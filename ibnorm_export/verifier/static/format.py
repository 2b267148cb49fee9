"""Check what readers of the format agree on: order, versions, names that are given once, and types of inputs.

Runtimes differ in what they make of a file that breaks such a rule, so one that runs it right shows nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import onnx

from ibnorm_export.artifacts.axes import PAST, TOTAL, axis_name
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.errors import quoted
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op.spec import DOMAIN, OP_VERSION
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import DataFlow

__all__ = ["check_format"]

#: Domains of operators that runtimes implement.
_STANDARD: Final = ("", "ai.onnx", "com.microsoft")

#: Where a tensor may hold its value.
_VALUES: Final = (
    *("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"),
    "external_data",
)

#: Operators that never fail, so that it does not matter that no output depends on them.
_HARMLESS: Final = frozenset({"Identity", "Shape", "Size", "Cast"})

#: Types of floating-point inputs.
_FLOATS: Final = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def check_format(flow: DataFlow, model: LoadedModel) -> Iterator[Finding]:
    """Find what runtimes read differently, or what a caller of the file does not expect.

    Args:
        flow: the data flow of the file.
        model: its checkpoint.
    """
    exported = flow.exported
    proto = exported.proto
    yield from _function_problems(proto)
    versions = Counter(entry.domain for entry in proto.opset_import)
    for domain in [domain for domain, count in versions.items() if count > 1]:
        yield Finding("opset", f"the file states two versions of domain {quoted(domain)}", code=FindingCode.OPSET)
    norms = [entry.version for entry in proto.opset_import if entry.domain == DOMAIN]
    used = bool(proto.functions) or any(node.domain == DOMAIN for node in proto.graph.node)
    if used and norms and norms != [OP_VERSION]:  # ONNX Runtime states a version of every domain that it knows
        yield Finding(
            "opset", f"the norms have version {norms[0]}; the version is {OP_VERSION}", code=FindingCode.OPSET
        )
    returned = [tensor.name for tensor in exported.outputs]
    by_name = exported.metadata.target is Target.ORT_GENAI  # its builder has its own order
    if not by_name and sorted(returned) == sorted(model.outputs) and returned != list(model.outputs):
        what = f"are in another order than those of an export: {', '.join(returned[:4])}"
        what += "; callers that take them by position get wrong ones"
        yield Finding("outputs", what, code=FindingCode.FILE_ORDER)
    yield from _repeated_names(proto.graph)
    yield from _tensor_problems(proto.graph)
    yield from _declared_problems(flow)
    yield from _returned_axes(flow, own_code=model.original is not None)
    yield from _type_problems(exported, model)
    yield from _axis_problems(exported, model)
    yield from _order_problems(proto.graph)
    yield from _idle_problems(flow)


def _type_problems(exported: ExportedModel, model: LoadedModel) -> Iterator[Finding]:
    """Inputs of another type than callers give."""
    whole = {spec.name for spec in model.inputs if not spec.floating}
    floating = {spec.name for spec in model.inputs if spec.floating}
    own_code = exported.metadata.config is None
    floats = (*_FLOATS, *((onnx.TensorProto.DOUBLE,) if own_code else ()))
    for value in exported.proto.graph.input:
        kind = value.type.tensor_type.elem_type
        wrong = (value.name in whole and kind != onnx.TensorProto.INT64) or (
            value.name in floating and kind not in floats
        )
        if wrong:
            name = onnx.TensorProto.DataType.Name(kind) if kind in onnx.TensorProto.DataType.values() else str(kind)
            given = "INT64" if value.name in whole else "FLOAT, or the half type of the file"
            yield Finding(f"input {value.name}", f"is {name}; callers give {given}", code=FindingCode.INPUT_TYPE)


def _axis_problems(exported: ExportedModel, model: LoadedModel) -> Iterator[Finding]:
    """Inputs whose axes are called otherwise: servers and transformers.js size what they allocate by these names."""
    known = {axis for spec in model.inputs for axis in spec.shape if isinstance(axis, str)}
    shapes = {tensor.name: tensor.shape for tensor in exported.inputs}
    for spec in model.inputs:
        shape = shapes.get(spec.name)
        if shape is None:
            continue
        if len(shape) != len(spec.shape):
            what = f"is declared with {len(shape)} axes; it has {len(spec.shape)}"
            yield Finding(f"input {spec.name}", what, code=FindingCode.INPUT_TYPE)
        for position, (found, wanted) in enumerate(zip(shape, spec.shape, strict=False)):
            name = axis_name(found) if isinstance(found, str) else found
            if isinstance(wanted, str) and name != wanted and name in known:
                what = f"calls axis {position} {name}; it is {wanted}, and callers allocate memory by these names"
                yield Finding(f"input {spec.name}", what, code=FindingCode.INPUT_TYPE)


def _repeated_names(graph: onnx.GraphProto) -> Iterator[Finding]:
    """Inputs, outputs or norms of one name: callers and profiles take one of them."""
    norms = [node.name for node in graph.node if node.domain == DOMAIN and node.name]
    for what, names in (
        ("input", [value.name for value in graph.input]),
        ("output", [value.name for value in graph.output]),
        ("norm node", norms),
    ):
        for name in [name for name, count in Counter(names).items() if count > 1]:
            yield Finding(f"{what} {quoted(name)}", "the file has two of this name", code=FindingCode.DECLARATION)


def _tensor_problems(graph: onnx.GraphProto) -> Iterator[Finding]:
    """Constants whose value is stored in two ways."""
    nodes = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    for tensor in (*graph.initializer, *nodes):
        stored = [name for name in _VALUES if len(getattr(tensor, name))]
        if len(stored) > 1:
            what = f"its value is in {' and in '.join(stored)}; which one is used depends on the runtime"
            yield Finding(f"constant {tensor.name}", what, code=FindingCode.CONSTANT_TWICE)
        keys = Counter(entry.key for entry in tensor.external_data)
        for key in [key for key, count in keys.items() if count > 1]:
            what = f"states the {quoted(key)} of its value twice; which one is used depends on the runtime"
            yield Finding(f"constant {tensor.name}", what, code=FindingCode.CONSTANT_TWICE)


def _declared_problems(flow: DataFlow) -> Iterator[Finding]:
    """Values whose axes are declared otherwise than they are computed: runtimes plan memory by what is declared."""
    graph = flow.exported.proto.graph
    known = {axis for value in graph.input for axis in flow.shapes.get(value.name, ()) if isinstance(axis, str)}
    for value in (*graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        for position, (dim, computed) in enumerate(zip(dims, flow.shapes.get(value.name, ()), strict=False)):
            found = dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            if computed in known and found != computed and (isinstance(found, int) or found in known):
                what = (
                    f"declares axis {position} as {found}; it is computed as {computed}, and runtimes plan memory by it"
                )
                yield Finding(f"value {quoted(value.name)}", what, code=FindingCode.DECLARATION)


def _returned_axes(flow: DataFlow, *, own_code: bool) -> Iterator[Finding]:
    """Axes of the logits, and the axis of a cache that grows, under the name of another axis.

    Args:
        flow: the data flow of the file.
        own_code: whether a user's code made the outputs, whose axes may be in any order.
    """
    graph = flow.exported.proto.graph
    inputs, outputs = (
        {v.name: [axis_name(d.dim_param) for d in v.type.tensor_type.shape.dim] for v in values}
        for values in (graph.input, graph.output)
    )
    rows = [] if own_code else inputs.get("input_ids", inputs.get("pixel_values", [])[:1])
    known = {axis for axes in inputs.values() for axis in axes if axis}
    for name, returned in outputs.items():
        past = inputs.get(f"past_key_values.{name.removeprefix('present.')}", []) if name.startswith("present.") else []
        expected = rows if name == "logits" else [TOTAL if axis == PAST else axis for axis in past]
        for position, (found, wanted) in enumerate(zip(returned, expected, strict=False)):
            if found in known and wanted and found != wanted:
                what = f"calls axis {position} {found}; it is {wanted}, and callers allocate memory by these names"
                yield Finding(f"output {name}", what, code=FindingCode.DECLARATION)


def _function_problems(proto: onnx.ModelProto) -> Iterator[Finding]:
    names = Counter((f.domain, f.name, f.overload) for f in proto.functions)
    for (domain, name, _), count in names.items():
        if count > 1:
            what = "the file has two of this name; which one is used depends on the runtime"
            yield Finding(f"function {name}", what, code=FindingCode.FUNCTION_TWICE)
        if domain in _STANDARD:
            what = "has the name of an operator that runtimes implement; some run the function in its place"
            yield Finding(f"function {name}", what, code=FindingCode.FUNCTION_TWICE)


def _order_problems(graph: onnx.GraphProto) -> Iterator[Finding]:
    """A node that reads what a later node writes: the format asks for the other order."""
    later = Counter(name for node in graph.node for name in node.output if name)
    for node in graph.node:
        early = [name for name in node.input if later.get(name, 0) > 0]
        if early:
            what = f"the {node.op_type} node {quoted(node.name)} reads {quoted(early[0])} before it is computed"
            yield Finding("order", what, code=FindingCode.FILE_ORDER)
            return
        later.subtract(name for name in node.output if name)


def _idle_problems(flow: DataFlow) -> Iterator[Finding]:
    """Nodes that no output depends on. Runtimes run them too, and they may fail, or never end, for some inputs."""
    for node in flow.unreached:
        fixed = all(flow.is_constant(name) for name in node.outputs if name)
        if not fixed and node.proto.op_type not in _HARMLESS:
            what = f"no output depends on the {node}, which runs all the same and may fail for some inputs"
            yield Finding("operators", what, code=FindingCode.OPERATOR_UNKNOWN)
