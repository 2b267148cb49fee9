"""Check that the file has every weight of the checkpoint: bit for bit, or within one step if quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import ModelFileError
from ibnorm_export.verifier.coverage import Coverage
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.stored_weights import QuantizedValues, StoredWeight, StoredWeights
from ibnorm_export.verifier.tolerances import QUANTIZATION_STEPS

__all__ = ["WeightsReport", "compare_weights"]


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """How many weights were compared, what is wrong, and remarks for the reader."""

    compared: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def compare_weights(exported: ExportedModel, model: LoadedModel, *, coverage: Coverage) -> WeightsReport:
    """Compare the file's weights and constants with the checkpoint.

    Args:
        exported: the file.
        model: the checkpoint.
        coverage: the weights that take part in the output; the others need not be in the file.
    """
    stored = StoredWeights(exported)
    findings = [
        Finding(f"constant {name}", f"every value must be {expected:g}")
        for name, expected, values in stored.constants()
        if not (values == expected).all()
    ]
    weights = list(stored.of(model))
    findings += [
        Finding(f"weight {weight.name}", problem) for weight in weights if (problem := _compare(stored, weight))
    ]
    state = model.module.state_dict(keep_vars=True)
    in_file = {id(tensor) for weight in weights for tensor in weight.tensors}
    findings += [
        Finding(f"weight {name}", "used by the checkpoint but not in the file")
        for name, tensor in state.items()
        if id(tensor) not in in_file and name in coverage.weights
    ]
    unused = [name for name, tensor in state.items() if name not in coverage.weights and tensor.is_floating_point()]
    note = f"{len(unused)} weights of the checkpoint do not affect its output: {', '.join(unused[:5])}"
    return WeightsReport(len(weights), tuple(findings), (note,) if unused else ())


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
