"""The result of `analyze`: figures of every norm, in the order of the model."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Final

from ibnorm_export.text_report import Report, text_table

__all__ = ["AnalysisReport", "Histogram", "NormAnalysis"]

_COLUMNS: Final = (
    "norm",
    "type",
    "kind",
    "lambda",
    "kurtosis before",
    "after",
    "variance",
    "I(T; Y)",
    "I(T; X)",
    "value",
)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values before and after compression, in units of lambda; those beyond the first or last end count in its bin.

    Args:
        ends: the ends of the bins, one more than there are bins.
        before: share of the values of t in each bin.
        after: share of the values of g(t) in each bin.
    """

    ends: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NormAnalysis:
    """Figures of one norm, in one type and with one lambda. Each field is one figure, so there are many.

    Args:
        module: path of the norm.
        compression: "S", "L" or "T".
        dtype: type that the model ran in.
        lambd: the canonical lambda.
        own: whether that is the norm's own lambda.
        kurtosis_before: mean excess kurtosis of a row of x, the values that reach the norm.
        kurtosis_after: mean excess kurtosis of a row of g((x - mean) / lambda).
        deviation: root mean square over rows of the standard deviation of x.
        contraction: variance after compression over variance before it, both in units of lambda squared; at most 1.
        about_target: I(T; Y) in bits, where T is the norm's output.
        about_input: I(T; X) in bits.
        bottleneck: I(T; Y) - beta * I(T; X) in bits.
        histogram: values of t = (x - mean) / lambda and of g(t); None if there are no finite ones.
        about_target_error, about_input_error, bottleneck_error: their standard errors over the choice of
            samples; None if there are too few.
    """

    module: str
    compression: str
    _: KW_ONLY
    dtype: str
    lambd: float
    own: bool
    kurtosis_before: float
    kurtosis_after: float
    deviation: float
    contraction: float
    about_target: float
    about_input: float
    bottleneck: float
    histogram: Histogram | None = None
    about_target_error: float | None = None
    about_input_error: float | None = None
    bottleneck_error: float | None = None

    @property
    def value_text(self) -> str:
        """The value of the bottleneck with its error."""
        error = "" if self.bottleneck_error is None else f" ± {self.bottleneck_error:.3f}"
        return f"{self.bottleneck:.3f}{error}"


@dataclass(frozen=True, slots=True)
class AnalysisReport(Report):
    """All rows, and the settings that the figures depend on; false if there are no rows.

    Args:
        source: the checkpoint or file.
        rows: norms in the order of the model, for each type.
        samples: number of samples in a Gram matrix.
        target: what Y is, in words.
        alpha: order of the entropies.
        beta: weight of I(T; X) in the value of the bottleneck.
        width: width of the kernels, in words.
        notes: remarks on the figures.
    """

    source: str
    rows: tuple[NormAnalysis, ...]
    _: KW_ONLY
    samples: int
    target: str
    alpha: float
    beta: float
    width: str
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __str__(self) -> str:
        rows = [
            (
                r.module,
                r.dtype,
                r.compression,
                f"{r.lambd:g}",
                f"{r.kurtosis_before:.3f}",
                f"{r.kurtosis_after:.3f}",
                f"{r.contraction:.3f}",
                f"{r.about_target:.3f}",
                f"{r.about_input:.3f}",
                r.value_text,
            )
            for r in self.rows
        ]
        table = text_table(f"{self.source}: {self.samples} samples, Y is {self.target}", _COLUMNS, rows=rows)
        how = (
            f"information in bits: Renyi entropies of order {self.alpha:g}, Gaussian kernels (width: {self.width}); "
            f"value = I(T; Y) - {self.beta:g} I(T; X), with its "
            "standard error over the choice of samples"
        )
        return "\n".join((table, how, *(f"note: {note}" for note in self.notes)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        rows = [{"lambda" if key == "lambd" else key: value for key, value in row.items()} for row in content["rows"]]
        return {**content, "rows": rows}
