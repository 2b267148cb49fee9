"""The static verdict: what the file states, node by node and weight by weight, against the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
from ibnorm_export.errors import quoted
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.report import Finding, StaticReport
from ibnorm_export.verifier.static.dataflow import DataFlow
from ibnorm_export.verifier.static.format import check_format
from ibnorm_export.verifier.static.functions import check_functions
from ibnorm_export.verifier.static.inlined import InlinedNorms
from ibnorm_export.verifier.static.inputs import check_inputs
from ibnorm_export.verifier.static.masks import check_masks
from ibnorm_export.verifier.static.norms import check_norms, norm_nodes
from ibnorm_export.verifier.static.numbers import check_numbers_used
from ibnorm_export.verifier.static.operators import check_operators
from ibnorm_export.verifier.static.types import check_types
from ibnorm_export.verifier.static.weights import compare_weights
from ibnorm_export.verifier.weights.values import WeightValues

__all__ = ["check_static"]


def check_static(exported: ExportedModel, model: LoadedModel, *, coverage: Coverage) -> StaticReport:
    """Compare what the outputs of the file depend on with the checkpoint: norm nodes, functions and constants.

    Args:
        exported: the file.
        model: the checkpoint.
        coverage: what takes part in the checkpoint's output; the rest need not be in the file.
    """
    flow = DataFlow(exported)
    own_code = model.original is not None or model.family == "timm"
    values = WeightValues(model, torch_dtype(exported.dtype))

    def holds(name: str, tensor: Tensor) -> bool:
        array = flow.value(name) if flow.is_constant(name) else None
        return array is not None and values.holds(array, tensor)

    modules = {path: module for path, module in model.module.named_modules() if isinstance(module, IBNorm)}
    inlined = InlinedNorms(flow, {module.spec for module in modules.values()}, holds=holds)
    weights = compare_weights(flow, model, coverage=coverage, values=values)
    norm_findings = tuple(check_norms(flow, modules, coverage=coverage, holds=holds, inlined=inlined))
    operator_findings = check_operators(
        flow,
        coverage,
        norm_values=inlined.values,
        wide_norms=bool(inlined.block_sizes),
        lost_norms=any(finding.code is FindingCode.NORM_COUNT for finding in norm_findings),
    )
    findings = (
        *norm_findings,
        *check_functions(flow),
        *check_types(exported),
        *check_format(flow, model),
        *(() if own_code else operator_findings),
        *check_inputs(flow, coverage, own_code=own_code),
        *(() if own_code else check_masks(flow, coverage)),
        *_claim_problems(exported, model, flow=flow),
        *weights.findings,
        *check_numbers_used(flow, model, coverage=coverage, block_sizes=inlined.block_sizes),
    )
    norms = len(norm_nodes(flow)) + inlined.recognised
    findings = tuple(dict.fromkeys(findings))  # a node may show a fault at each of its inputs
    return StaticReport(norms, weights.compared, findings, (*_notes(flow, inlined), *weights.notes))


def _notes(flow: DataFlow, inlined: InlinedNorms) -> Iterator[str]:
    """What a reader should know about a file that is not as an export writes it."""
    exported = flow.exported
    if inlined.recognised:
        what = counted(inlined.recognised, "norm")
        yield f"{what} of the file are inlined and were recognised by their operators, numbers and weights"
    if flow.unreached:
        first = ", ".join(str(node) for node in flow.unreached[:3])
        yield f"no output depends on {counted(len(flow.unreached), 'node')} of the file ({first})"
    if exported.metadata.opset not in (0, exported.opset):
        yield f"the metadata states opset {exported.metadata.opset}; the file has opset {exported.opset}"
    if exported.stored_dtype is not exported.dtype:
        yield f"the export was in {exported.dtype}, but most weights are stored in {exported.stored_dtype}"


def _claim_problems(exported: ExportedModel, model: LoadedModel, *, flow: DataFlow) -> Iterator[Finding]:
    """What the metadata states and the file or the checkpoint does not bear out."""
    metadata = exported.metadata
    if metadata.inlined and norm_nodes(flow):
        what = f"states that norms are inlined, but the file has {len(norm_nodes(flow))} norm nodes"
        yield Finding("metadata", what, code=FindingCode.METADATA_CLAIM)
    yield from _quantization_problems(exported, flow)
    yield from _entry_problems(exported, model, flow=flow)
    keys = Counter(entry.key for entry in exported.proto.metadata_props)
    for key in (key for key, count in keys.items() if count > 1):
        what = f"has the key {quoted(key)} twice, of which readers choose differently"
        yield Finding("metadata", what, code=FindingCode.METADATA_TWICE)
    for path, spec in metadata.norms.items():
        norm = model.norms.get(path)
        if norm is None:
            yield Finding(f"metadata of norm {path}", "the checkpoint has no such norm", code=FindingCode.METADATA_NORM)
        elif spec != norm.to_config():
            what = f"states {spec}; the checkpoint has {norm.to_config()}"
            yield Finding(f"metadata of norm {path}", what, code=FindingCode.METADATA_NORM)
    for path in model.norms.keys() - metadata.norms.keys():
        yield Finding(
            f"metadata of norm {path}", "is missing; the checkpoint has the norm", code=FindingCode.METADATA_NORM
        )


def _entry_problems(exported: ExportedModel, model: LoadedModel, *, flow: DataFlow) -> Iterator[Finding]:
    """Entries of the metadata that differ from those of a new export of the checkpoint."""
    metadata = exported.metadata
    stated: list[tuple[str, Any, Any]] = [
        ("task", metadata.task, model.task),
        ("max_positions", metadata.max_positions, model.max_positions),
    ]
    if metadata.config is not None and model.section is not None:
        stated.append(("config", dict(metadata.config), dict(model.section)))
    grouped = any(node.proto.op_type == "GroupQueryAttention" for node in flow.nodes)
    if metadata.target is Target.ORT_GENAI and not grouped:  # its files take no padding, so none would be compared
        stated.append(("target", metadata.target, Target.PORTABLE))
    if model.task is Task.TEXT_GENERATION and metadata.target is not Target.ORT_GENAI:
        in_place = any(node.proto.op_type == "TensorScatter" for node in flow.nodes)
        stated.append(("cache", metadata.cache, CacheKind.STATIC if in_place else CacheKind.DYNAMIC))
    for key, found, expected in stated:
        if found != expected:
            shown = [quoted(getattr(value, "value", value)) for value in (found, expected)]
            what = f"states {shown[0]}; it must be {shown[1]}"
            yield Finding(f"metadata {key}", what, code=FindingCode.METADATA_ENTRY)


def _quantization_problems(exported: ExportedModel, flow: DataFlow) -> Iterator[Finding]:
    """Matrices in blocks of few bits that are not as the metadata states."""
    stated = exported.metadata.quantization
    blocks = [node for node in flow.nodes if node.proto.op_type == "MatMulNBits"]
    for position, node in enumerate(blocks):
        has = {attribute.name: attribute.i for attribute in node.proto.attribute}
        last = position == len(blocks) - 1 and stated is not None and stated.head_bits is not None
        bits = None if stated is None else stated.head_bits if last else stated.bits
        if has.get("bits") != bits:
            what = f"states {bits} bits per value; the {node} has {has.get('bits')}"
            yield Finding("metadata", what, code=FindingCode.METADATA_CLAIM)
        if stated is not None and has.get("block_size") != stated.block_size:
            what = f"states blocks of {stated.block_size} values; the {node} has blocks of {has.get('block_size')}"
            yield Finding("metadata", what, code=FindingCode.METADATA_CLAIM)
