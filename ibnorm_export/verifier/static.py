"""The static verdict: what the file says, node by node and weight by weight, against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from ibnorm_export.artifacts.exported_model import ExportedModel, NormNode
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.graph.quantization import BLOCK_SIZES, dequantize, step_sizes, stored_bits
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.verifier.coverage import Reach
from ibnorm_export.verifier.report import Finding, StaticReport

__all__ = ["check_static"]


def _float32(array: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(array, dtype=np.float32)  # exact for float16 and bfloat16


def _compare_weight(file: NDArray[Any], tensor: Tensor, *, dtype: torch.dtype, transposed: bool) -> str | None:
    wanted = tensor.detach().to(dtype).float() if tensor.is_floating_point() else tensor.detach()
    expected = (wanted.T if transposed else wanted).numpy()
    if file.shape != expected.shape:
        return f"shape is {file.shape}; the checkpoint has {expected.shape}"
    actual = _float32(file) if tensor.is_floating_point() else file
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    if same.all():
        return None
    wrong = int(same.size - np.count_nonzero(same))
    flips = int(np.count_nonzero((actual == -expected) & ~same))
    largest = float(np.nanmax(np.abs(actual.astype(np.float64) - expected)))
    signs = f", {flips} of them in sign alone" if flips else ""
    return f"{wrong} of {same.size} values differ from the checkpoint{signs}; largest difference {largest:.3g}"


def _is_stored(exported: ExportedModel, name: str) -> bool:
    return any(stored in exported.weights for stored in (name, f"{name}_Q4", f"{name}_Q8"))


def _compare_stored(
    exported: ExportedModel, name: str, *, tensor: Tensor, dtype: torch.dtype, transposed: bool
) -> str | None:
    """As `_compare_weight`, for a weight that may be quantised: then each value is within its checkpoint's step."""
    if name in exported.weights:
        return _compare_weight(exported.array(name), tensor, dtype=dtype, transposed=transposed)
    recorded, bits = exported.metadata.quantization, stored_bits(exported, name)
    if recorded is None or bits is None or bits not in (recorded.bits, recorded.head_bits):
        return (
            f"has {bits} bits a value; the metadata of the file speaks of {None if recorded is None else recorded.bits}"
        )
    if recorded.block_size not in BLOCK_SIZES:  # a vast block would have vast steps
        return f"is in blocks of {recorded.block_size}; they are of {', '.join(map(str, BLOCK_SIZES))}"
    try:
        values = dequantize(exported, name)
    except ModelFileError as error:
        return str(error)
    assert values is not None
    wanted = tensor.detach().float()
    expected = (wanted.T if transposed else wanted).numpy()
    if values.shape != expected.shape:
        return f"shape is {values.shape}; the checkpoint has {expected.shape}"
    allowed = step_sizes(expected, bits, block_size=recorded.block_size) * 1.001
    wrong = int(np.count_nonzero(~(np.abs(values - expected) <= allowed)))
    return f"{wrong} of {values.size} values are more than one step of their block off" if wrong else None


def _check_norm(node: NormNode, module: IBNorm, *, names: Mapping[int, set[str]]) -> Iterable[Finding]:
    spec = module.spec
    where = f"norm {node.module} (node {node.name})"
    plain = node.op_type.removeprefix("Skip")
    if plain != spec.op_type:
        yield Finding(where, f"op type is {node.op_type}; the checkpoint has {spec.op_type}")
    for name, expected in spec.attributes().items():
        if name not in node.attributes:
            yield Finding(where, f"attribute {name} is missing; it must be {expected!r}")
        elif node.attributes[name] != expected:
            yield Finding(where, f"attribute {name} is {node.attributes[name]!r}; the checkpoint has {expected!r}")
    for role, name, parameter in (("scale", node.scale, module.weight), ("bias", node.bias, module.bias)):
        state_name = "weight" if role == "scale" else "bias"
        constant = {"scale": "ones", "bias": "zeros"}[role]
        if not module.node_has_affine:  # over several axes: applied behind the node, which is as wide as they are
            if not name.startswith(f"ibnorm.{constant}."):
                yield Finding(where, f"{role} is connected to {name!r}; it must be ibnorm.{constant}.SIZE")
            continue
        wanted = f"{node.module}.{state_name}" if parameter is not None else f"ibnorm.{constant}.{module.features}"
        if name != wanted and name not in names.get(id(parameter), ()):  # a shared weight has several names
            yield Finding(where, f"{role} is connected to {name!r}; it must be {wanted!r}")


