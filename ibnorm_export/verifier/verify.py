"""Compare an exported file with its checkpoint: does the file state, and compute, what the checkpoint means?

Two verdicts. The static one reads the file: every norm node, function body and weight against the checkpoint. The
numeric one runs it: PyTorch in float64 is the truth, and a file fails when its error is clearly larger than the
baseline error, that of PyTorch in the file's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.progress import Progress, silent
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.expected.verdict import check_expected
from ibnorm_export.verifier.folder import with_folder
from ibnorm_export.verifier.numeric.verdict import check_numeric
from ibnorm_export.verifier.options import VerifyOptions
from ibnorm_export.verifier.preparation import find_notes, prepare
from ibnorm_export.verifier.report import ExpectedReport, ParityReport, StaticReport
from ibnorm_export.verifier.static.verdict import check_static

__all__ = ["VerifyOptions", "check_stated", "verify"]


def verify(
    exported: ExportedModel | str | Path,
    model: LoadedModel,
    *,
    options: VerifyOptions | None = None,
    inputs: Sequence[Arrays] | None = None,
    text: str | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an exported file with its checkpoint.

    Args:
        exported: the file, or its path.
        model: the checkpoint, from `ibnorm_export.models.load`.
        options: backend, number of samples, seed, and what to check.
        inputs: your own inputs instead of drawn ones; see `read_inputs`.
        text: text that a language model predicts; needs the checkpoint's tokenizer.
        progress: receives the progress of the work.

    Raises:
        ModelFileError: the file has no metadata, belongs to another model or cannot be loaded, or PyTorch cannot run
            the checkpoint on an input.
        BackendUnavailable: the backend is not installed.
    """
    comparison = prepare(exported, model, options=options, inputs=inputs, text=text, progress=progress)
    parts = {part: step(comparison) for part, step in _STEPS.items()}
    return ParityReport(str(comparison.file.path), model.source, **parts)


def _check_expected(comparison: Comparison) -> ExpectedReport | None:
    """The verdict against values that the training code saved, if there are any."""
    options = comparison.options
    if options.expected is None:
        return None
    return check_expected(comparison, options.expected, dtype=options.expected_dtype)


def check_stated(comparison: Comparison) -> StaticReport | None:
    """The verdict about what the file states, and about the folder of a language model, if it was requested."""
    if not comparison.options.static:
        return None
    file, reference = comparison.file, comparison.reference
    comparison.progress("reading the file", 0, 0)
    report = check_static(file, reference.model, coverage=reference.coverage)
    return with_folder(report, file, model=reference.model)


#: The steps, by the part of the report that each returns, in the order in which they run. None needs another's result.
_STEPS: Final[Mapping[str, Callable[[Comparison], Any]]] = {
    "notes": find_notes,
    "expected": _check_expected,
    "static": check_stated,
    "numeric": check_numeric,
}
