"""Running sums of one output's errors over many samples, and the verdict on them."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.verifier.report import OutputParity
from ibnorm_export.verifier.tolerances import Bound

__all__ = ["ErrorSums"]


def _relative(difference: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(np.sqrt(difference / norm))


def _luck(size: int) -> float:
    """How far two equally good errors of `size` values may be apart, as a ratio: four standard deviations.

    The logarithm of a root mean square of n independent values has the variance 1 / 2n, that of a ratio of two 1 / n.
    """
    return math.exp(4.0 / math.sqrt(max(size, 1)))


@dataclass
class ErrorSums:
    """Running sums of one output over the samples."""

    per_sample: list[tuple[float, float, float]] = field(default_factory=list)  # runtime, torch, truth: squares
    sizes: list[int] = field(default_factory=list)  # values in each sample
    _: KW_ONLY
    max_abs: float = 0.0
    dot: float = 0.0
    actual: float = 0.0
    agree: int = 0
    rows: int = 0
    elements: int = 0

    def add(self, actual: NDArray[Any], own: NDArray[Any], *, truth: NDArray[Any]) -> None:
        a, o, t = (v.astype(np.float64) for v in (actual, own, truth))
        with np.errstate(invalid="ignore", over="ignore"):
            self.per_sample.append((float(((a - t) ** 2).sum()), float(((o - t) ** 2).sum()), float((t**2).sum())))
            self.sizes.append(t.size)
            self.max_abs = float(np.maximum(self.max_abs, np.abs(a - t).max(initial=0.0)))
            self.dot += float((a * t).sum())
            self.actual += float((a**2).sum())
        if t.ndim >= 2 and t.shape[-1] > 1 and t.size:
            self.agree += int((a.argmax(-1) == t.argmax(-1)).sum())
            self.rows += int(np.prod(t.shape[:-1]))
        self.elements += t.size

    def judge(self, name: str, norms: str, *, bound: Bound) -> OutputParity:
        runtime, own, truth = (sum(column) for column in zip(*self.per_sample, strict=True))
        error, own_error = _relative(runtime, truth), _relative(own, truth)
        allowed = bound.factor * own_error + bound.floor
        # A short sample must not hide behind long ones: the worst is held to PyTorch's worst. Not sample
        # to sample: an error of ten logits is luck, and would fail a right export now and then (1 of 60
        # ViTs in fp16, of ten logits an image).
        own_worst = max(_relative(o, t) for _, o, t in self.per_sample)
        worst, worst_error, each = 0, 0.0, True
        for index, (r, _, t) in enumerate(self.per_sample):
            sample_error = _relative(r, t)
            if not sample_error <= worst_error:
                worst, worst_error = index, sample_error
            factor = max(bound.factor, _luck(self.sizes[index]))
            each = each and sample_error <= factor * own_worst + bound.floor
        lengths = float(np.sqrt(self.actual) * np.sqrt(truth))
        return OutputParity(
            name=name,
            norms=norms,
            max_abs=self.max_abs,
            error=error,
            torch_error=own_error,
            worst_sample=worst,
            worst_sample_error=worst_error,
            allowed=allowed,
            ratio=error / own_error if own_error else (0.0 if error == 0.0 else float("inf")),
            cosine=self.dot / lengths if lengths else float(self.actual == truth),
            top1_agreement=self.agree / self.rows if self.rows else None,
            elements=self.elements,
            passed=bool(np.isfinite(own_error) and error <= allowed and each),
        )