def _check_functions(model: ExportedModel) -> Iterable[Finding]:
    scales = [(n.op_type, model.weights[n.scale].dims) for n in model.norms if n.scale in model.weights]
    widths = [(op_type, dims[0]) for op_type, dims in scales if dims]  # without any it is no weight of the checkpoint
    canonical = onnx_op.functions(model.opset, widths)
    carried = {f.name: f for f in model.proto.functions if f.domain == DOMAIN}
    for op_type in sorted({node.op_type for node in model.norms}):
        where = f"function {op_type}"
        if op_type not in carried:
            yield Finding(where, "is not in the file, so runtimes without the kernel cannot run it")
            continue
        want, have = canonical[op_type], carried[op_type]
        if [n.op_type for n in have.node] != [n.op_type for n in want.node]:
            different = [
                f"{a.op_type} for {b.op_type}"
                for a, b in zip(have.node, want.node, strict=False)
                if a.op_type != b.op_type
            ]
            detail = ", ".join(different) or f"{len(have.node)} nodes for {len(want.node)}"
            yield Finding(where, f"its body is not the operator's: {detail}")
        elif _body(have) != _body(want):
            yield Finding(where, "its body is not the operator's: wiring or attributes differ")


def _body(function: onnx.FunctionProto) -> list[Any]:
    """What a function computes, free of the names of its values."""
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


def check_static(exported: ExportedModel, model: LoadedModel, *, reached: Reach) -> StaticReport:
    """Compare the file's norm nodes, functions and weights with the checkpoint; nothing is run."""
    findings: list[Finding] = []
    notes: list[str] = []
    dtype = torch_dtype(DType(exported.dtype))
    names: dict[int, set[str]] = {}
    for name, parameter in model.module.state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), set()).add(name)
    modules = {path: m for path, m in model.module.named_modules() if isinstance(m, IBNorm)}
    inlined = exported.metadata.inlined
    if inlined:
        notes.append(
            "the norms are inlined, so their nodes cannot be told from others: weights were compared, lambda and "
            "epsilon are judged by the numeric verdict alone"
        )
    else:
        nodes = {node.module: node for node in exported.norms}
        for path in modules:
            if path in reached.norms and path not in nodes:
                findings.append(Finding(f"norm {path}", "has no node in the file: the norm was dropped"))
        for node in exported.norms:
            if node.module not in modules:
                findings.append(Finding(f"norm {node.module}", "is in the file but not in the checkpoint"))
            else:
                findings.extend(_check_norm(node, modules[node.module], names=names))
        findings.extend(_check_functions(exported))
    for name in exported.weights:
        kind, _, _ = name.removeprefix("ibnorm.").partition(".")
        if name.startswith("ibnorm.") and kind in ("ones", "zeros"):
            constant = 1.0 if kind == "ones" else 0.0
            if not bool((_float32(exported.array(name)) == constant).all()):
                findings.append(Finding(f"constant {name}", f"must hold {constant:g} throughout"))

    state = model.module.state_dict(keep_vars=True)
    buffers = dict(model.module.named_buffers())
    compared = 0
    in_file: set[int] = set()
    for name, tensor in {**buffers, **state}.items():
        for stored, transposed in ((name, False), (f"{name}.T", True)):
            if not _is_stored(exported, stored):
                continue
            compared += 1
            in_file.add(id(tensor))
            # a buffer that no checkpoint saves keeps its own type in the file
            wanted = dtype if name in state else tensor.dtype
            problem = _compare_stored(exported, stored, tensor=tensor, dtype=wanted, transposed=transposed)
            if problem:
                findings.append(Finding(f"weight {stored}", problem))
    for stored, names_in in exported.metadata.packed.items():
        parts = [state[name] for name in names_in if name in state]
        if _is_stored(exported, stored) and len(parts) == len(names_in):
            compared += 1
            in_file.update(id(part) for part in parts)
            problem = _compare_stored(
                exported, stored, tensor=torch.cat(parts), dtype=dtype, transposed=stored.endswith(".T")
            )
            if problem:
                findings.append(Finding(f"weight {stored}", problem))
    for name, tensor in state.items():
        if id(tensor) not in in_file and name in reached.weights:
            findings.append(Finding(f"weight {name}", "is used by the checkpoint but is not in the file"))
    unused = [name for name, tensor in state.items() if name not in reached.weights and tensor.is_floating_point()]
    if unused:
        notes.append(f"{len(unused)} weights of the checkpoint play no part in its output: {', '.join(unused[:5])}")
    return StaticReport(len(modules) if inlined else len(exported.norms), compared, tuple(findings), tuple(notes))
