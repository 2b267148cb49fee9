"""What a comparison found: reports that are true or false, print themselves and serialise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from ibnorm_export.errors import ParityError, message_text
from ibnorm_export.runtimes.norm_executions import NormExecution, norms_summary
from ibnorm_export.text_report import Report, counted, text_table
from ibnorm_export.verifier.options import InputCoverage
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
    "StepReport",
]


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _excess(error: float, tolerance: float) -> float:
    excess = error / tolerance if tolerance else error
    return float("inf") if excess != excess else excess


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: where, and what."""

    where: str
    what: str

    def __post_init__(self) -> None:
        # both have names of a file that may be damaged
        object.__setattr__(self, "where", message_text(self.where))
        object.__setattr__(self, "what", message_text(self.what))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class StaticReport(Report):
    """What reading the file showed; true when nothing is wrong and weights were compared.

    The number of norms may be 0: a baseline has no IBNorm.
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


@dataclass(frozen=True, slots=True)
class NormMapping:
    """A norm of the user's own class, and what replaces it in the export.

    Args:
        module: its path in PyTorch.
        norm: the user's class.
        replacement: what it is exported as, in words.
        error: error of the replacement over all values that reached it, norm-wise relative to the user's class; both
            are computed in float64.
        tolerance: the largest error that passes.
    """

    module: str
    norm: str
    _: KW_ONLY
    replacement: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the replacement computes what the user's class does."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class MappingReport(Report):
    """The user's own module against the one with IBNorm in place, both in float64.

    Args:
        norms: every norm of the user's own class that ran.
        idle: paths of those that did not run.
        error: largest error of an output, norm-wise relative to the user's module.
        tolerance: the largest such error that passes.
    """

    norms: tuple[NormMapping, ...]
    idle: tuple[str, ...]
    _: KW_ONLY
    error: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.error <= self.tolerance and all(norm.passed for norm in self.norms)

    def __str__(self) -> str:
        worst = max((norm.error for norm in self.norms), default=0.0)
        return (
            f"mapping: {counted(len(self.norms), 'norm')} of your own classes against what is exported, in float64: "
            f"largest error of a norm {worst:.2e}, of the outputs {self.error:.2e}: {_verdict(bool(self))}"
        )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every norm that is not what the user's class computes; the outputs only if no norm is."""
        failed = tuple(
            Finding(
                f"mapping of norm {norm.module}",
                f"it is exported as {norm.replacement}, whose relative error against your class {norm.norm} is "
                f"{norm.error:.3g} in float64, the tolerance is {norm.tolerance:.3g}: correct the lambda, epsilon or "
                "convention that your adapter or factory states for it",
            )
            for norm in self.norms
            if not norm.passed
        )
        if failed or self:
            return failed
        return (
            Finding(
                "mapping",
                f"the outputs of the exported module differ from those of your own module by {self.error:.3g} in "
                f"float64, the tolerance is {self.tolerance:.3g}, although every norm agrees; does your model use its "
                "norms outside their forward, for example their weights?",
            ),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not measured."""
        if not self.idle:
            return ()
        shown = ", ".join(self.idle[:5]) + (", ..." if len(self.idle) > 5 else "")
        return (f"{counted(len(self.idle), 'norm')} did not run, so their mapping is not measured: {shown}",)


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
class StepReport:
    """What one step of the numeric verdict found.

    Args:
        outputs: outputs that were compared.
        findings: what is wrong.
        explained: whether a finding names the cause, so that no step of the export is responsible.
    """

    outputs: tuple[OutputParity, ...] = ()
    findings: tuple[Finding, ...] = ()
    explained: bool = False


@dataclass(frozen=True, slots=True)
class OptimiserLevel:
    """The worst output at one of ONNX Runtime's optimisation levels, norms as functions."""

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
    """Where the error of the worst output comes from; `summary` is for a person."""

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

    `first_failure` describes the first that exceeds its tolerance; it is empty if none does.
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
                    _verdict(layer.passed),
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
            yield from _output_lines(f"{self.backend}, {self.dtype}, {counted(self.samples, 'sample')}", self.outputs)
            yield f"numeric: ran {self.method}"
            if self.ran:
                yield f"what ran: {'; '.join(self.ran)}"
            yield from (f"not run: {left_out}" for left_out in self.not_run)
            if self.norms:
                yield norms_summary(self.norms)
        for quality in self.quality:
            yield f"{quality.kind}: {quality}: {_verdict(quality.passed)}"
        if self.mapping is not None:
            yield str(self.mapping)
        if self.attribution is not None:
            yield f"error attribution: {self.attribution.summary}"
        if self.layers is not None:
            yield str(self.layers)
        if self.exact is not None:
            yield "without rounding:"
            yield str(self.exact)


def _output_lines(title: str, outputs: Sequence[OutputParity]) -> Iterator[str]:
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
            _verdict(output.passed),
        )
        for output in outputs
        if output not in summed_up
    ]
    yield text_table(title, columns, rows=rows)
    if summed_up:
        nearest = max(output.excess for output in summed_up)
        yield f"cache: {len(summed_up)} outputs pass; the largest error is {nearest:.2f} of its tolerance"


@dataclass(frozen=True, slots=True)
class ExpectedParity:
    """One output against the value that the training code saved. The error is norm-wise relative to that value.

    Args:
        output: its name.
        what: what was compared: the checkpoint in float64, or the file.
        error: its error.
        tolerance: the largest error that passes.
    """

    output: str
    what: str
    _: KW_ONLY
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class ExpectedReport(Report):
    """A checkpoint and a file against values that the training code saved; true when all pass.

    Args:
        path: the file of values.
        dtype: the type that the training code computed in.
        rows: what was compared.
        findings: what is wrong.
    """

    path: str
    dtype: str
    _: KW_ONLY
    rows: tuple[ExpectedParity, ...]
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows) and not self.findings

    def __str__(self) -> str:
        rows = [
            (row.output, row.what, f"{row.error:.2e}", f"{row.tolerance:.2e}", _verdict(row.passed))
            for row in self.rows
        ]
        title = f"against {self.path}, which the training code computed in {self.dtype}"
        return text_table(title, ("output", "", "rel. error", "tolerance", ""), rows=rows) if rows else ""


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
        lines += [f"FAIL {finding}" for finding in self.findings]
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
        return {"verdict": "pass" if self else "fail", **content}

    def raise_if_failed(self) -> None:
        """Raise ParityError with the first findings when the report is false."""
        if not self:
            raise ParityError(f"{self.model}: " + "; ".join(str(f) for f in self.findings[:3]))
