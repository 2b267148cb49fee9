"""The result of a sweep: size, latency and accuracy of each file, the Pareto front, and the file to ship."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, Final

from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.evaluation.report import CandidateResult, Comparison, EvaluationReport
from ibnorm_export.evaluation.sweep_options import Preference
from ibnorm_export.text_report import Report, counted, text_table

__all__ = ["Recommendation", "SweepReport", "SweptFile", "pareto_front", "recommend"]

#: Two files are about as fast, or as small, when they differ by less than this share.
_ABOUT: Final = 0.05


@dataclass(frozen=True, slots=True)
class SweptFile:
    """One file of a sweep on one runtime. It has more than eight fields because each is a column of the table.

    Args:
        name: e.g. "int4-block32", or "fp32@openvino".
        path: the file or folder that was written; empty if the export failed.
        size_bytes: size of its ONNX file and external data.
        verified: whether `verify` passes.
        finding: the first finding of `verify`, if it fails.
        latency_ms: median time of one pass, in ms: that of the first file times the ratio, so that a change of the
            machine's speed during the sweep does not favour a file.
        ratio: latency over that of the first file, the median of interleaved rounds; 1 for the first file.
        drop: how much worse it is than the checkpoint, as a share, as `Comparison.drop`.
        decision: the verdict of the evaluation; None if it was not evaluated.
        problem: why it could not be exported or run; empty if it could.
        on_front: whether no other file is at least as good in size, latency and accuracy, and better in one.
    """

    name: str
    path: str = ""
    _: KW_ONLY
    size_bytes: int = 0
    verified: bool = False
    finding: str = ""
    latency_ms: float = math.nan
    ratio: float = math.nan
    drop: float = math.nan
    decision: Decision | None = None
    problem: str = ""
    on_front: bool = False

    @property
    def passes(self) -> bool:
        """Whether verification and evaluation pass."""
        return self.verified and self.decision is Decision.PASS

    @property
    def costs(self) -> tuple[float, float, float]:
        """Size, latency and drop; less is better. What is not a number counts as infinite."""
        found = (float(self.size_bytes), self.latency_ms, self.drop)
        size, latency, drop = (math.inf if math.isnan(value) else value for value in found)
        return size, latency, drop


def pareto_front(files: Sequence[SweptFile]) -> frozenset[str]:
    """Names of the files for which no other one is at least as good in size, latency and accuracy and better in one.

    Args:
        files: the files; those with a problem are left out.
    """
    complete = [file for file in files if not file.problem]
    return frozenset(
        file.name for file in complete if not any(_dominates(other.costs, file.costs) for other in complete)
    )


def _dominates(costs: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return costs != others and all(own <= other for own, other in zip(costs, others, strict=True))


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The file to ship.

    Args:
        name: the file's form; empty if no file passes.
        why: the reasons, in words.
    """

    name: str
    why: str


def recommend(files: Sequence[SweptFile], prefer: Preference) -> Recommendation:
    """Choose among the files that pass verification and evaluation.

    Args:
        files: the files of a sweep; latencies are compared with that of the first one without a problem.
        prefer: LATENCY takes the fastest one, and of those within 5% of it the smallest; SIZE the other way round.
    """
    passing = [file for file in files if file.passes and not file.problem]
    if not passing:
        undecided = [file.name for file in files if file.verified and file.decision is Decision.CANNOT_TELL]
        if undecided:
            return Recommendation("", f"the samples do not decide about {', '.join(undecided)}: give more samples")
        return Recommendation("", "no file passes verification and evaluation")
    first, second = (1, 0) if prefer is Preference.LATENCY else (0, 1)
    best = min(file.costs[first] for file in passing)
    near = [file for file in passing if file.costs[first] <= best * (1.0 + _ABOUT)]
    chosen = min(near, key=lambda file: (file.costs[second], file.costs[first]))
    return Recommendation(chosen.name, "; ".join(_reasons(chosen, files, prefer=prefer, near=len(near))))


def _reasons(chosen: SweptFile, files: Sequence[SweptFile], *, prefer: Preference, near: int) -> Iterator[str]:
    passing = sum(file.passes for file in files)
    measures = ("fastest", "smallest") if prefer is Preference.LATENCY else ("smallest", "fastest")
    if passing == 1:
        yield "it is the only file that passes verification and evaluation"
    else:
        tie = f"; of {near} that are about as {'fast' if measures[0] == 'fastest' else 'small'}, the {measures[1]}"
        yield f"it is the {measures[0]} of {passing} files that pass verification and evaluation{tie * (near > 1)}"
    first = next(file for file in files if not file.problem)
    if first.name != chosen.name and first.size_bytes and not math.isnan(chosen.ratio):
        smaller = first.size_bytes / chosen.size_bytes
        yield f"it has {1.0 / smaller:.0%} of the size of {first.name} and takes {chosen.ratio:.0%} of its time"
    index = 1 if prefer is Preference.LATENCY else 0
    better = [file for file in files if not file.problem and file.costs[index] < chosen.costs[index] * (1.0 - _ABOUT)]
    for file in better:
        if not file.passes:
            measure = "faster" if index else "smaller"
            yield f"{file.name} is {measure}, but {_obstacle(file)}"


