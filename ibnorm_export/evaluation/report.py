"""The result of an evaluation: the metrics of each candidate, and its comparison with the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, Final

from ibnorm_export.benchmark.statistics import CONFIDENCE, Decision
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.text_report import Report, counted, text_table

__all__ = [
    "CandidateResult",
    "ChangedAnswer",
    "ClassResult",
    "Comparison",
    "Confusion",
    "EvaluationReport",
    "Metric",
]

#: Changed answers and unreadable samples that the text of a report lists.
_LISTED: Final = 10


#: The code of a decision that is not a pass.
_CODES: Final = {
    Decision.FAIL: FindingCode.ACCURACY_LOST,
    Decision.CANNOT_TELL: FindingCode.ACCURACY_UNDECIDED,
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a candidate with its interval.

    Args:
        name: e.g. "top-1" or "perplexity per token".
        value: the estimate; not a number if there is none, as for words in a text without spaces.
        low, high: ends of the 95% interval; equal to the value if the figure has none.
        share: whether it is a share, which is shown in percent.
    """

    name: str
    value: float
    _: KW_ONLY
    low: float
    high: float
    share: bool = False

    def __str__(self) -> str:
        if math.isnan(self.value) and math.isnan(self.low):
            return "none"
        if self.low == self.value == self.high:
            return self._shown(self.value)
        return f"{self._shown(self.value)} ({self._shown(self.low)} to {self._shown(self.high)})"

    def _shown(self, value: float) -> str:
        return f"{value:.2%}" if self.share else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against the reference, on the same samples.

    Args:
        metric: what is compared, e.g. "drop of top-1".
        drop: how much worse the candidate is, as a share; negative if it is better.
        low, high: ends of the 95% interval of the drop.
        max_drop: the largest drop that passes; None if nothing is decided by this metric.
        decision: pass if the interval lies below `max_drop`, fail if it lies above; None without `max_drop`.
        samples: number of pairs.
        samples_needed: number of pairs that would decide at this difference; None if it is decided or no number would.
        method: how the interval was computed.
        details: further figures by name, e.g. the p-value of McNemar's test.
    """

    metric: str
    drop: float
    _: KW_ONLY
    low: float
    high: float
    max_drop: float | None = None
    decision: Decision | None = None
    samples: int
    samples_needed: int | None = None
    method: str
    details: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = (
            f"{self.metric} {self.drop:+.3%} ({CONFIDENCE:.0%} interval {self.low:+.3%} to {self.high:+.3%}, "
            f"{counted(self.samples, 'pair')})"
        )
        text += "".join(f", {name} {value:.3g}" for name, value in self.details.items())
        if self.decision is None or self.max_drop is None:
            return text
        text += f"; at most {self.max_drop:.2%}: {self.decision.value}"
        if self.decision is Decision.CANNOT_TELL:
            needed = self.samples_needed
            text += (
                "; more samples would not decide at this difference, which is too near the limit"
                if needed is None
                else f"; about {needed} samples would decide"
            )
        return text


@dataclass(frozen=True, slots=True)
class ChangedAnswer:
    """A sample to which the candidate gives another answer than the reference.

    Args:
        sample: its name.
        truth: the right answer; empty if it is not known.
        reference: the reference's answer.
        candidate: the candidate's answer.
    """

    sample: str
    truth: str
    reference: str
    candidate: str


@dataclass(frozen=True, slots=True)
class ClassResult:
    """How well one class is recognised.

    Args:
        name: the class.
        samples: number of its samples.
        accuracy: share of them that is recognised.
    """

    name: str
    samples: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often one class is taken for another.

    Args:
        truth: the class.
        answer: what it is taken for.
        count: number of samples.
    """

    truth: str
    answer: str
    count: int


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """What one candidate reached.

    Args:
        name: the candidate.
        samples: number of samples with a result.
        metrics: its figures; the first is the one that decides.
        comparisons: against the reference; empty for the reference itself. The first is the one that decides.
        changed: number of answers that differ from the reference's.
        changed_answers: the first of them.
        seconds: time of its runtime, in this run.
        cached: number of results that an earlier run had left.
        curves: what the report plots, by name: points (x, y).
        classes: each class that has samples; empty if the task has no classes.
        confusions: the most frequent wrong answers.
    """

    name: str
    samples: int
    _: KW_ONLY
    metrics: tuple[Metric, ...]
    comparisons: tuple[Comparison, ...] = ()
    changed: int = 0
    changed_answers: tuple[ChangedAnswer, ...] = ()
    seconds: float = 0.0
    cached: int = 0
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    classes: tuple[ClassResult, ...] = ()
    confusions: tuple[Confusion, ...] = ()

    @property
    def decision(self) -> Decision | None:
        """The decision of the first comparison; None for the reference."""
        return self.comparisons[0].decision if self.comparisons else None


