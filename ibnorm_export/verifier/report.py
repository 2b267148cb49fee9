"""What a comparison found: reports that are true or false, print themselves and serialise.

Each step has its own report beside it; all of them can be imported from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from ibnorm_export.errors import ParityError
from ibnorm_export.runtimes.norm_executions import NormExecution, norms_summary
from ibnorm_export.text_report import Report, counted
from ibnorm_export.verifier.finding import Finding, verdict_word
from ibnorm_export.verifier.options import InputCoverage
from ibnorm_export.verifier.report_parts.attribution import ErrorAttribution, ErrorSource, OptimiserLevel
from ibnorm_export.verifier.report_parts.expected import ExpectedParity, ExpectedReport
from ibnorm_export.verifier.report_parts.layers import LayerParity, LayersReport
from ibnorm_export.verifier.report_parts.mapping import MappingReport, NormMapping
from ibnorm_export.verifier.report_parts.outputs import OutputParity, output_lines
from ibnorm_export.verifier.tolerances import QualityBound

__all__ = [
    "ErrorAttribution",
    "ErrorSource",
    "ExpectedParity",
    "ExpectedReport",
    "Finding",
    "LayerParity",
    "LayersReport",
    "MappingReport",
    "NormMapping",
    "NumericReport",
    "OptimiserLevel",
    "OutputParity",
    "ParityReport",
    "Quality",
    "StaticReport",
]


@dataclass(frozen=True, slots=True)
class StaticReport(Report):
    """What reading the file showed; true when nothing is wrong and weights were compared.

    Args:
        norms: number of norms that were compared; 0 for a baseline, which has no IBNorm.
        weights: number of weights that were compared.
        findings: what is wrong.
        notes: remarks for the reader.
    """

    norms: int
    weights: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.findings and self.weights > 0

    def __str__(self) -> str:
        compared = f"{counted(self.norms, 'norm')} and {counted(self.weights, 'weight')} compared"
        return f"static: {compared}, {counted(len(self.findings), 'finding')}"


@dataclass(frozen=True, slots=True)
class Quality:
    """A language model's predictions on one text, compared with those of PyTorch in fp32.

    Args:
        norms: how the norms ran.
        kind: "fp32", "fp16", "bf16", "int8" or "int4".
        positions: predictions that were compared; the tokens before each are given.
        agreement: share of them with the same likeliest token.
        divergence: mean KL divergence from PyTorch's distribution, in nats.
        baseline_perplexity: perplexity of PyTorch in fp32.
        perplexity: perplexity of the file.
        bound: limits on the predictions.
        passed: whether they are within the limits.
    """

    norms: str
    kind: str
    _: KW_ONLY
    positions: int
    agreement: float
    divergence: float
    baseline_perplexity: float
    perplexity: float
    bound: QualityBound
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.positions} predictions, norms {self.norms}: agreement {self.agreement:.2%} (at least "
            f"{self.bound.agreement:.1%}), KL divergence {self.divergence:.2e} (at most {self.bound.divergence:.0e}), "
            f"perplexity {self.baseline_perplexity:.4f} -> {self.perplexity:.4f} (ratio at most "
            f"{self.bound.perplexity:g})"
        )


@dataclass(frozen=True, slots=True)
class NumericReport(Report):
    """What running the file showed; true when there are outputs or predictions, all pass, and nothing is wrong.

    Args:
        backend: what ran the file.
        dtype: dtype of the file; "int8" or "int4" if it is quantised.
        method: what was run, in words.
        samples: how many inputs were compared.
        outputs: each output, for each way of running the norms.
        findings: what is wrong.
        notes: remarks for the reader.
        ran: what the inputs cover: batches, lengths, slots of the cache, token ids, padding, ranges of values.
        not_run: what they leave out, and why.
        coverage: FAST if inputs for what ordinary samples leave out were not requested.
        norms: which implementation ran for each norm.
        quality: predictions of a language model.
        attribution: where the error comes from; None if nothing was compared.
        mapping: the user's own norms against those that are exported; None if the user's code is not there or uses
            IBNorm itself.
        layers: the error after every norm and block; None if it was not requested.
        exact: the verdict on a copy that rounds nothing; None if the file is not in half precision or ran on a device.
    """

    backend: str
    dtype: str
    _: KW_ONLY
    method: str
    samples: int
    outputs: tuple[OutputParity, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    ran: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    coverage: InputCoverage = InputCoverage.FULL
    norms: tuple[NormExecution, ...] = ()
    quality: tuple[Quality, ...] = ()
    attribution: ErrorAttribution | None = None
    mapping: MappingReport | None = None
    layers: LayersReport | None = None
    exact: NumericReport | None = None

    def __bool__(self) -> bool:
        compared = [part.passed for part in self.outputs] + [part.passed for part in self.quality]
        parts = [part for part in (self.mapping, self.exact) if part is not None]
        return bool(compared) and all(compared) and all(parts) and not self.findings

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.outputs:
            yield from output_lines(f"{self.backend}, {self.dtype}, {counted(self.samples, 'sample')}", self.outputs)
            yield f"numeric: ran {self.method}"
            if self.ran:
                yield f"what ran: {'; '.join(self.ran)}"
            yield from (f"not run: {left_out}" for left_out in self.not_run)
            if self.norms:
                yield norms_summary(self.norms)
        for quality in self.quality:
            yield f"{quality.kind}: {quality}: {verdict_word(quality.passed)}"
        if self.mapping is not None:
            yield str(self.mapping)
        if self.attribution is not None:
            yield f"error attribution: {self.attribution.summary}"
        if self.layers is not None:
            yield str(self.layers)
        if self.exact is not None:
            yield "without rounding:"
            yield str(self.exact)


@dataclass(frozen=True, slots=True)
class ParityReport(Report):
    """Both verdicts; true only if every requested verdict passes.

    Args:
        model: path of the file.
        checkpoint: where the checkpoint came from.
        static: the static verdict; None if it was not requested.
        numeric: the numeric verdict.
        expected: the verdict against values that the training code saved; None if there are none.
        notes: remarks for the reader.
    """

    model: str
    checkpoint: str
    _: KW_ONLY
    static: StaticReport | None
    numeric: NumericReport | None
    expected: ExpectedReport | None = None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        requested = [part for part in (self.static, self.numeric, self.expected) if part is not None]
        return bool(requested) and all(requested)

    def __str__(self) -> str:
        lines = [f"{self.model} against {self.checkpoint}"]
        lines += [str(part) for part in (self.numeric, self.expected, self.static) if part is not None and str(part)]
        lines += [f"note: {note}" for note in self.all_notes]
        lines += [f"FAIL {finding} [{finding.code}]" for finding in self.findings]
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    @property
    def verdict(self) -> str:
        """The verdict in words; a pass with fast coverage names it."""
        if not self:
            return "fail"
        fast = self.numeric is not None and self.numeric.coverage is InputCoverage.FAST
        return "pass, with fast coverage only" if fast else "pass"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings: static ones first, then those against expected values, which explain the others."""
        return tuple(
            f for part in (self.static, self.expected, self.numeric) if part is not None for f in part.findings
        )

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The report's notes, then those of both verdicts."""
        return (*self.notes, *(n for part in (self.static, self.numeric) if part is not None for n in part.notes))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with `verdict` "pass" or "fail" for the whole and for each part."""
        content = asdict(self)
        for name, part in (("static", self.static), ("numeric", self.numeric), ("expected", self.expected)):
            if part is not None:
                content[name]["verdict"] = "pass" if part else "fail"
        if self.numeric is not None and self.numeric.exact is not None:
            content["numeric"]["exact"]["verdict"] = "pass" if self.numeric.exact else "fail"
        return {"verdict": "pass" if self else "fail", **content}

    def raise_if_failed(self) -> None:
        """Raise ParityError with the first findings when the report is false."""
        if not self:
            raise ParityError(f"{self.model}: " + "; ".join(str(f) for f in self.findings[:3]))
