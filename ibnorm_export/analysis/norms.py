"""`analyze`: what every IBNorm of a model does to its input, by kurtosis, variance and information.

The model runs as it is, once for each requested type. Another lambda is applied to the same values, so its
rows describe what that norm would do to them, not a model that was trained with that lambda.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.analysis.capture import Capture, NormInput, capture_checkpoint, capture_file, used_rows
from ibnorm_export.analysis.information import BETA, excess_kurtosis, information_with_errors
from ibnorm_export.analysis.options import AnalysisOptions
from ibnorm_export.analysis.report import AnalysisReport, Histogram, NormAnalysis
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError, listed
from ibnorm_export.op import reference
from ibnorm_export.op.spec import Compression, IBNormSpec
from ibnorm_export.progress import Progress, silent
from ibnorm_export.text_report import counted

__all__ = ["analyze", "contraction"]

#: With fewer samples the entropies, which are at most log2 of their number, carry little information.
_FEW_SAMPLES: Final = 32

#: Bins of a histogram; odd, so that one is around zero.
_BINS: Final = 41


def analyze(
    model_or_file: LoadedModel | ExportedModel | str | Path,
    inputs: Arrays | None = None,
    *,
    checkpoint: LoadedModel | None = None,
    labels: NDArray[Any] | None = None,  # (batch,) or (batch, sequence)
    options: AnalysisOptions | None = None,
    progress: Progress = silent,
) -> AnalysisReport:
    """Describe what every IBNorm does to the values that reach it.

    Args:
        model_or_file: a checkpoint, which runs in PyTorch in each of `options.dtypes`; or an exported file or its
            path, which runs in ONNX Runtime in its own type.
        inputs: one batch, arrays by input name. A checkpoint draws random ones by default; a file needs them.
        checkpoint: the checkpoint of a file. It shows which rows reach an output, so that a file that leaves some of
            the others out is described by the same rows as one that computes all.
        labels: classes of the samples, or of every token; None means the next token, or the model's own prediction.
        options: see `AnalysisOptions`.
        progress: receives the progress of the work.

    Raises:
        ModelFileError: the inputs or labels do not fit the model, or no IBNorm ran.
        BackendUnavailable: ONNX Runtime is not installed.
    """
    options = AnalysisOptions() if options is None else options
    if isinstance(model_or_file, LoadedModel):
        model = model_or_file
        inputs = model.sample(np.random.default_rng(options.seed), 0) if inputs is None else inputs
        source, captures = model.source, _capture_in_each_type(model, inputs, options=options, progress=progress)
    else:
        exported = model_or_file if isinstance(model_or_file, ExportedModel) else ExportedModel(model_or_file)
        inputs = _inputs_of_file(exported, inputs)
        progress("analysing", 0, 1)
        source, captures = str(exported.path), iter([(exported.dtype, capture_file(exported, inputs))])
    rows: list[NormAnalysis] = []
    skipped: tuple[str, ...] = ()
    count, description = 0, ""
    owner = model_or_file if isinstance(model_or_file, LoadedModel) else checkpoint
    used = {} if owner is None else used_rows(owner, inputs)
    notes: dict[str, None] = {}
    for dtype, whole in captures:
        capture = _only_used(whole, used, batch=len(next(iter(inputs.values()))), notes=notes)
        target, description = _target(inputs, capture.outputs, labels=labels)
        rows += _rows(capture, dtype, target=target, options=options)
        count, skipped = len(target), capture.skipped
    if not rows:
        raise ModelFileError(
            f"{source}: nothing to analyse, because no IBNorm that computes statistics of its input ran"
        )
    drawn = min(options.samples, count)
    return AnalysisReport(
        source,
        tuple(rows),
        samples=drawn,
        target=description,
        alpha=options.alpha,
        beta=BETA,
        width="median distance between samples" if options.width is None else f"{options.width:g}",
        notes=(*_notes(skipped, drawn), *notes),
    )


def _capture_in_each_type(
    model: LoadedModel, inputs: Arrays, *, options: AnalysisOptions, progress: Progress
) -> Iterator[tuple[str, Capture]]:
    for index, dtype in enumerate(options.dtypes):
        progress(f"analysing in {dtype.value}", index, len(options.dtypes))
        yield dtype.value, capture_checkpoint(model, model.in_dtype(torch_dtype(dtype)), inputs=inputs)


def _only_used(
    capture: Capture, used: Mapping[str, NDArray[np.bool_]], *, batch: int, notes: dict[str, None]
) -> Capture:
    """A capture without the rows that reach no output; adds to `notes` which norms have fewer rows than others.

    Args:
        capture: one pass.
        used: masks of the rows of a sample by norm; a norm without one keeps what it has.
        batch: number of samples.
        notes: remarks on the figures, each once.
    """
    kept: dict[str, NormInput] = {}
    most = max((_rows_of_a_sample(norm, batch) for norm in capture.norms.values()), default=0)
    for path, norm in capture.norms.items():
        rows, mask = _rows_of_a_sample(norm, batch), used.get(path)
        if mask is not None and rows == mask.size > mask.sum() > 0:
            x = norm.x.reshape(batch, rows, norm.x.shape[-1])[:, mask]
            norm = replace(norm, x=x)
            notes[f"{path}: only {mask.sum()} of {rows} rows of a sample reach an output, and only they count"] = None
        elif mask is not None and rows == mask.sum() < mask.size:
            notes[f"{path}: the file computes {rows} of {mask.size} rows of a sample, those that reach an output"] = (
                None
            )
        elif mask is None and rows < most:
            notes[f"{path}: the file computes {counted(rows, 'row')} of a sample; other norms have {most}"] = None
        kept[path] = norm
    return replace(capture, norms=kept)


def _rows_of_a_sample(norm: NormInput, batch: int) -> int:
    return norm.x.size // norm.x.shape[-1] // batch if norm.x.size else 0


def _inputs_of_file(exported: ExportedModel, inputs: Arrays | None) -> Arrays:
    names = sorted(tensor.name for tensor in exported.inputs)
    if inputs is None:
        raise ModelFileError(f"{exported.path} needs inputs to be analysed; its inputs are {names}")
    if names != sorted(inputs):
        raise ModelFileError(
            f"{exported.path} takes {names}; the inputs are {sorted(inputs)}: name the checkpoint that it was "
            "exported from"
        )
    return inputs


def _target(inputs: Arrays, outputs: Arrays, *, labels: NDArray[Any] | None) -> tuple[NDArray[Any], str]:
    """The target of each sample (Y), and its description."""
    logits = next(iter(outputs.values()))
    if labels is not None:
        if labels.shape != logits.shape[:-1]:
            raise ModelFileError(
                f"labels have shape {labels.shape}; the model's predictions have shape {logits.shape[:-1]}"
            )
        return labels.reshape(-1), "the given labels"
    if "input_ids" in inputs:
        ids = np.roll(inputs["input_ids"], -1, axis=1)
        ids[:, -1] = logits[:, -1].argmax(-1)
        return ids.reshape(-1), "the next token (for the last position, the model's own prediction)"
    return logits.argmax(-1).reshape(-1), "the model's own prediction"


def _notes(skipped: tuple[str, ...], samples: int) -> Iterator[str]:
    if skipped:
        yield f"norms with running statistics have no rows to describe and are left out: {listed(skipped)}"
    if samples < _FEW_SAMPLES:
        yield f"{samples} samples are too few for reliable information in bits; give a larger batch"


@dataclass(frozen=True, slots=True)
class _Samples:
    """The samples of one pass.

    Args:
        first: what reached the first norm, (..., n).
        target: one value per sample.
        chosen: indices of the samples that the Gram matrices are computed from.
    """

    first: NDArray[Any]
    target: NDArray[Any]
    chosen: NDArray[np.int64]

    def select(self, values: NDArray[Any]) -> NDArray[Any]:
        """One row per chosen sample; if a sample has several positions, their mean."""
        count = len(self.target)
        rows = values.reshape(-1, values.shape[-1])
        if len(rows) != count:
            rows = values.reshape(count, -1, values.shape[-1]).mean(1)
        return rows[self.chosen]


def _rows(capture: Capture, dtype: str, *, target: NDArray[Any], options: AnalysisOptions) -> Iterator[NormAnalysis]:
    if not capture.norms:
        return
    count = min(options.samples, len(target))
    chosen = np.random.default_rng(options.seed).choice(len(target), count, replace=False)
    samples = _Samples(next(iter(capture.norms.values())).x, target, chosen)
    for module, norm in capture.norms.items():
        for lambd in dict.fromkeys((norm.spec.lambd, *options.lambdas)):
            yield _analyze_norm(module, norm, lambd=lambd, dtype=dtype, samples=samples, options=options)


def _analyze_norm(
    module: str, norm: NormInput, *, lambd: float, dtype: str, samples: _Samples, options: AnalysisOptions
) -> NormAnalysis:
    spec = replace(norm.spec, lambd=lambd)
    rows = np.asarray(norm.x, np.float64).reshape(-1, norm.x.shape[-1])
    output = reference.ibnorm(norm.x, norm.scale, bias=norm.bias, spec=spec)
    information, errors = information_with_errors(
        samples.select(samples.first),
        samples.select(output),
        target=samples.target[samples.chosen],
        alpha=options.alpha,
        width=options.width,
    )
    return NormAnalysis(
        module,
        spec.compression.value,
        dtype=dtype,
        lambd=lambd,
        own=lambd == norm.spec.lambd,
        kurtosis_before=excess_kurtosis(rows),
        kurtosis_after=excess_kurtosis(_compress(rows, spec)[1]),
        deviation=float(np.sqrt(rows.var(-1).mean())),
        contraction=contraction(rows, spec),
        about_target=information.about_target,
        about_input=information.about_input,
        bottleneck=information.value(),
        histogram=_histogram(*_compress(rows, spec)),
        about_target_error=None if errors is None else errors.about_target,
        about_input_error=None if errors is None else errors.about_input,
        bottleneck_error=None if errors is None else errors.value,
    )


def _compress(
    rows: NDArray[np.float64],  # (m, n)
    spec: IBNormSpec,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # (m, n) each
    """t = (x - mean) / lambda and c = g(t) of each row x."""
    t = (rows - rows.mean(-1, keepdims=True)) / spec.lambd
    match spec.compression:
        case Compression.LINEAR:
            return t, t
        case Compression.LOGARITHMIC:
            return t, np.copysign(np.log1p(np.abs(t)), t)
        case Compression.TANH:
            return t, np.tanh(t)


def _histogram(before: NDArray[np.float64], after: NDArray[np.float64]) -> Histogram | None:
    """Both in the same bins, which are symmetric and hold all but a thousandth of the values before."""
    if not (before.size and np.isfinite(before).all()):
        return None
    end = float(np.quantile(np.abs(before), 0.999)) or 1.0
    ends = np.linspace(-end, end, _BINS + 1)
    shares = (np.histogram(np.clip(values, -end, end), ends)[0] / values.size for values in (before, after))
    first, second = (tuple(map(float, values)) for values in shares)
    return Histogram(tuple(map(float, ends)), first, second)


def contraction(
    rows: NDArray[Any],  # (m, n)
    spec: IBNormSpec,
) -> float:
    """Variance of g(t) over the variance of t = (x - mean) / lambda, both summed over rows.

    It is 1 for S, and by definition if the values have no variance.
    """
    t, c = _compress(np.asarray(rows, np.float64), spec)
    before, after = float(t.var(-1).sum()), float(c.var(-1).sum())
    return after / before if before else 1.0
