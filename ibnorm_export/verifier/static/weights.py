"""Check every constant that the outputs of a file depend on: it is a weight of the checkpoint, or it is explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.text_report import counted
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.constants import PRODUCTS, KnownConstants
from ibnorm_export.verifier.static.dataflow import ConstantUse, DataFlow, FlowNode
from ibnorm_export.verifier.tolerances import QUANTIZATION_STEPS
from ibnorm_export.verifier.weights.stored import QuantizedValues, StoredWeight, StoredWeights
from ibnorm_export.verifier.weights.tool_layouts import BLOCKED_DOMAIN
from ibnorm_export.verifier.weights.values import WeightValues

__all__ = ["WeightsReport", "compare_weights"]


@dataclass(slots=True)
class WeightsReport:
    """How many weights were compared, what is wrong, remarks, and which tensors of the checkpoint the file uses."""

    compared: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used: set[int] = field(default_factory=set)

    def add(self, tensors: tuple[Tensor, ...], problem: str = "", *, name: str = "") -> None:
        """Count a weight, and report what is wrong with it."""
        self.compared += 1
        self.used.update(id(tensor) for tensor in tensors)
        if problem:
            self.findings.append(Finding(f"weight {name}", problem, code=FindingCode.WEIGHT_DIFFERS))


def compare_weights(flow: DataFlow, model: LoadedModel, *, coverage: Coverage, values: WeightValues) -> WeightsReport:
    """Compare the constants of the file with the checkpoint.

    A constant with the name of a weight is compared with that weight. Another one is compared with all weights by its
    value, because tools rename; one that is not a weight must be explained, see `KnownConstants`.

    Args:
        flow: the data flow of the file.
        model: the checkpoint.
        coverage: what takes part in the output of the checkpoint; other weights need not be in the file.
        values: the weights of the checkpoint by value.
    """
    stored = StoredWeights(flow.exported)
    named = {weight.name: weight for weight in stored.of(model)}
    # A weight in blocks of few bits is several tensors, which are compared together.
    quantized = {part: weight for weight in named.values() if weight.quantized for part in stored.parts(weight)}
    known = KnownConstants(model, coverage, dtype=flow.exported.dtype)
    report = WeightsReport()
    seen: set[str] = set()
    for use in flow.constant_uses:
        weight = quantized.get(use.name) or (named.get(use.name) if flow.is_stored(use.name) else None)
        if weight is not None and weight.quantized and use.node is not None:
            report.findings += _part_problems(stored, weight, use.node, quantized=quantized)
        key = use.name if weight is None else weight.name
        if key not in seen:
            seen.add(key)
            if weight is not None:
                report.add(weight.tensors, _compare(stored, weight), name=weight.name)
            else:
                _compare_unnamed(flow, use, report=report, known=known, values=values)
                sources = [named[name] for name in flow.sources(use.name) if name in named and name not in seen]
                seen.update(source.name for source in sources)
                for source in sources:  # of a constant that nodes compute
                    report.add(source.tensors, _compare(stored, source), name=source.name)
    missing = {
        name: tensor
        for name, tensor in model.module.state_dict(keep_vars=True).items()
        if name in coverage.weights and id(tensor) not in report.used and not _is_merged(flow, tensor, values)
    }
    report.findings += _missing(missing, in_file=named)
    state = model.module.state_dict(keep_vars=True)
    unused = [name for name, tensor in state.items() if name not in coverage.weights and tensor.is_floating_point()]
    if unused:
        what = counted(len(unused), "weight")
        report.notes.append(f"{what} of the checkpoint do not affect its output: {', '.join(unused[:5])}")
    return report


def _part_problems(
    stored: StoredWeights, weight: StoredWeight, node: FlowNode, *, quantized: Mapping[str, StoredWeight]
) -> Iterator[Finding]:
    """Parts of a quantised weight that a node mixes with those of another one, or does not take."""
    where = f"weight {weight.name}"
    if mixed := sorted({quantized[name].name for name in node.inputs if name in quantized} - {weight.name}):
        what = f"the {node} mixes it with {', '.join(mixed)}"
        yield Finding(where, what, code=FindingCode.WEIGHT_MIXED)
    for part in stored.parts(weight):
        if part not in node.inputs and stored.has(part):
            yield Finding(where, f"the {node} does not take {part}", code=FindingCode.WEIGHT_MISSING)


def _is_merged(flow: DataFlow, tensor: Tensor, values: WeightValues) -> bool:
    """Whether another constant has the value of a weight: tools merge equal ones, such as scales that are all 1."""
    for use in flow.constant_uses:
        array = flow.value(use.name) if flow.size(use.name) in (None, tensor.numel()) else None
        if array is not None and values.holds(array, tensor):
            return True
    return False


def _missing(missing: Mapping[str, Tensor], *, in_file: Mapping[str, StoredWeight]) -> Iterator[Finding]:
    """Weights that the checkpoint uses and the outputs of the file do not."""
    idle = {id(tensor) for weight in in_file.values() for tensor in weight.tensors}
    for name, tensor in missing.items():
        unused = "no output of the file depends on it, though the checkpoint uses it"
        what = unused if id(tensor) in idle else "used by the checkpoint but not in the file"
        yield Finding(f"weight {name}", what, code=FindingCode.WEIGHT_MISSING)


def _compare_unnamed(
    flow: DataFlow, use: ConstantUse, *, report: WeightsReport, known: KnownConstants, values: WeightValues
) -> None:
    """Compare a constant that does not have the name of a weight, by its value."""
    kind, expected = _fill(use.name)
    array = flow.value(use.name)
    if array is not None and kind and not (np.asarray(array, dtype=np.float32) == expected).all():
        report.findings.append(
            Finding(f"constant {use.name}", f"every value must be {expected:g}", code=FindingCode.CONSTANT_UNKNOWN)
        )
    elif array is None:
        report.findings.append(
            Finding(
                f"constant {use.name}",
                f"{_place(use)}; its value cannot be computed here",
                code=FindingCode.CONSTANT_UNREADABLE,
            )
        )
    elif not kind and not known.explains_use(use, array):
        blocked = use.node is not None and use.node.proto.domain == BLOCKED_DOMAIN
        # The weight itself, and what PyTorch computes an equal constant from before it meets the input.
        tensors = (*values.find(array, blocked=blocked), *known.weights(known.origins(array)))
        if tensors := tensors or values.folded.find(array, blocked=blocked):
            report.add(tensors)
        elif origins := known.origins(array):  # what PyTorch computes from weights before it meets the input
            report.add(known.weights(origins))
        elif problem := known.problem(array, multiplies=_multiplies(use)):
            nearest = values.nearest(array)
            report.findings.append(
                Finding(
                    f"constant {use.name}", f"{_place(use)}; {nearest or problem}", code=FindingCode.CONSTANT_UNKNOWN
                )
            )


def _multiplies(use: ConstantUse) -> bool:
    """Whether a node adds up products with a constant; the third input is a bias."""
    return use.node is not None and use.node.proto.op_type in PRODUCTS and use.position < 2


def _fill(name: str) -> tuple[str, float]:
    """The kind and value of a constant that stands for a scale or bias that a norm does not have."""
    prefix, _, rest = name.partition(".")
    kind = rest.partition(".")[0] if prefix == "ibnorm" else ""
    return (kind, 1.0) if kind == "ones" else (kind, 0.0) if kind == "zeros" else ("", 0.0)


def _place(use: ConstantUse) -> str:
    return "is an output" if use.node is None else f"is used by the {use.node}"


def _compare(stored: StoredWeights, weight: StoredWeight) -> str:
    """What is wrong with a weight; empty if nothing is."""
    if not weight.quantized:
        return _compare_bits(stored.read(weight.name), weight)
    try:
        return _compare_quantized(stored.read_quantized(weight), weight)
    except ModelFileError as error:
        return str(error)


def _compare_bits(values: NDArray[Any], weight: StoredWeight) -> str:
    tensor = weight.tensor
    expected = (tensor.to(weight.dtype).float() if tensor.is_floating_point() else tensor).numpy()
    if values.shape != expected.shape:
        return f"shape is {values.shape}; the checkpoint has {expected.shape}"
    # float32 holds every float16 and bfloat16 exactly
    actual = np.asarray(values, dtype=np.float32) if tensor.is_floating_point() else values
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if same.all():
        return ""
    wrong = int(same.size - np.count_nonzero(same))
    flipped = int(np.count_nonzero((actual == -expected) & ~same))
    largest = float(np.nanmax(np.abs(actual.astype(np.float64) - expected)))
    signs = f", {flipped} of them only in sign" if flipped else ""
    return f"{wrong} of {same.size} values differ from the checkpoint{signs}; largest difference {largest:.3g}"


def _compare_quantized(stored: QuantizedValues, weight: StoredWeight) -> str:
    """Each value is within a step of its block in the checkpoint."""
    expected = weight.tensor.float().numpy()
    if stored.values.shape != expected.shape:
        return f"shape is {stored.values.shape}; the checkpoint has {expected.shape}"
    wrong = int(np.count_nonzero(~(np.abs(stored.values - expected) <= stored.steps * QUANTIZATION_STEPS)))
    if not wrong:
        return ""
    return f"{wrong} of {expected.size} values differ from the checkpoint by more than one step of their block"
