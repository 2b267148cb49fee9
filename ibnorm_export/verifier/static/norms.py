"""Check that every norm of the checkpoint has a node in the file with the right attributes, weights and order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ibnorm_export.artifacts.exported_model import NormNode, norm_node
from ibnorm_export.errors import quoted
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.dataflow import DataFlow
from ibnorm_export.verifier.static.inlined import InlinedNorms

__all__ = ["check_norms", "norm_nodes"]

#: The end of the name of the second and later nodes of a module.
_REPEATED: Final = re.compile(r"#\d+$")


def norm_nodes(flow: DataFlow) -> tuple[NormNode, ...]:
    """The norm nodes that an output depends on."""
    found = (norm_node(node.proto) for node in flow.nodes if node.proto.domain == DOMAIN)
    return tuple(found)


def _module(node: NormNode, modules: Mapping[str, IBNorm]) -> str:
    """The module of a node; its name where a tool has dropped the metadata of nodes, or the owner of its scale."""
    if not node.module:
        return node.scale.removesuffix(".weight")
    return node.module if node.module in modules else _REPEATED.sub("", node.module)


def check_norms(
    flow: DataFlow,
    modules: Mapping[str, IBNorm],
    *,
    coverage: Coverage,
    holds: Callable[[str, Tensor], bool],
    inlined: InlinedNorms,
) -> Iterator[Finding]:
    """Compare the norms of the file with the IBNorm modules of the checkpoint.

    Args:
        flow: the data flow of the file.
        modules: the norms of the checkpoint by their path.
        coverage: how often each norm ran, in the order in which they ran.
        holds: (name of a constant of the file, weight) -> whether it has the value of the weight.
        inlined: the norms of the file that have no node.
    """
    nodes = norm_nodes(flow)
    count = Counter(_module(node, modules) for node in nodes)
    for path, ran in coverage.norms.items():
        if path in modules and count[path] != ran and (count[path] or not inlined.take(modules[path], count=ran)):
            yield Finding(
                f"norm {path}", _count_problem(modules[path], count[path], ran=ran), code=FindingCode.NORM_COUNT
            )
    for node in nodes:
        path = _module(node, modules)
        if path not in modules:
            yield Finding(f"norm {node.module}", "in the file but not in the checkpoint", code=FindingCode.NORM_UNKNOWN)
            continue
        where = f"norm {path} (node {node.name})"
        problems = (
            *_attribute_problems(node, modules[path]),
            *_affine_problems(node, path, modules[path], holds=holds),
        )
        yield from (Finding(where, problem, code=FindingCode.NORM_DIFFERS) for problem in problems)
    yield from _order_problems(flow, modules, coverage=coverage)


def _count_problem(norm: IBNorm, count: int, *, ran: int) -> str:
    if count:
        return f"has {counted(count, 'node')}, but the module runs {counted(ran, 'time')}"
    return (
        f"no output depends on a node of it, or on standard operators that compute {norm.spec} with its weights: the "
        "norm was dropped or changed"
    )


def _attribute_problems(node: NormNode, module: IBNorm) -> Iterator[str]:
    spec = module.spec
    if node.op_type.removeprefix("Skip") != spec.op_type:
        yield f"op type is {node.op_type}; the checkpoint has {spec.op_type}"
    for name, expected in spec.attributes().items():
        if name not in node.attributes:
            yield f"attribute {name} is missing; it must be {_shown(expected)}"
        elif node.attributes[name] != expected:
            yield f"attribute {name} is {_shown(node.attributes[name])}; the checkpoint has {_shown(expected)}"
    for name in sorted(node.attributes.keys() - spec.attributes().keys()):
        yield f"attribute {quoted(name)} is none of the operator's, and kernels may refuse it"


def _shown(value: object) -> str:
    """An attribute, with the digits that its float32 needs."""
    return str(np.float32(value)) if isinstance(value, float) else repr(value)


def _affine_problems(
    node: NormNode, path: str, module: IBNorm, *, holds: Callable[[str, Tensor], bool]
) -> Iterator[str]:
    """Scale and bias that are connected to another weight. The value counts, because tools rename."""
    for role, connected, parameter, constant in (
        ("scale", node.scale, module.weight, torch.ones),
        ("bias", node.bias, module.bias, torch.zeros),
    ):
        # Over several axes, scale and bias are applied after the node, which is as wide as they are.
        kind = f"ibnorm.{constant.__name__}."
        if not module.node_has_affine:
            if not connected.startswith(kind):
                yield f"{role} is connected to {connected!r}; it must be {kind}SIZE"
            continue
        own = f"{path}.{'weight' if role == 'scale' else 'bias'}"
        expected = f"{kind}{module.features}" if parameter is None else own
        value = constant(module.features) if parameter is None else parameter
        if connected != expected and not holds(connected, value):
            yield f"{role} is connected to {connected!r}; it must be {expected!r}"


def _order_problems(flow: DataFlow, modules: Mapping[str, IBNorm], *, coverage: Coverage) -> Iterator[Finding]:
    """Norms that depend on a norm that runs after them in PyTorch."""
    before = flow.norms_before()
    paths = {n.outputs[0]: _module(norm_node(n.proto), modules) for n in flow.nodes if n.proto.domain == DOMAIN}
    once = {path for path, number in Counter(paths.values()).items() if number == coverage.norms.get(path) == 1}
    rank = {path: position for position, path in enumerate(coverage.norms)}
    for output, sources in before.items():
        path = paths[output]
        later = sorted({paths[s] for s in sources} & once, key=lambda p: rank[p]) if path in once else []
        if later and rank[later[-1]] > rank[path]:
            what = f"depends on norm {later[-1]}, which runs after it in the checkpoint: they were exchanged"
            yield Finding(f"norm {path}", what, code=FindingCode.NORM_ORDER)
