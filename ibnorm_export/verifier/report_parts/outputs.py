"""The error of each output of a file, and the table of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

from ibnorm_export.text_report import text_table
from ibnorm_export.verifier.finding import verdict_word

__all__ = ["OutputParity", "output_lines"]


def _excess(error: float, tolerance: float) -> float:
    excess = error / tolerance if tolerance else error
    return float("inf") if excess != excess else excess


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output over all samples. Errors are norm-wise relative to the float64 truth.

    Args:
        name: the output, or a step of decoding.
        norms: how the norms ran, e.g. "fused" or "as functions".
        max_abs: largest absolute difference from the truth.
        error: error of the file over the ordinary samples.
        baseline_error: error of PyTorch in the same dtype over them, the largest of several realisations of rounding.
        worst_sample, worst_sample_error: the sample nearest to its tolerance or farthest above it, and its error.
        worst_sample_tolerance: the largest error of that sample that passes.
        worst_sample_covers: what that sample covers; empty for an ordinary sample.
        tolerance: the largest error over the ordinary samples that passes.
        ratio: `error` over `baseline_error`.
        cosine: cosine of the angle between the file's values and the truth.
        top1_agreement: share of rows with the same largest value; None if rows have one value.
        elements: values that were compared.
        passed: whether the error is within the tolerance, over all samples and in each.
    """

    name: str
    norms: str
    _: KW_ONLY
    max_abs: float
    error: float
    baseline_error: float
    worst_sample: int
    worst_sample_error: float
    worst_sample_tolerance: float
    worst_sample_covers: str
    tolerance: float
    ratio: float
    cosine: float
    top1_agreement: float | None
    elements: int
    passed: bool

    @property
    def excess(self) -> float:
        """The error over its tolerance, over the samples or in the worst; infinite if an error is not a number."""
        return max(_excess(self.error, self.tolerance), _excess(self.worst_sample_error, self.worst_sample_tolerance))


def output_lines(title: str, outputs: Sequence[OutputParity]) -> Iterator[str]:
    """A table of the outputs; those of a cache, two for each layer, share one line if they pass."""
    summed_up = [output for output in outputs if output.name.startswith("present.") and output.passed]
    columns = (
        "output",
        "norms",
        "max abs",
        "rel. error",
        "baseline error",
        "ratio",
        "tolerance",
        "cosine",
        "top-1",
        "",
    )
    rows = [
        (
            output.name,
            output.norms,
            f"{output.max_abs:.2e}",
            f"{output.error:.2e}",
            f"{output.baseline_error:.2e}",
            f"{output.ratio:.2f}",
            f"{output.tolerance:.2e}",
            f"{output.cosine:.9f}",
            "" if output.top1_agreement is None else f"{output.top1_agreement:.2%}",
            verdict_word(output.passed),
        )
        for output in outputs
        if output not in summed_up
    ]
    yield text_table(title, columns, rows=rows)
    if summed_up:
        nearest = max(output.excess for output in summed_up)
        yield f"cache: {len(summed_up)} outputs pass; the largest error is {nearest:.2f} of its tolerance"
