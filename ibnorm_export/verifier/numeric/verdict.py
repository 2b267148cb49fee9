"""The numeric verdict: the file's error against PyTorch in float64, judged by the baseline error."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.attribution.error_source import attribute_error
from ibnorm_export.verifier.attribution.layers import locate
from ibnorm_export.verifier.checkpoint.samples import RefusedInputError
from ibnorm_export.verifier.comparison import Comparison, with_rounding
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.numeric.input_coverage import describe_coverage
from ibnorm_export.verifier.numeric.loading import load_itself
from ibnorm_export.verifier.numeric.norms import compare_norms, find_unfused, observe_norms
from ibnorm_export.verifier.numeric.quantized import compare_own_numbers
from ibnorm_export.verifier.numeric.unrounded import compare_without_rounding
from ibnorm_export.verifier.outputs.compare import compare, judge_dtype
from ibnorm_export.verifier.outputs.decoding import decode
from ibnorm_export.verifier.outputs.quality import predict
from ibnorm_export.verifier.report import NumericReport
from ibnorm_export.verifier.steps import Part, Step, run_steps

__all__ = ["check_numeric"]

_STEPS: Final[tuple[Step, ...]] = (
    compare_norms,
    observe_norms,  # first of those that run the file: its session serves the others too
    compare,
    decode,
    judge_dtype,
    attribute_error,
    predict,
    locate,
    compare_without_rounding,
    find_unfused,
    load_itself,
    describe_coverage,
)

#: A quantised file is a different model from its checkpoint, so its numbers are compared with those of its own weights.
_QUANTISED_STEPS: Final[tuple[Step, ...]] = (
    observe_norms,
    predict,
    compare_own_numbers,
    find_unfused,
    load_itself,
)


def check_numeric(comparison: Comparison) -> NumericReport:
    """Compare the numbers of a file, and, if there is a text, its predictions.

    A file that the runtime refuses is a finding, in addition to those of the other verdicts.

    Args:
        comparison: the file as it is, and its reference.

    Raises:
        RefusedInputError: PyTorch cannot run the checkpoint on an input.
    """
    quantised = comparison.file.metadata.quantization is not None
    try:
        with tempfile.TemporaryDirectory() as folder:
            runnable = comparison if quantised else with_rounding(comparison, Path(folder))
            found = run_steps(runnable, _QUANTISED_STEPS if quantised else _STEPS)
    except RefusedInputError:
        raise
    except ModelFileError as error:
        found = Part(
            method="nothing: the file does not load",
            findings=(Finding("runtime", str(error), code=FindingCode.FILE_REFUSED),),
        )
        found += load_itself(comparison, found)
    return found.report(comparison)
