"""Check that the types in a file agree: inputs with what operators take, and outputs with what they declare."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Final

import onnx
import onnx.checker
import onnx.shape_inference

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import light_model

__all__ = ["check_types"]

#: Attributes that state the type in which an operator computes inside.
_PRECISIONS: Final = frozenset({"stash_type", "softmax_precision"})

#: How ONNX's inference reports that types differ. Other problems are about shapes, which the builder of
#: onnxruntime-genai declares wrongly for some constants.
_ABOUT_TYPES: Final = re.compile(r"elem type|inconsistent type|type constraint|TypeInferenceError|type mismatch", re.I)


def check_types(exported: ExportedModel) -> Iterator[Finding]:
    """Infer the type of every value and compare it with what operators take and the file declares.

    Operators of other domains are not checked; nothing is inferred after them.
    """
    graph = exported.proto.graph
    yield from _repeated_constants(graph)
    if exported.metadata.config is not None:  # the user's own code may return float64
        yield from _double_outputs(graph)
    for node in graph.node:
        yield from _narrow_arithmetic(node)
    yield from _unsound_types(exported.proto)


def _repeated_constants(graph: onnx.GraphProto) -> Iterator[Finding]:
    names = Counter([t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer])
    for name in [name for name, count in names.items() if count > 1]:
        what = "the file has two of this name; which one is used depends on the runtime"
        yield Finding(f"constant {name}", what, code=FindingCode.CONSTANT_TWICE)


def _double_outputs(graph: onnx.GraphProto) -> Iterator[Finding]:
    for output in graph.output:
        if output.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            what = "is float64, which the checkpoint does not give"
            yield Finding(f"output {output.name}", what, code=FindingCode.OUTPUT_FLOAT64)


def _narrow_arithmetic(node: onnx.NodeProto) -> Iterator[Finding]:
    """An operator that computes inside in half precision."""
    for attribute in node.attribute:
        if attribute.name in _PRECISIONS and attribute.i in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            where = f"types of the {node.op_type} node {node.name or node.output[0]!r}"
            kind = onnx.TensorProto.DataType.Name(attribute.i)
            what = f"computes in {kind}, where PyTorch computes in float32 ({attribute.name})"
            yield Finding(where, what, code=FindingCode.NODE_PRECISION)


def _unsound_types(model: onnx.ModelProto) -> Iterator[Finding]:
    """What ONNX's inference reports about types."""
    try:
        onnx.shape_inference.infer_shapes(light_model(model), check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        for line in [line for line in lines if _ABOUT_TYPES.search(line)][:3]:
            yield Finding("types", f"a runtime cannot load the file: {line[:200]}", code=FindingCode.TYPES_UNSOUND)
    except (ValueError, onnx.checker.ValidationError) as error:  # a type that ONNX lacks, or two functions of one name
        yield Finding("types", f"a runtime cannot load the file: {error}", code=FindingCode.TYPES_UNSOUND)
