"""Which step between the truth and the file adds the error."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

__all__ = ["ErrorAttribution", "ErrorSource", "OptimiserLevel"]


@dataclass(frozen=True, slots=True)
class OptimiserLevel:
    """The worst output at one of ONNX Runtime's optimisation levels, norms as functions.

    Args:
        name: the level.
        error: relative error there.
        tolerance: the largest error that passes.
        passed: whether the error is within it.
    """

    name: str
    error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True, slots=True)
class ErrorSource:
    """One step between the truth and the file's output.

    Args:
        name: "mapping", "dtype", "exporter", "optimiser" or "kernel".
        error: error after this step; None if it was not measured.
        responsible: whether this step raises the error above its tolerance.
        explanation: what ran, or why nothing did.
    """

    name: str
    error: float | None
    responsible: bool
    explanation: str


@dataclass(frozen=True, slots=True)
class ErrorAttribution:
    """Where the error of the worst output comes from.

    Args:
        output: the output.
        dtype: dtype of the file.
        sources: the steps between the truth and the file's output, in order.
        levels: the error at each of ONNX Runtime's optimisation levels; empty if it was not measured.
        summary: the same in words.
    """

    output: str
    dtype: str
    _: KW_ONLY
    sources: tuple[ErrorSource, ...]
    levels: tuple[OptimiserLevel, ...]
    summary: str

    @property
    def source(self) -> str:
        """Name of the first source that is responsible; empty if none is."""
        return next((source.name for source in self.sources if source.responsible), "")
