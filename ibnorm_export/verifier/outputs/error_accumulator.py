"""Running sums of one output's errors over many samples, and the verdict on them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.verifier.report import OutputParity
from ibnorm_export.verifier.tolerances import Bound, chance_ratio

__all__ = ["ErrorSums"]


def _relative(squared_error: float, squared_truth: float) -> float:
    if squared_truth == 0.0:
        return 0.0 if squared_error == 0.0 else float("inf")
    return float(np.sqrt(squared_error / squared_truth))


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The sum of the products of all values; BLAS makes no array of the products."""
    return float(np.dot(a.ravel(), b.ravel()))


@dataclass(frozen=True, slots=True)
class _SampleSums:
    """Sums of squares over one sample: the file's error, the baseline's error, and the truth.

    Args:
        file, baseline, truth: the sums.
        size: values that were compared.
        index: number of the sample.
        covers: what a covering input covers; empty for an ordinary sample.
    """

    file: float
    baseline: float
    truth: float
    _: KW_ONLY
    size: int
    index: int
    covers: str

    @property
    def finite(self) -> bool:
        """Whether all errors are finite; if so, all values are."""
        return bool(np.isfinite(self.file + self.baseline))

    @property
    def error(self) -> float:
        return _relative(self.file, self.truth)

    @property
    def baseline_error(self) -> float:
        return _relative(self.baseline, self.truth)

    def tolerance(self, bound: Bound, worst_baseline: float) -> float:
        """The largest error that passes.

        Args:
            bound: the bound of the dtype.
            worst_baseline: the baseline error of PyTorch's worst ordinary sample.
        """
        baseline = max(worst_baseline, self.baseline_error) if self.covers else worst_baseline
        return max(bound.factor, chance_ratio(self.size)) * baseline + bound.floor

    def excess(self, bound: Bound, worst_baseline: float) -> float:
        """The error over its tolerance; infinite if the error is not a number."""
        tolerance = self.tolerance(bound, worst_baseline)
        return float(np.nan_to_num(self.error / tolerance if tolerance else self.error, nan=np.inf))


@dataclass
class ErrorSums:
    """Running sums of one output over the samples."""

    samples: list[_SampleSums] = field(default_factory=list, init=False)
    max_abs: float = field(default=0.0, init=False)
    _dot: float = field(default=0.0, init=False)
    _squares: float = field(default=0.0, init=False)
    _truth: float = field(default=0.0, init=False)
    _agreeing_rows: int = field(default=0, init=False)
    _rows: int = field(default=0, init=False)

    def __bool__(self) -> bool:
        return bool(self.samples)

    def add(
        self,
        actual: NDArray[Any],
        baseline: NDArray[Any],
        *,
        truth: NDArray[Any],
        least_error: float | None = None,
        spread: float = 1.0,
        index: int | None = None,
        covers: str = "",
    ) -> None:
        """Add one sample: what the file, PyTorch in the file's dtype, and PyTorch in float64 compute.

        Args:
            actual, baseline, truth: the values.
            least_error: the largest baseline error of several realisations of rounding; None if they were not run.
            spread: what multiplies the baseline error if they were not run.
            index: number of the sample; None counts.
            covers: what a covering input covers; it has its own tolerance.
        """
        a, b, t = (values.astype(np.float64, copy=False) for values in (actual, baseline, truth))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = a - t
            size = _dot(t, t)
            own = _dot(error := b - t, error)
            self.samples.append(
                _SampleSums(
                    _dot(difference, difference),
                    own * spread**2 if least_error is None else float(np.maximum(own, least_error**2 * size)),
                    truth=size,
                    size=t.size,
                    index=len(self.samples) if index is None else index,
                    covers=covers,
                )
            )
            self.max_abs = float(np.maximum(self.max_abs, np.abs(difference).max(initial=0.0)))
            self._dot += _dot(a, t)
            self._squares += _dot(a, a)
            self._truth += size
        if t.ndim >= 2 and t.shape[-1] > 1 and t.size:
            self._agreeing_rows += int((a.argmax(-1) == t.argmax(-1)).sum())
            self._rows += int(np.prod(t.shape[:-1]))

    def judge(self, name: str, norms: str, *, bound: Bound) -> OutputParity:
        """Give the verdict: the error over the ordinary samples must be within the bound, and so must each sample's.

        Long samples must not mask a wrong short one, so each is judged by PyTorch's worst ordinary sample. It is not
        compared with PyTorch on the same sample: an error of ten values is a matter of chance, and would fail one
        correct export in sixty (ViTs in fp16 with ten logits per image). A covering input may be much worse conditioned
        than the ordinary ones, so it raises only its own tolerance.
        """
        ordinary = [sample for sample in self.samples if not sample.covers] or self.samples
        truth = sum(sample.truth for sample in ordinary)
        error = _relative(sum(sample.file for sample in ordinary), truth)
        baseline_error = _relative(sum(sample.baseline for sample in ordinary), truth)
        tolerance = bound.tolerance(baseline_error)
        worst_baseline = max(sample.baseline_error for sample in ordinary)
        worst = max(self.samples, key=lambda sample: sample.excess(bound, worst_baseline))
        lengths = float(np.sqrt(self._squares) * np.sqrt(self._truth))
        return OutputParity(
            name,
            norms,
            max_abs=self.max_abs,
            error=error,
            baseline_error=baseline_error,
            worst_sample=worst.index,
            worst_sample_error=worst.error,
            worst_sample_tolerance=worst.tolerance(bound, worst_baseline),
            worst_sample_covers=worst.covers,
            tolerance=tolerance,
            ratio=error / baseline_error if baseline_error else (0.0 if error == 0.0 else float("inf")),
            cosine=self._dot / lengths if lengths else float(self._squares == self._truth),
            top1_agreement=self._agreeing_rows / self._rows if self._rows else None,
            elements=sum(sample.size for sample in self.samples),
            passed=bool(
                np.isfinite(baseline_error) and error <= tolerance and worst.excess(bound, worst_baseline) <= 1.0
            ),
        )
