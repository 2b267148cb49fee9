"""Compare an exported file with its checkpoint: does the file state, and compute, what the checkpoint means?

Two verdicts. The static one reads the file: every norm node, function body and weight against the checkpoint. The
numeric one runs it: PyTorch in float64 is the truth, and a file fails when its error is clearly larger than the
baseline error, that of PyTorch in the file's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import ModelFileError
from ibnorm_export.progress import Progress, silent
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.coverage import Coverage, measure_coverage
from ibnorm_export.verifier.expected import check_expected
from ibnorm_export.verifier.folder import with_folder
from ibnorm_export.verifier.input_coverage import describe_inputs
from ibnorm_export.verifier.loading import with_loading
from ibnorm_export.verifier.matching import require_match
from ibnorm_export.verifier.numeric import check_numeric
from ibnorm_export.verifier.options import VerifyOptions
from ibnorm_export.verifier.quality import require_predictions
from ibnorm_export.verifier.quantized import check_quantized
from ibnorm_export.verifier.reference import Reference
from ibnorm_export.verifier.report import Finding, NumericReport, ParityReport, StaticReport
from ibnorm_export.verifier.samples import PreparedSamples, RefusedInputError, prepare_samples, refusals
from ibnorm_export.verifier.static import check_static

__all__ = ["VerifyOptions", "verify"]


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
    exported = exported if isinstance(exported, ExportedModel) else ExportedModel(exported)
    options = VerifyOptions() if options is None else options
    match_notes = require_match(exported, model)
    prepared = prepare_samples(exported, model, options=options, given=inputs)
    tokens = None if text is None else _encode(text, model)
    reference = Reference(model, exported.dtype, inputs=prepared.inputs, progress=progress, covers=prepared.covers)
    with refusals(0, prepared.inputs[0]):
        coverage = measure_coverage(model, reference.mapped, inputs=prepared.inputs[0])
    comparison = Comparison(exported, reference, options=options, progress=progress)
    expected = None
    if options.expected is not None:
        expected = check_expected(comparison, options.expected, dtype=options.expected_dtype)
    return ParityReport(
        str(exported.path),
        model.source,
        static=_check_static(exported, model, coverage=coverage) if options.static else None,
        numeric=_with_coverage(_run(comparison, tokens=tokens), prepared, reference=reference),
        expected=expected,
        notes=(
            *model.warnings,
            *model.notes,
            *match_notes,
            *_find_notes(model, coverage),
            *prepared.notes,
            *_find_assumptions(model, options),
        ),
    )


def _with_coverage(report: NumericReport, prepared: PreparedSamples, *, reference: Reference) -> NumericReport:
    """The report with what its inputs cover and leave out."""
    ran = [sample.inputs for sample in reference.samples]
    return replace(
        report,
        ran=describe_inputs(reference.model, ran, limits=prepared.limits) if report.outputs else (),
        not_run=(*prepared.left_out, *reference.left_out, *report.not_run),
    )


def _check_static(exported: ExportedModel, model: LoadedModel, *, coverage: Coverage) -> StaticReport:
    """The static verdict about the file, and about the folder of a language model."""
    return with_folder(check_static(exported, model, coverage=coverage), exported, model=model)


def _find_notes(model: LoadedModel, coverage: Coverage) -> Iterator[str]:
    if model.task is Task.TEXT_GENERATION and model.max_positions == 1:
        yield "the model has one position, so there is no cached step after a prompt to compare"
    if coverage.narrow_operators:
        operators = ", ".join(sorted(coverage.narrow_operators)[:3])
        yield f"the truth is not float64 throughout ({operators}): give CustomModel an `exact` function"


def _find_assumptions(model: LoadedModel, options: VerifyOptions) -> Iterator[str]:
    if model.original is None and model.norms and options.expected is None:
        yield (
            "the reading of config.json (lambda, epsilon, convention) is assumed: check it with --expected FILE.npz, "
            "values that the training code saved"
        )


def _encode(text: str, model: LoadedModel) -> NDArray[np.int64]:
    """Tokens (n,) of the text, at least two.

    Raises:
        ModelFileError: the model is not a language model, or nothing can be predicted in the text.
    """
    if model.task is not Task.TEXT_GENERATION:
        raise ModelFileError(f"{model.source} was loaded for {model.task}; a text needs task text-generation")
    tokens = FolderTokenizer(Path(model.source), model.vocabulary).encode(text)
    require_predictions(tokens)
    return tokens


def _run(comparison: Comparison, *, tokens: NDArray[np.int64] | None) -> NumericReport:
    """The numeric verdict. A file that the runtime refuses is a finding, in addition to the static ones."""
    check = check_quantized if comparison.file.metadata.quantization else check_numeric
    try:
        report = check(comparison, tokens=tokens)
    except RefusedInputError:
        raise
    except ModelFileError as error:
        report = NumericReport(
            comparison.options.backend,
            comparison.reference.dtype.value,
            method="nothing: the file does not load",
            samples=0,
            outputs=(),
            findings=(Finding("runtime", str(error)),),
        )
    return with_loading(report, comparison)
