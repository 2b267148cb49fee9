"""The page of an evaluation: figures with intervals, differences, calibration, classes, context and changed answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ibnorm_export.benchmark.statistics import CONFIDENCE, Decision
from ibnorm_export.evaluation.report import CandidateResult, EvaluationReport
from ibnorm_export.html_page import Curve, Section, State, Verdict, curves, dots, intervals, render
from ibnorm_export.text_report import counted

__all__ = ["page_verdict", "sections", "write_evaluation"]

#: Rows of a table or plot of classes, of the most frequent wrong answers, of the changed answers of a candidate, and of
#: unreadable samples. On a phone, each row is a card.
_CLASSES: Final = 20
_CONFUSIONS: Final = 10
_CHANGED: Final = 30
_ROWS: Final = 100

#: Metrics that are drawn: the one that decides, and bits per byte or the calibration error.
_DRAWN: Final = (0, 2)


def write_evaluation(report: EvaluationReport, path: str | Path) -> Path:
    """Write one self-contained page.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    return render(
        path,
        f"Evaluation: {report.task}",
        verdict=page_verdict(report),
        summary=_summary(report),
        sections=sections(report),
        environment=report.environment,
        data=report.to_dict(),
    )


def _summary(report: EvaluationReport) -> str:
    parts = [f"{c.name}: {c.metrics[0].name} {c.metrics[0]}" for c in report.candidates if c.metrics]
    return f"{report.data}. {'; '.join(parts)}."


def page_verdict(report: EvaluationReport) -> Verdict:
    """The verdict of the page: which candidates fail or remain undecided, why, and what to do."""
    decided = [(c, c.comparisons[0]) for c in report.candidates if c.decision is not None]
    found = {d: [(c, x) for c, x in decided if x.decision is d] for d in Decision}
    told = tuple(f"{c.name}: {x}" for d in (Decision.FAIL, Decision.CANNOT_TELL) for c, x in found[d])
    total = counted(len(decided), "candidate")
    if report.decision is Decision.CANNOT_TELL:
        needed = [x.samples_needed for _, x in found[Decision.CANNOT_TELL] if x.samples_needed is not None]
        step = f"Evaluate on about {max(needed)} samples." if needed else "Choose another limit: `--max-drop`."
        summary = f"The samples do not decide for {len(found[Decision.CANNOT_TELL])} of {total}."
        return Verdict(State.CANNOT_TELL, summary, reasons=told, next_steps=(step,))
    if report.decision is Decision.FAIL:
        if not found[Decision.FAIL]:
            return Verdict(State.FAIL, "There is no result for every candidate.", reasons=report.notes)
        count = len(found[Decision.FAIL])
        summary = (
            f"{count} of {total} {'loses' if count == 1 else 'lose'} more than the limit against {report.reference}."
        )
        step = "See below which answers changed; export in a wider type, or quantise with other settings."
        return Verdict(State.FAIL, summary, reasons=told, next_steps=(step,))
    if not decided:
        return Verdict(State.PASS, "Every candidate has a result; no limit was set.")
    return Verdict(State.PASS, f"{total} within the limit against {report.reference}.")


def sections(report: EvaluationReport) -> list[Section]:
    """The parts of the page."""
    found = [_results(report)]
    if any(c.comparisons for c in report.candidates):
        found.append(_differences(report))
    found += [section for make in (_calibration, _classes, _context) for section in make(report)]
    found += _changed(report)
    if report.unreadable:
        text = f"{counted(len(report.unreadable), 'sample')} could not be read and count for no candidate."
        found.append(Section("Unreadable samples", (text,), head=("sample", "reason"), rows=report.unreadable[:_ROWS]))
    return found


def _results(report: EvaluationReport) -> Section:
    names = [metric.name for metric in report.candidates[0].metrics] if report.candidates else []
    rows = tuple((c.name, *map(str, c.metrics), f"{c.samples}") for c in report.candidates)
    plots = []
    for index in _DRAWN:
        figures = [(c.name, c.metrics[index]) for c in report.candidates if len(c.metrics) > index]
        if not figures:
            continue
        unit, axis = (100.0, "%") if figures[0][1].share else (1.0, names[index])
        drawn = [(label, unit * m.value, unit * m.low, unit * m.high) for label, m in figures]
        caption = f"Estimate and {CONFIDENCE:.0%} interval of each candidate by itself."
        plots.append((intervals(names[index], axis, rows=drawn), caption))
    text = (
        "All candidates saw the same samples in the same order. These intervals are those of each candidate by itself; "
        "whether two of them differ is answered by the differences of pairs.",
        *report.notes,
    )
    return Section("Results", text, head=("candidate", *names, "samples"), rows=rows, plots=tuple(plots))


