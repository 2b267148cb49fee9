"""Running sums of one output's errors over many samples, and the verdict on them."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class _SampleSums:
    """Sums of squares over one sample: the file's error, the baseline's error, and the truth."""

    file: float
    baseline: float
    truth: float
    size: int

    @property
    def error(self) -> float:
        return _relative(self.file, self.truth)

    @property
    def baseline_error(self) -> float:
        return _relative(self.baseline, self.truth)


@dataclass
class ErrorSums:
    """Running sums of one output over the samples."""

    samples: list[_SampleSums] = field(default_factory=list, init=False)
    max_abs: float = field(default=0.0, init=False)
    _dot: float = field(default=0.0, init=False)
    _squares: float = field(default=0.0, init=False)
    _agreeing_rows: int = field(default=0, init=False)
    _rows: int = field(default=0, init=False)

    def __bool__(self) -> bool:
        return bool(self.samples)

    def add(self, actual: NDArray[Any], baseline: NDArray[Any], *, truth: NDArray[Any]) -> None:
        """Add one sample: what the file, PyTorch in the file's dtype, and PyTorch in float64 compute."""
        a, b, t = (values.astype(np.float64) for values in (actual, baseline, truth))
        with np.errstate(invalid="ignore", over="ignore"):
            self.samples.append(
                _SampleSums(
                    float(((a - t) ** 2).sum()), float(((b - t) ** 2).sum()), truth=float((t**2).sum()), size=t.size
                )
            )
            self.max_abs = float(np.maximum(self.max_abs, np.abs(a - t).max(initial=0.0)))
            self._dot += float((a * t).sum())
            self._squares += float((a**2).sum())
        if t.ndim >= 2 and t.shape[-1] > 1 and t.size:
            self._agreeing_rows += int((a.argmax(-1) == t.argmax(-1)).sum())
            self._rows += int(np.prod(t.shape[:-1]))

    def judge(self, name: str, norms: str, *, bound: Bound) -> OutputParity:
        """Give the verdict: the error over all samples must be within the bound, and so must that of each sample.

        Long samples must not mask a wrong short one, so each is judged by PyTorch's worst sample. It is not compared
        with PyTorch on the same sample: an error of ten values is a matter of chance, and would fail one correct
        export in sixty (ViTs in fp16 with ten logits per image).
        """
        truth = sum(sample.truth for sample in self.samples)
        error = _relative(sum(sample.file for sample in self.samples), truth)
        baseline_error = _relative(sum(sample.baseline for sample in self.samples), truth)
        tolerance = bound.tolerance(baseline_error)
        worst_baseline = max(sample.baseline_error for sample in self.samples)
        worst = max(range(len(self.samples)), key=lambda index: np.nan_to_num(self.samples[index].error, nan=np.inf))
        each_passes = all(
            sample.error <= max(bound.factor, chance_ratio(sample.size)) * worst_baseline + bound.floor
            for sample in self.samples
        )
        lengths = float(np.sqrt(self._squares) * np.sqrt(truth))
        return OutputParity(
            name,
            norms,
            max_abs=self.max_abs,
            error=error,
            baseline_error=baseline_error,
            worst_sample=worst,
            worst_sample_error=self.samples[worst].error,
            tolerance=tolerance,
            ratio=error / baseline_error if baseline_error else (0.0 if error == 0.0 else float("inf")),
            cosine=self._dot / lengths if lengths else float(self._squares == truth),
            top1_agreement=self._agreeing_rows / self._rows if self._rows else None,
            elements=sum(sample.size for sample in self.samples),
            passed=bool(np.isfinite(baseline_error) and error <= tolerance and each_passes),
        )
