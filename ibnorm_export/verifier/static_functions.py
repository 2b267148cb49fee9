"""Compare the function bodies in a file with the definitions of the operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx.helper

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.op import onnx_functions
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.report import Finding

__all__ = ["check_functions"]


def check_functions(exported: ExportedModel) -> Iterator[Finding]:
    """Compare the function bodies in the file with those that an export writes."""
    scales = [(n.op_type, exported.weights[n.scale].dims) for n in exported.norms if n.scale in exported.weights]
    widths = [(op_type, dims[0]) for op_type, dims in scales if dims]  # a scalar is not a weight of a checkpoint
    expected = onnx_functions.functions(exported.opset, widths)
    present = {function.name: function for function in exported.proto.functions if function.domain == DOMAIN}
    for op_type in sorted({node.op_type for node in exported.norms}):
        where = f"function {op_type}"
        if op_type not in present:
            yield Finding(where, "not in the file, so runtimes without the kernel cannot run it")
        elif difference := _difference(present[op_type], expected[op_type]):
            yield Finding(where, f"the body differs from the operator's definition: {difference}")


def _difference(actual: onnx.FunctionProto, expected: onnx.FunctionProto) -> str:
    """How two bodies differ; empty if they compute the same."""
    if [n.op_type for n in actual.node] == [n.op_type for n in expected.node]:
        return "" if _canonical(actual) == _canonical(expected) else "wiring or attributes differ"
    replaced = [
        f"{a.op_type} instead of {b.op_type}"
        for a, b in zip(actual.node, expected.node, strict=False)
        if a.op_type != b.op_type
    ]
    return ", ".join(replaced) or f"{len(actual.node)} nodes instead of {len(expected.node)}"


def _canonical(function: onnx.FunctionProto) -> list[Any]:
    """What a function computes, with its values numbered instead of named."""
    numbers: dict[str, int] = {"": -1}
    for name in function.input:
        numbers.setdefault(name, len(numbers))
    body: list[Any] = [list(function.attribute)]
    for node in function.node:
        inputs = [numbers.get(name, f"undefined {name}") for name in node.input]
        for name in node.output:
            numbers.setdefault(name, len(numbers))
        attributes = sorted(
            (a.name, a.ref_attr_name or repr(onnx.helper.get_attribute_value(a))) for a in node.attribute
        )
        body.append((node.domain, node.op_type, inputs, attributes, [numbers[n] for n in node.output]))
    return [*body, [numbers.get(name) for name in function.output]]