def _differences(report: EvaluationReport) -> Section:
    rows, plots = [], []
    compared = [c for c in report.candidates if c.comparisons]
    for candidate in compared:
        for comparison in candidate.comparisons:
            decision = "" if comparison.decision is None else comparison.decision.value
            needed = "" if comparison.samples_needed is None else str(comparison.samples_needed)
            details = ", ".join(f"{name} {value:.3g}" for name, value in comparison.details.items())
            ends = f"{comparison.low:+.3%} to {comparison.high:+.3%}"
            drop = f"{comparison.drop:+.3%}"
            rows.append((candidate.name, comparison.metric, drop, ends, decision, needed, details))
    for index, first in enumerate(compared[0].comparisons):
        drawn = [
            (c.name, 100 * c.comparisons[index].drop, 100 * c.comparisons[index].low, 100 * c.comparisons[index].high)
            for c in compared
        ]
        limit = None if first.max_drop is None else 100 * first.max_drop
        caption = "Worse is to the right." if limit is None else "Worse is to the right; the dashed line is the limit."
        plots.append((intervals(f"{first.metric} against {report.reference}", "%", rows=drawn, limit=limit), caption))
    methods = "; ".join(f"{c.metric}: {c.method}" for c in compared[0].comparisons)
    return Section(
        f"Differences from {report.reference}",
        (
            "Pass: the whole interval lies below the limit. Fail: it lies above. Otherwise the samples do not decide.",
            f"{methods}.",
        ),
        head=("candidate", "what", "difference", f"{CONFIDENCE:.0%} interval", "verdict", "samples needed", "pairs"),
        rows=tuple(rows),
        plots=tuple(plots),
    )


def _calibration(report: EvaluationReport) -> Iterator[Section]:
    lines = [
        Curve(c.name, [x for x, _ in c.curves["calibration"]], [y for _, y in c.curves["calibration"]])
        for c in report.candidates
        if c.curves.get("calibration")
    ]
    if lines:
        lines.append(Curve("perfect", [0.0, 1.0], [0.0, 1.0]))
        plot = curves("Calibration", "probability of the answer", y_label="share that is right", lines=lines)
        yield Section("Calibration", plots=((plot, "Below the diagonal, the model is surer than it should be."),))


def _classes(report: EvaluationReport) -> Iterator[Section]:
    if not report.candidates or not report.candidates[0].classes:
        return
    by_name = [{c.name: c for c in candidate.classes} for candidate in report.candidates]
    first = by_name[0]
    worst = sorted(first, key=lambda name: min(classes[name].accuracy for classes in by_name))[:_CLASSES]
    rows = tuple(
        (name, str(first[name].samples), *(f"{classes[name].accuracy:.2%}" for classes in by_name)) for name in worst
    )
    wrong = {
        candidate.name: [100.0 * (1.0 - classes[name].accuracy) for name in worst]
        for candidate, classes in zip(report.candidates, by_name, strict=True)
    }
    plot = dots("Error by class", "% of the samples of a class that are wrong", names=worst, series=wrong)
    shown = "" if len(worst) == len(first) else f"The {len(worst)} worst of {len(first)} classes."
    yield Section(
        "Classes",
        (shown,) if shown else (),
        head=("class", "samples", *(c.name for c in report.candidates)),
        rows=rows,
        plots=((plot, "The worst class first."),),
    )
    if any(candidate.confusions for candidate in report.candidates):
        yield _wrong_answers(report)


def _wrong_answers(report: EvaluationReport) -> Section:
    """One table, so that candidates are seen side by side, and a phone shows each answer once."""
    counts = [{(c.truth, c.answer): c.count for c in found.confusions} for found in report.candidates]
    most = {pair: max(found.get(pair, 0) for found in counts) for found in counts for pair in found}
    listed = sorted(most, key=lambda pair: -most[pair])[:_CONFUSIONS]
    return Section(
        "Most frequent wrong answers",
        ("How often each candidate gives the answer; nothing if it is not among its most frequent ones.",),
        head=("truth", "answer", *(c.name for c in report.candidates)),
        rows=tuple((*pair, *(str(found.get(pair, "")) for found in counts)) for pair in listed),
    )


def _context(report: EvaluationReport) -> Iterator[Section]:
    name = "perplexity by context"
    lines = [
        Curve(c.name, [x for x, _ in c.curves[name]], [y for _, y in c.curves[name]])
        for c in report.candidates
        if c.curves.get(name)
    ]
    if lines:
        plot = curves("Perplexity by context", "tokens of context", y_label="perplexity", lines=lines, log_x=True)
        caption = "Tokens with 1, 2 to 3, 4 to 7, ... tokens before them in their window."
        yield Section("Context", plots=((plot, caption),))


def _changed(report: EvaluationReport) -> Iterator[Section]:
    for candidate in report.candidates:
        if candidate.changed:
            yield _changed_answers(candidate, report.reference)


def _changed_answers(candidate: CandidateResult, reference: str) -> Section:
    listed = candidate.changed_answers[:_CHANGED]
    text = f"{counted(candidate.changed, 'answer')} of {candidate.samples} differ from those of {reference}."
    if len(listed) < candidate.changed:
        text += f" The first {len(listed)} are shown; the files of results have all of them."
    return Section(
        f"Answers of {candidate.name} that changed",
        (text,),
        head=("sample", "truth", reference, candidate.name),
        rows=tuple((c.sample, c.truth, c.reference, c.candidate) for c in listed),
    )
