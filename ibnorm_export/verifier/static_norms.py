"""Check that every norm of the checkpoint has a node in the file with the right attributes and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ibnorm_export.artifacts.exported_model import ExportedModel, NormNode
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.verifier.coverage import Coverage
from ibnorm_export.verifier.report import Finding

__all__ = ["check_norms"]


def check_norms(exported: ExportedModel, model: LoadedModel, *, coverage: Coverage) -> Iterator[Finding]:
    """Compare the norm nodes of the file with the IBNorm modules of the checkpoint."""
    modules = {path: module for path, module in model.module.named_modules() if isinstance(module, IBNorm)}
    shared_names: dict[int, set[str]] = {}
    for name, parameter in model.module.state_dict(keep_vars=True).items():
        shared_names.setdefault(id(parameter), set()).add(name)
    present = {node.module for node in exported.norms}
    for path in modules:
        if path in coverage.norms and path not in present:
            yield Finding(f"norm {path}", "no node in the file: the norm was dropped")
    for node in exported.norms:
        if node.module not in modules:
            yield Finding(f"norm {node.module}", "in the file but not in the checkpoint")
            continue
        where = f"norm {node.module} (node {node.name})"
        module = modules[node.module]
        problems = (*_attribute_problems(node, module), *_affine_problems(node, module, shared_names=shared_names))
        yield from (Finding(where, problem) for problem in problems)


def _attribute_problems(node: NormNode, module: IBNorm) -> Iterator[str]:
    spec = module.spec
    if node.op_type.removeprefix("Skip") != spec.op_type:
        yield f"op type is {node.op_type}; the checkpoint has {spec.op_type}"
    for name, expected in spec.attributes().items():
        if name not in node.attributes:
            yield f"attribute {name} is missing; it must be {expected!r}"
        elif node.attributes[name] != expected:
            yield f"attribute {name} is {node.attributes[name]!r}; the checkpoint has {expected!r}"


def _affine_problems(node: NormNode, module: IBNorm, *, shared_names: Mapping[int, set[str]]) -> Iterator[str]:
    """Scale and bias that are connected to another weight; a shared weight has several names."""
    for role, state_name, connected, parameter, constant in (
        ("scale", "weight", node.scale, module.weight, "ones"),
        ("bias", "bias", node.bias, module.bias, "zeros"),
    ):
        if not module.node_has_affine:  # over several axes: applied after the node, which is as wide as they are
            if not connected.startswith(f"ibnorm.{constant}."):
                yield f"{role} is connected to {connected!r}; it must be ibnorm.{constant}.SIZE"
            continue
        expected = f"{node.module}.{state_name}" if parameter is not None else f"ibnorm.{constant}.{module.features}"
        if connected != expected and connected not in shared_names.get(id(parameter), ()):
            yield f"{role} is connected to {connected!r}; it must be {expected!r}"
