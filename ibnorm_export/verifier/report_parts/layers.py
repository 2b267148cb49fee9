"""The error after every norm and block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from ibnorm_export.text_report import Report, text_table
from ibnorm_export.verifier.finding import verdict_word
from ibnorm_export.verifier.report_parts.outputs import OutputParity

__all__ = ["LayerParity", "LayersReport"]


@dataclass(frozen=True, slots=True)
class LayerParity:
    """The output of a norm or block. Errors are norm-wise relative to the truth.

    Args:
        module: its path in PyTorch.
        kind: "norm" or "block".
        node: the ONNX node that computes it.
        baseline_error: error of PyTorch in the file's dtype.
        variants: parities of the file, one for each way of running the norms.
    """

    module: str
    kind: str
    _: KW_ONLY
    node: str
    baseline_error: float
    variants: tuple[OutputParity, ...]

    @property
    def passed(self) -> bool:
        """Whether every variant passes."""
        return all(variant.passed for variant in self.variants)


@dataclass(frozen=True, slots=True)
class LayersReport(Report):
    """Every norm and block in the order of the graph; true when there are some and all pass.

    Args:
        layers: each norm and block.
        first_failure: the first that exceeds its tolerance, in words; empty if none does.
        notes: remarks for the reader.
    """

    layers: tuple[LayerParity, ...]
    first_failure: str
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.layers) and self.first_failed_layer is None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.layers:
            variants = [variant.norms for variant in self.layers[0].variants]
            columns = ("module", "", "baseline error", *variants, "tolerance", "")
            rows = [
                (
                    layer.module,
                    layer.kind,
                    f"{layer.baseline_error:.2e}",
                    *(f"{variant.error:.2e}" for variant in layer.variants),
                    f"{layer.variants[0].tolerance:.2e}",
                    verdict_word(layer.passed),
                )
                for layer in self.layers
            ]
            yield text_table("layers: relative error against float64", columns, rows=rows)
            yield f"layers: {self.first_failure or 'all are within their tolerance'}"
        else:
            yield "layers: none compared"
        for note in self.notes:
            yield f"note: {note}"

    @property
    def first_failed_layer(self) -> LayerParity | None:
        """The first layer that exceeds its tolerance."""
        return next((layer for layer in self.layers if not layer.passed), None)
