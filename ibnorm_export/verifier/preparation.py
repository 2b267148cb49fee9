"""Make the comparison of a file with its checkpoint, which every step of a verdict is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import ModelFileError
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.registry import check_backend
from ibnorm_export.verifier.checkpoint.matching import require_match
from ibnorm_export.verifier.checkpoint.reference import Reference
from ibnorm_export.verifier.checkpoint.samples import prepare_samples
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.options import VerifyOptions
from ibnorm_export.verifier.outputs.quality import require_predictions

__all__ = ["find_notes", "prepare"]


def prepare(
    exported: ExportedModel | str | Path,
    model: LoadedModel,
    *,
    options: VerifyOptions | None,
    inputs: Sequence[Arrays] | None,
    text: str | None,
    progress: Progress,
) -> Comparison:
    """Read the file, and choose the inputs; nothing runs yet. See `verify` for the arguments.

    Raises:
        ModelFileError: the file has no metadata or belongs to another model, or the inputs or the text do not fit it.
        BackendUnavailable: the backend is not installed.
    """
    file = exported if isinstance(exported, ExportedModel) else ExportedModel(exported)
    options = VerifyOptions() if options is None else options
    check_backend(options.backend, engine=options.engine, provider=options.provider, npm=options.npm)
    match_notes = require_match(file, model)
    prepared = prepare_samples(file, model, options=options, given=inputs)
    tokens = None if text is None else _encode(text, model)
    reference = Reference(
        model,
        file.dtype,
        inputs=prepared.inputs,
        progress=progress,
        covers=prepared.covers,
        other_sizes=prepared.other_sizes,
    )
    return Comparison(
        file, reference, options=options, progress=progress, prepared=prepared, text=tokens, notes=match_notes
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


def find_notes(comparison: Comparison) -> tuple[str, ...]:
    """What a reader should know about the checkpoint, the file, and how they are compared.

    Raises:
        RefusedInputError: PyTorch cannot run the checkpoint on the first input.
    """
    model = comparison.reference.model
    return (
        *model.warnings,
        *model.notes,
        *comparison.notes,
        *_find_limits_of_truth(comparison),
        *comparison.prepared.notes,
        *_find_assumptions(model, comparison.options),
    )


def _find_limits_of_truth(comparison: Comparison) -> Iterator[str]:
    model, coverage = comparison.reference.model, comparison.reference.coverage
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
