"""Evaluate an export on a task, and turn the verdict into a case."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ibnorm_export.evaluation.candidates import exported_candidate, torch_candidate
from ibnorm_export.evaluation.evaluate import evaluate
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.evaluation.report import EvaluationReport
from ibnorm_export.gate.attempt import attempt
from ibnorm_export.gate.case import Case
from ibnorm_export.gate.config import EvaluationCheck
from ibnorm_export.gate.latency import OUTCOMES, Prepared
from ibnorm_export.progress import Progress, silent

__all__ = ["Evaluated", "evaluate_export"]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result of one evaluation: a case, and the report if there is one."""

    case: Case
    report: EvaluationReport | None = None


def evaluate_export(
    prepared: Prepared, wanted: EvaluationCheck, *, results: Path, progress: Progress = silent
) -> Evaluated:
    """Evaluate an export against its checkpoint.

    Args:
        prepared: the export.
        wanted: one of its evaluations.
        results: folder of the results of each sample; PyTorch's are taken from there if they are there.
        progress: receives the progress of the work.
    """
    suite = f"{prepared.entry.name}.{wanted.backend}.evaluate"
    what = f"{wanted.task} on {wanted.data.name}" + (f": {', '.join(wanted.tasks)}" if wanted.tasks else "")
    options = EvaluationOptions(
        wanted.backend,
        max_drop=wanted.max_drop,
        limit=wanted.limit,
        max_length=wanted.max_length,
        stride=wanted.stride,
        max_unreadable=wanted.max_unreadable,
        results=results,
        tokenizer=wanted.tokenizer,
        preprocessing=wanted.preprocessing,
        tasks=wanted.tasks,
    )
    cases: list[Case] = []
    report = None
    with attempt(cases, suite=suite, name=what):
        start = time.perf_counter()
        report = evaluate(
            exported_candidate(prepared.exported, name=prepared.entry.name, options=options),
            task=wanted.task,
            data=wanted.data,
            against=torch_candidate(prepared.model, name="torch"),
            options=options,
            progress=progress,
        )
        comparison = report.candidates[1].comparisons[0]
        figures = {metric.name: metric.value for metric in report.candidates[1].metrics}
        figures |= {"drop": comparison.drop, "low": comparison.low, "high": comparison.high}
        cases.append(
            Case(
                suite,
                what,
                outcome=OUTCOMES[report.decision],
                message=str(comparison),
                seconds=time.perf_counter() - start,
                figures=figures,
                code=report.code,
            )
        )
    return Evaluated(cases[0], report)
