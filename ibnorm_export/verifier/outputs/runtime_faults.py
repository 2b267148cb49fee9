"""Known faults of a runtime, so that its results are not taken for a fault of the file."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.verifier.checkpoint.reference import Sample
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.report import Finding

__all__ = ["find_runtime_fault"]

#: Versions of ONNX Runtime whose Attention operator of opset 23 gives NaN in rows that are padded on the left.
_NAN_VERSIONS: Final = ("1.23.",)
_CURED_IN: Final = "1.24"


def _version() -> str:
    """The version of ONNX Runtime; empty if no package of it is installed."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def find_runtime_fault(comparison: Comparison, sample: Sample, *, actual: NDArray[Any], name: str) -> Finding | None:
    """A finding if the values of one output show a known fault of the runtime that ran the file.

    Args:
        comparison: the file and how it is run.
        sample: the input, and what PyTorch computes.
        actual: the output of the file.
        name: its name.
    """
    if np.isfinite(actual).all():
        return None
    version = _version()
    mask = sample.inputs.get("attention_mask")
    if (
        comparison.options.backend not in (Backend.ORT_CPU, Backend.ORT_CUDA)
        or not version.startswith(_NAN_VERSIONS)
        or mask is None
        or mask.ndim != 2
        or len(actual) != len(mask)
        or not any(node.op_type == "Attention" and node.domain == "" for node in comparison.file.proto.graph.node)
    ):
        return None
    padded = mask[:, 0] == 0
    broken = ~np.isfinite(actual) & np.isfinite(sample.truth[name])
    if name in sample.valid:
        broken[~sample.valid[name]] = False
    rows = broken.reshape(len(actual), -1).any(1)
    if not rows.any() or (rows & ~padded).any():
        return None
    return Finding(
        f"runtime ONNX Runtime {version}",
        f"{sample.label}: output {name} is NaN in rows that are padded on the left: the Attention operator of this "
        f"version is wrong, the file is not; install onnxruntime>={_CURED_IN}, or export with --for 'ort>=1.22'",
        code=FindingCode.RUNTIME_FAULT,
    )