def _obstacle(file: SweptFile) -> str:
    if not file.verified:
        return "does not pass verification"
    if file.decision is Decision.CANNOT_TELL:
        return f"the samples do not decide about it ({file.drop:+.2%})"
    return f"loses too much ({file.drop:+.2%})"


@dataclass(frozen=True, slots=True)
class SweepReport(Report):
    """True when there is a file to ship, or when only more samples are missing. It has one field for each part of the
    page.

    Args:
        checkpoint: what was exported.
        files: the files, in the order of the sweep.
        evaluation: the figures of all files and of PyTorch on the same samples.
        recommendation: the file to ship, and why.
        prefer: what decided between files that pass.
        latency_of: what was timed, in words.
        threads: threads of each runtime.
        seconds: how long it took, in seconds.
        folder: where the files and results are.
        notes: what the user should know.
    """

    checkpoint: str
    files: tuple[SweptFile, ...]
    _: KW_ONLY
    evaluation: EvaluationReport
    recommendation: Recommendation
    prefer: Preference
    latency_of: str
    threads: int
    seconds: float
    folder: str
    notes: tuple[str, ...] = field(default=())

    @property
    def decision(self) -> Decision:
        """Pass if a file is recommended, cannot tell if only more samples are missing, else fail."""
        if self.recommendation.name:
            return Decision.PASS
        undecided = any(file.verified and file.decision is Decision.CANNOT_TELL for file in self.files)
        return Decision.CANNOT_TELL if undecided else Decision.FAIL

    def __bool__(self) -> bool:
        return self.decision is not Decision.FAIL

    @property
    def recommended(self) -> SweptFile | None:
        """The file to ship; None if no file passes."""
        return next((file for file in self.files if file.name == self.recommendation.name), None)

    def result_of(self, name: str) -> CandidateResult | None:
        """The evaluation of a file; None if it was not evaluated."""
        return next((found for found in self.evaluation.candidates if found.name == name), None)

    def comparison_of(self, name: str) -> Comparison | None:
        """How a file compares with the checkpoint; None if it was not evaluated."""
        found = self.result_of(name)
        return found.comparisons[0] if found is not None and found.comparisons else None

    def table(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """Heading and rows of the table of files."""
        results = self.evaluation.candidates
        metric = results[0].metrics[0].name if results and results[0].metrics else "metric"
        rows = []
        for file in self.files:
            result, comparison = self.result_of(file.name), self.comparison_of(file.name)
            if file.problem or result is None or comparison is None:
                rows.append((file.name, "", "", "", "", "", "", "not run"))
                continue
            rows.append(
                (
                    file.name,
                    f"{file.size_bytes / 1e6:.3g}",
                    f"{file.latency_ms:.3g}",
                    f"{file.ratio:.2f}",
                    str(result.metrics[0]),
                    f"{comparison.drop:+.2%} ({comparison.low:+.2%} to {comparison.high:+.2%})",
                    "yes" if file.on_front else "no",
                    _verdict(file),
                )
            )
        compared = next((file.name for file in self.files if not file.problem), "the first")
        change = results[-1].comparisons[0].metric if results and results[-1].comparisons else "change"
        return ("file", "MB", "ms", f"time over {compared}", metric, change, "Pareto front", "verdict"), tuple(rows)

    def problems(self) -> Iterator[str]:
        """Why files could not be exported or run, each reason once."""
        reasons: dict[str, list[str]] = {}
        for file in self.files:
            if file.problem:
                reasons.setdefault(file.problem, []).append(file.name)
        yield from (f"{', '.join(names)} not run: {reason}" for reason, names in reasons.items())

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        results = self.evaluation.candidates
        samples = counted(max((found.samples for found in results), default=0), "sample")
        title = (
            f"sweep of {self.checkpoint}: {counted(len(self.files), 'file')}, {self.evaluation.task} on "
            f"{self.evaluation.data}, {samples}, {self.seconds:.0f} s"
        )
        head, rows = self.table()
        yield text_table(title, head, rows=rows)
        if results and results[0].metrics:
            yield f"{self.evaluation.reference}: {results[0].metrics[0].name} {results[0].metrics[0]}"
        yield f"ms: {self.latency_of}, {counted(self.threads, 'thread')}"
        for file in self.files:
            comparison = self.comparison_of(file.name)
            if comparison is not None and comparison.decision is Decision.CANNOT_TELL:
                yield f"{file.name}: {comparison}"
            if file.finding:
                yield f"FAIL {file.name}: {file.finding}"
        yield from (f"note: {note}" for note in (*self.problems(), *self.notes, *self.evaluation.notes))
        chosen = self.recommended
        if chosen is None:
            yield f"recommended: none; {self.recommendation.why}"
        else:
            yield f"recommended: {chosen.name} ({chosen.path}); {self.recommendation.why}"
        yield f"verdict: {self.decision.value}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        swept = content.pop("files")
        return {"verdict": self.decision.value, **content, "swept": swept, "evaluation": self.evaluation.to_dict()}


def _verdict(file: SweptFile) -> str:
    if not file.verified:
        return "verification fails"
    return "" if file.decision is None else file.decision.value
