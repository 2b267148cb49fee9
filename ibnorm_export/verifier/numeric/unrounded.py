"""A half-precision file without its rounding, which hides arithmetic that is slightly wrong."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from ibnorm_export.artifacts.loaded_model import torch_dtype
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.attribution.error_source import attribute_error
from ibnorm_export.verifier.attribution.layers import locate
from ibnorm_export.verifier.comparison import Comparison, without_rounding
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.outputs.compare import compare, judge_dtype
from ibnorm_export.verifier.steps import Part, Step, run_steps
from ibnorm_export.verifier.weights.rotary_tables import exact_tables

__all__ = ["compare_without_rounding"]

_METHOD: Final = (
    "a copy in float32 that rounds nothing, against PyTorch in float32 and float64 with the weights of the file"
)

#: Decoding is left to the copy that rounds: a cached step is the same graph with a past, which some samples have.
_STEPS: Final[tuple[Step, ...]] = (compare, judge_dtype, attribute_error, locate)


def compare_without_rounding(comparison: Comparison, found: Part) -> Part:
    """Compare a float32 copy of a half-precision file that runs on a CPU; nothing for other files and backends."""
    if comparison.rounds:
        return Part()
    step = torch.finfo(torch_dtype(comparison.reference.dtype)).eps
    tables = exact_tables(comparison.file, comparison.reference.model, step=step)
    if tables is None:
        left_out = "arithmetic without rounding: the file has rounded tables of a rotary embedding that is not known"
        return Part(not_run=(left_out,))
    comparison.variants.make_room()
    try:
        with tempfile.TemporaryDirectory() as folder:
            unrounded = without_rounding(comparison, Path(folder), tables=tables)
            exact = replace(run_steps(unrounded, _STEPS), method=_METHOD).report(unrounded)
    except ModelFileError as error:
        return Part(findings=(Finding("without rounding", str(error), code=FindingCode.UNROUNDED_REFUSED),))
    findings = tuple(
        Finding(f"without rounding, {finding.where}", finding.what, code=finding.code) for finding in exact.findings
    )
    return Part(exact=exact, findings=findings)
