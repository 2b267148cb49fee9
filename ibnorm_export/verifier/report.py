"""What a comparison found: reports that are true or false, explain themselves and serialise."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from ibnorm_export.errors import ParityError
from ibnorm_export.runtimes.norm_executions import NormExecution
from ibnorm_export.verifier.tolerances import QualityBound

__all__ = [
    "Blame",
    "Finding",
    "LayerParity",
    "LayersReport",
    "Level",
    "Link",
    "NumericReport",
    "OutputParity",
    "ParityReport",
    "Quality",
    "StaticReport",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, where, and in words."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class StaticReport:
    """What reading the file showed; true when nothing is wrong and something was read. A baseline has no IBNorm."""

    norms: int
    weights: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.findings and self.weights > 0


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output over all samples, norms fused or as functions. Errors are norm-wise relative to the float64 truth."""

    name: str
    norms: str
    _: KW_ONLY
    max_abs: float
    error: float
    torch_error: float
    worst_sample: int
    worst_sample_error: float
    allowed: float
    ratio: float
    cosine: float
    top1_agreement: float | None
    elements: int
    passed: bool


@dataclass(frozen=True, slots=True)
class Quality:
    """A language model's predictions on one text beside those of PyTorch in fp32.

    Args:
        norms: how they ran.
        kind: "fp32", "fp16", "bf16", "int8" or "int4".
        positions: predictions that were compared, the tokens before each given.
        agreement: share of them with the same likeliest token.
        divergence: mean KL divergence from PyTorch's distribution, in nats.
        before, after: perplexity of PyTorch and of the file.
    """

    norms: str
    kind: str
    _: KW_ONLY
    positions: int
    agreement: float
    divergence: float
    before: float
    after: float
    bound: QualityBound
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.positions} predictions, norms {self.norms}: agreement {self.agreement:.2%} (at least "
            f"{self.bound.agreement:.1%}), KL divergence {self.divergence:.2e} (at most {self.bound.divergence:.0e}), "
            f"perplexity {self.before:.4f} -> {self.after:.4f} (ratio at most {self.bound.perplexity:g})"
        )


@dataclass(frozen=True, slots=True)
class Level:
    """The worst output at one of ONNX Runtime's optimisation levels, norms as functions."""

    name: str
    error: float
    allowed: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Link:
    """One link between two corners: the error behind it (None where it did not run), and whether it is to blame."""

    name: str
    error: float | None
    guilty: bool
    says: str


@dataclass(frozen=True, slots=True)
class Blame:
    """Which link adds the error of the worst output: dtype, exporter, optimiser or kernel; `words` for a person."""

    output: str
    dtype: str
    _: KW_ONLY
    links: tuple[Link, ...]
    levels: tuple[Level, ...]
    words: str

    @property
    def guilty(self) -> str:
        """Name of the first link to blame; empty where every one keeps its bound."""
        return next((link.name for link in self.links if link.guilty), "")


@dataclass(frozen=True, slots=True)
class LayerParity:
    """A norm's or block's output in all corners.

    Args:
        module: its path in PyTorch.
        kind: "norm" or "block".
        node: the ONNX node that gives it.
        torch_error: of PyTorch in the file's type, norm-wise relative to float64.
        corners: the runtime's, by how the norms ran.
    """

    module: str
    kind: str
    _: KW_ONLY
    node: str
    torch_error: float
    corners: tuple[OutputParity, ...]

    @property
    def passed(self) -> bool:
        return all(corner.passed for corner in self.corners)


@dataclass(frozen=True, slots=True)
class LayersReport:
    """Every norm and block in the order of the graph; `first` says which one leaves its bound first, or nothing."""

    layers: tuple[LayerParity, ...]
    first: str
    notes: tuple[str, ...] = ()

    @property
    def first_layer(self) -> LayerParity | None:
        """The first one that leaves its bound."""
        return next((layer for layer in self.layers if not layer.passed), None)


@dataclass(frozen=True, slots=True)
class NumericReport:
    """What running the file showed; true when every output and quality passed and there was one."""

    backend: str
    dtype: str
    _: KW_ONLY
    method: str
    samples: int
    outputs: tuple[OutputParity, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    norms: tuple[NormExecution, ...] = ()
    quality: tuple[Quality, ...] = ()
    blame: Blame | None = None
    layers: LayersReport | None = None

    def __bool__(self) -> bool:
        judged = [part.passed for part in self.outputs] + [part.passed for part in self.quality]
        return bool(judged) and all(judged) and not self.findings


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Both verdicts; true only when each that was asked for is."""

    model: str
    checkpoint: str
    _: KW_ONLY
    static: StaticReport | None
    numeric: NumericReport | None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        asked = [part for part in (self.static, self.numeric) if part is not None]
        return bool(asked) and all(asked)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, static first."""
        return tuple(f for part in (self.static, self.numeric) if part is not None for f in part.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with `verdict` "pass" or "fail" for the whole and for each part."""
        content = asdict(self)
        for name, part in (("static", self.static), ("numeric", self.numeric)):
            if part is not None:
                content[name]["verdict"] = "pass" if part else "fail"
        return {"verdict": "pass" if self else "fail", **content}

    def raise_if_failed(self) -> None:
        """Raise ParityError with the first findings when the report is false."""
        if not self:
            raise ParityError(f"{self.model}: " + "; ".join(str(f) for f in self.findings[:3]))