@dataclass(frozen=True, slots=True)
class EvaluationReport(Report):
    """True when there are results and no candidate failed. "Cannot tell" is not a failure.

    Args:
        task: name of the task.
        data: what it was evaluated on.
        candidates: the results, in the order in which the candidates were given.
        reference: name of the candidate that the others are compared with; empty if there is none.
        unreadable: name and reason of every sample that could not be read.
        settings: what the results depend on, besides model and data.
        notes: what the user should know.
        seconds: how long it took, in seconds.
        files: the files that were written.
        environment: machine and package versions.
    """

    task: str
    data: str
    _: KW_ONLY
    candidates: tuple[CandidateResult, ...]
    reference: str = ""
    unreadable: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        complete = bool(self.candidates) and all(c.samples and c.metrics for c in self.candidates)
        return complete and all(c.decision is not Decision.FAIL for c in self.candidates)

    @property
    def decision(self) -> Decision:
        """Fail if a candidate fails, else cannot tell if one is undecided, else pass."""
        if not self:
            return Decision.FAIL
        undecided = any(c.decision is Decision.CANNOT_TELL for c in self.candidates)
        return Decision.CANNOT_TELL if undecided else Decision.PASS

    @property
    def code(self) -> FindingCode | None:
        """The code of the finding; None for a pass."""
        return _CODES.get(self.decision)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        samples = counted(max((c.samples for c in self.candidates), default=0), "sample")
        title = f"{self.task} on {self.data}: {samples}, {self.seconds:.0f} s"
        head = ("candidate", *(metric.name for metric in self.candidates[0].metrics)) if self.candidates else ()
        rows = [(c.name, *map(str, c.metrics)) for c in self.candidates]
        yield text_table(title, head, rows=rows) if rows else title
        for candidate in self.candidates:
            for comparison in candidate.comparisons:
                failed = "FAIL " if comparison.decision is Decision.FAIL else ""
                code = "" if comparison.decision not in _CODES else f" [{_CODES[comparison.decision]}]"
                yield f"{failed}{candidate.name} against {self.reference}: {comparison}{code}"
            if candidate.changed:
                yield f"{candidate.name}: {counted(candidate.changed, 'answer')} changed"
                for change in candidate.changed_answers[:_LISTED]:
                    truth = f" (truth {change.truth})" if change.truth else ""
                    yield f"  {change.sample}: {change.reference} became {change.candidate}{truth}"
        for name, reason in self.unreadable[:_LISTED]:
            yield f"warning: {name} is unreadable: {reason}"
        if len(self.unreadable) > _LISTED:
            yield f"warning: {len(self.unreadable) - _LISTED} more samples are unreadable"
        yield from (f"note: {note}" for note in self.notes)
        if self.files:
            yield f"written: {', '.join(self.files)}"
        yield f"verdict: {self.decision.value}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        return {"verdict": self.decision.value, "code": self.code, "written": content.pop("files"), **content}
