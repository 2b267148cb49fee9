"""Judge a latency budget: measure rounds until they decide, or until the largest number of rounds is reached."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from ibnorm_export.artifacts.axes import BATCH, PAST, SEQUENCE, TOTAL, axis_name
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import default_length
from ibnorm_export.benchmark.baseline import REFERENCE_LOAD, baseline_of, compare_baselines, read_baseline
from ibnorm_export.benchmark.bench import bench_forward, input_axes
from ibnorm_export.benchmark.options import BACKEND_CANDIDATES, TORCH_CANDIDATES, BenchOptions, Timing
from ibnorm_export.benchmark.report import BenchReport
from ibnorm_export.benchmark.statistics import Decision, LatencyVerdict, judge, paired
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate.attempt import attempt
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.config import ExportCheck, LatencyBudget
from ibnorm_export.progress import Progress, silent

__all__ = ["OUTCOMES", "Prepared", "latency_case"]

#: The outcome of a case by the decision of a statistic.
OUTCOMES: Final = {
    Decision.PASS: Outcome.PASS,
    Decision.FAIL: Outcome.FAIL,
    Decision.CANNOT_TELL: Outcome.CANNOT_TELL,
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """An export of a check that exists: its entry, its checkpoint and its file."""

    entry: ExportCheck
    model: LoadedModel
    exported: ExportedModel


def latency_case(
    prepared: Prepared, budget: LatencyBudget, *, others: Mapping[str, Prepared], progress: Progress = silent
) -> Case:
    """Time one pass of an export and judge its budget.

    Args:
        prepared: the export.
        budget: one of its budgets.
        others: exports by name, that the budget may compare with.
        progress: receives the progress of the work.
    """
    suite = f"{prepared.entry.name}.{budget.backend}.latency"
    if budget.max_ms is not None:
        what = f"at most {budget.max_ms:g} ms"
    else:
        what = f"at most {budget.max_ratio:g} times {budget.against or budget.baseline}"
    if budget.against is not None and budget.against not in (*TORCH_CANDIDATES, *BACKEND_CANDIDATES, *others):
        return Case(
            suite, what, outcome=Outcome.SKIPPED, message=f"{budget.against} was not exported", code=FindingCode.NOT_RUN
        )
    cases: list[Case] = []
    with attempt(cases, suite=suite, name=what):
        start = time.perf_counter()
        judged = _judge(budget, _timer(prepared, budget, others=others, progress=progress))
        verdict = judged.verdict
        cases.append(
            Case(
                suite,
                what,
                outcome=OUTCOMES[verdict.decision],
                message="; ".join((verdict.text, *judged.notes)),
                seconds=time.perf_counter() - start,
                figures={**verdict.to_dict(), **_speed(prepared, budget, ms=judged.ms)},
                code=verdict.code,
            )
        )
    return cases[0]


def _speed(prepared: Prepared, budget: LatencyBudget, *, ms: float) -> dict[str, float | str | None]:
    """Time of a pass, what it processes per second, and what the ratio compares it with.

    Args:
        prepared: the export.
        budget: what was judged.
        ms: median time of one pass.
    """
    sizes = _sizes(prepared, budget)
    of_tokens = prepared.exported.metadata.max_positions > 0
    done = sizes[BATCH] * (sizes[SEQUENCE] if of_tokens else 1)
    return {"ms": ms, "tokens_per_s" if of_tokens else "samples_per_s": 1e3 * done / ms, "against": budget.against}


def _sizes(prepared: Prepared, budget: LatencyBudget) -> dict[str, int]:
    """Sizes of the dynamic axes; text generation is timed by one step with a filled cache."""
    longest = prepared.exported.metadata.max_positions
    if prepared.entry.task is Task.TEXT_GENERATION:
        past = budget.sequence or default_length(max(longest - 1, 0))
        return {BATCH: budget.batch, SEQUENCE: 1, PAST: past, TOTAL: past + 1}
    return {BATCH: budget.batch, SEQUENCE: budget.sequence or default_length(longest)}


def _known_sizes(prepared: Prepared, budget: LatencyBudget) -> dict[str, int]:
    """The sizes of the axes that the file has, and those that the budget states: `bench` refuses any other."""
    stated = {BATCH: budget.batch > 1, SEQUENCE: budget.sequence > 0}
    fixed = prepared.exported.metadata.shape
    known = {axis_name(axis) for axis in (*input_axes(prepared.exported), *fixed)}
    sizes = _sizes(prepared, budget)
    return {axis: size for axis, size in sizes.items() if axis in known or stated.get(axis, False)}


def _timer(
    prepared: Prepared, budget: LatencyBudget, *, others: Mapping[str, Prepared], progress: Progress
) -> Callable[[int], BenchReport]:
    """A function that measures a given number of rounds of the export and of what it is compared with."""
    against: list[str | ExportedModel] = []
    if budget.baseline is not None:
        against = [REFERENCE_LOAD]
    elif budget.against is not None:
        other = others.get(budget.against)
        against = [budget.against if other is None else other.exported]
    options = BenchOptions(
        budget.backend,
        sizes=_known_sizes(prepared, budget),
        threads=budget.threads or None,
        timing=Timing(warmup_ms=200.0),
    )

    def take(rounds: int) -> BenchReport:
        return bench_forward(
            prepared.exported,
            model=prepared.model,
            against=against,
            options=replace(options, rounds=rounds),
            progress=progress,
        )

    return take


@dataclass(frozen=True, slots=True)
class _Judged:
    """A verdict on a latency, its notes, and the median time of a pass in ms."""

    verdict: LatencyVerdict
    notes: tuple[str, ...]
    ms: float


def _judge(budget: LatencyBudget, take: Callable[[int], BenchReport]) -> _Judged:
    """The verdict; takes more rounds while they do not decide and the budget allows more."""
    report = take(budget.rounds)
    before = None if budget.baseline is None else read_baseline(budget.baseline)
    times, other_times = _round_times(report)
    while True:
        notes: tuple[str, ...] = ()
        if budget.max_ms is not None:
            ratio = paired(times, [budget.max_ms] * len(times))
            verdict = replace(judge(ratio, 1.0, resolution=0.0), unit_ms=budget.max_ms)
        elif before is not None:
            now = replace(baseline_of(report), times_ms=times, reference_ms=other_times)
            comparison = compare_baselines(before, now, max_ratio=budget.max_ratio, allow=budget.allow)
            verdict, notes = comparison.verdict, comparison.notes
        else:
            verdict = judge(paired(times, other_times), budget.max_ratio)
        more = min(verdict.rounds_needed or 0, budget.max_rounds) - len(times)
        if verdict.decision is not Decision.CANNOT_TELL or more < 1:
            return _Judged(verdict, notes, statistics.median(times))
        report = take(more)
        more_times, more_other_times = _round_times(report)
        times += more_times
        other_times += more_other_times


def _round_times(report: BenchReport) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Medians of the rounds in ms, of the export and of what it is compared with."""
    first, *others = report.latencies
    return first.round_ms, others[0].round_ms if others else ()
