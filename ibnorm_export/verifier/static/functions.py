"""Compare the functions in a file with the definitions of the operators, as data flow.

The order of nodes, names of values, constants that are stored twice and nodes that no output depends on make no
difference; tools change all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op import onnx_functions
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import DataFlow

__all__ = ["check_functions"]

#: Operators whose inputs may be exchanged.
_COMMUTATIVE: Final = frozenset({"Add", "Mul", "Max", "Min", "And", "Or", "Xor", "Equal", "Sum"})

#: Attributes that give the value of a Constant, and the type that each stands for.
_CONSTANTS: Final = {
    "value_float": onnx.TensorProto.FLOAT,
    "value_floats": onnx.TensorProto.FLOAT,
    "value_int": onnx.TensorProto.INT64,
    "value_ints": onnx.TensorProto.INT64,
}


def check_functions(flow: DataFlow) -> Iterator[Finding]:
    """Compare the function that each norm node calls with the one that an export writes.

    Args:
        flow: the data flow of the file.
    """
    proto = flow.exported.proto
    norms = [node.proto for node in flow.nodes if node.proto.domain == DOMAIN]
    scales = [
        (n.op_type, flow.exported.weights[n.input[-2]].dims) for n in norms if n.input[-2] in flow.exported.weights
    ]
    widths = [(op_type, dims[0]) for op_type, dims in scales if dims]  # a scalar is not a weight of a checkpoint
    expected = onnx_functions.functions(flow.exported.opset, widths)
    # A node calls the function of its domain, op type and overload, not one that only has the same name.
    present = {(function.domain, function.name, function.overload): function for function in proto.functions}
    for op_type, overload in sorted({(node.op_type, node.overload) for node in norms} & _known(expected, norms)):
        where = f"function {op_type}:{overload}" if overload else f"function {op_type}"
        called = present.get((DOMAIN, op_type, overload))
        if called is None:
            yield Finding(
                where,
                "not in the file, so runtimes without the kernel cannot run it",
                code=FindingCode.FUNCTION_MISSING,
            )
        elif difference := _difference(called, expected[op_type]):
            yield Finding(
                where,
                f"the body differs from the operator's definition: {difference}",
                code=FindingCode.FUNCTION_DIFFERS,
            )


def _known(expected: Mapping[str, Any], norms: list[onnx.NodeProto]) -> set[tuple[str, str]]:
    return {(node.op_type, node.overload) for node in norms if node.op_type in expected}


def _difference(actual: onnx.FunctionProto, expected: onnx.FunctionProto) -> str:
    """How two bodies differ; empty if they compute the same."""
    numbers: dict[Any, int] = {}
    if _results(actual, numbers) == _results(expected, numbers):
        return ""
    numbers = {}
    if _results(actual, numbers, typed=False) == _results(expected, numbers, typed=False):
        return "a constant has another type, which runtimes refuse"
    found, wanted = (Counter(node.op_type for node in body.node) for body in (actual, expected))
    if found == wanted:
        return "wiring or attributes differ"
    extra, missing = (sorted((a - b).elements()) for a, b in ((found, wanted), (wanted, found)))
    if extra and missing:
        return f"{', '.join(extra)} instead of {', '.join(missing)}"
    return f"{', '.join(extra)} too many" if extra else f"{', '.join(missing)} left out"


def _results(function: onnx.FunctionProto, numbers: dict[Any, int], *, typed: bool = True) -> list[Any]:
    """What a function returns: its attributes, and a number for each output that stands for how it is computed.

    Args:
        function: the body.
        numbers: the number of every expression that was met; shared by the bodies that are compared.
        typed: whether the types of constants count.
    """
    opset = next((o.version for o in function.opset_import if o.domain == ""), 0)
    known = {"": -1}

    def number(expression: Any) -> int:
        return numbers.setdefault(expression, len(numbers))

    known.update((name, number(("input", position))) for position, name in enumerate(function.input))
    for node in function.node:
        inputs = [known.get(name, number(("undefined", name))) for name in node.input]
        if node.op_type == "Identity" and node.domain == "":
            known[node.output[0]] = inputs[0]
            continue
        if node.op_type in _COMMUTATIVE and node.domain == "":
            inputs.sort()
        what = _constant(node, typed=typed) or (node.domain, node.op_type, tuple(inputs), _attributes(node, opset))
        known.update((name, number((*what, position))) for position, name in enumerate(node.output))
    return [sorted(function.attribute), *(known.get(name) for name in function.output)]


def _constant(node: onnx.NodeProto, *, typed: bool) -> tuple[Any, ...] | None:
    """The value of a Constant, however it is written; None for another node and for a value that is an attribute."""
    if node.op_type != "Constant" or len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
        return None
    attribute = node.attribute[0]
    defined: Any = onnx.defs.get_schema("Constant").attributes  # onnx's stubs lack the members of its types
    if attribute.name in defined and attribute.type != int(defined[attribute.name].type.value):
        return "damaged constant", attribute.SerializeToString()
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor = value
    elif attribute.name in _CONSTANTS:
        shape = (len(value),) if attribute.name.endswith("s") else ()
        tensor = onnx.helper.make_tensor("", _CONSTANTS[attribute.name], shape, value if shape else [value])
    else:
        return None
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except (TypeError, ValueError):  # its values do not fit its shape or type: equal to no constant of the definition
        return "damaged constant", tensor.SerializeToString()
    if typed:
        return "constant", tensor.data_type, array.shape, array.tobytes()
    return "constant", tuple(np.asarray(array, dtype=np.float32).ravel().tolist())


def _attributes(node: onnx.NodeProto, opset: int) -> tuple[Any, ...]:
    """The version of the operator and its attributes, those that are left out with their defaults."""
    values: dict[str, Any] = {}
    version = 0
    if node.domain == "" and onnx.defs.has(node.op_type, opset):
        schema = onnx.defs.get_schema(node.op_type, opset)
        version = schema.since_version
        values = {
            name: repr(onnx.helper.get_attribute_value(a.default_value))
            for name, a in schema.attributes.items()
            if a.default_value.name
        }
    for attribute in node.attribute:
        values[attribute.name] = (
            ("attribute", attribute.ref_attr_name)
            if attribute.ref_attr_name
            else repr(onnx.helper.get_attribute_value(attribute))
        )
    return version, tuple(sorted(values.items(), key=lambda item: item[0]))
