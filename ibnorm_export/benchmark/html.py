"""HTML of benchmarks: the page of a benchmark, and the page that compares two baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from markupsafe import Markup

from ibnorm_export.benchmark.baseline import BaselineComparison
from ibnorm_export.benchmark.loading import LOADING_COLUMNS
from ibnorm_export.benchmark.report import (
    BenchReport,
    GenerationReport,
    Latency,
    Ratio,
    loading_rows,
    speed_up,
)
from ibnorm_export.benchmark.statistics import CONFIDENCE, Decision
from ibnorm_export.html_page import Curve, Distribution, Section, State, Verdict, curves, distributions, dots, render
from ibnorm_export.runtimes.norm_executions import norms_summary
from ibnorm_export.text_report import counted, ratio_text, three_digits

__all__ = ["latency_plot", "latency_section", "write_bench", "write_comparison"]

_STATES: Final = {Decision.PASS: State.PASS, Decision.FAIL: State.FAIL, Decision.CANNOT_TELL: State.CANNOT_TELL}


def write_bench(report: BenchReport | GenerationReport, path: str | Path) -> Path:
    """Write one self-contained page: the candidates, their times as distributions, and how much faster the first is.

    A benchmark judges nothing unless fused kernels were demanded.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    verdict, shown = None, [_generation(report)] if isinstance(report, GenerationReport) else []
    if isinstance(report, BenchReport):
        shown = [latency_section(report, "Latency")]
        if report.loading:
            shown.append(_loading(report))
        if report.norms:
            shown.append(_norms(report))
        if report.require_fused:
            verdict = _fused_verdict(report)
    return render(
        path,
        f"Speed of {report.model}",
        verdict=verdict,
        summary=_speeds(report),
        sections=shown,
        environment=report.environment,
        data=report.to_dict(),
    )


def _speeds(report: BenchReport | GenerationReport) -> str:
    """What is faster than what, in a sentence."""
    if isinstance(report, GenerationReport):
        return f"Text generation on {counted(report.threads, 'thread')}, {counted(report.rounds, 'round')}."
    found = [f"{ratio.name} is {speed_up(ratio)} than {ratio.against}" for ratio in report.ratios]
    return f"{'; '.join(found)}." if found else f"Times on {counted(report.threads, 'thread')}."


def _fused_verdict(report: BenchReport) -> Verdict:
    if report:
        return Verdict(State.PASS, "Every norm ran as a fused kernel.")
    problems = tuple(f"{norm.module}: {norm.problem}" for norm in report.norms if norm.problem)
    return Verdict(
        State.FAIL,
        "Fused kernels were demanded, and not every norm ran as one.",
        reasons=problems or ("It is not known whether a norm ran as a fused kernel.",),
        next_steps=("See which kernels this machine has: `ibnorm-export doctor`.",),
    )


def latency_section(report: BenchReport, title: str) -> Section:
    """The times of every candidate, as a table and as distributions."""
    ratios = {ratio.against: ratio for ratio in report.ratios}
    rows = tuple(
        (
            x.name,
            three_digits(x.p50_ms),
            three_digits(x.p90_ms),
            three_digits(x.p99_ms),
            three_digits(x.throughput_per_s),
            speed_up(ratios[x.name]) if x.name in ratios else "",
            str(x.passes),
        )
        for x in report.latencies
    )
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in report.inputs.items())
    text = (
        f"{shapes}; {counted(report.threads, 'thread')}; {counted(report.rounds, 'round')} of each, in turns.",
        *(f"Warning: {warning}" for warning in report.warnings),
    )
    first = report.latencies[0].name if report.latencies else "the first"
    head = ("candidate", "p50 ms", "p90 ms", "p99 ms", "samples/s", f"{first} against it", "passes")
    caption = "Each dot is the median of a round; the bar is about single passes. Further left is faster."
    plots = ((latency_plot("Latency of one pass", report.latencies), caption),)
    return Section(title, text, head=head, rows=rows, plots=plots if report.latencies else ())


def latency_plot(title: str, latencies: Sequence[Latency]) -> Markup:
    """Times of every candidate as distributions."""
    rows = [Distribution(x.name, x.round_ms, (x.p50_ms, x.p90_ms, x.p99_ms)) for x in latencies]
    return distributions(title, "ms", rows=rows)


def _loading(report: BenchReport) -> Section:
    text = (
        "Each row is the median of fresh processes. Prepacking copies weights into the layout that the kernels prefer: "
        "a pass is faster, the session takes longer and holds more memory.",
    )
    return Section("Loading", text, head=LOADING_COLUMNS, rows=tuple(loading_rows(report.loading)))


def _norms(report: BenchReport) -> Section:
    rows = tuple((norm.module, norm.implementation, norm.problem) for norm in report.norms)
    text = f"{norms_summary(report.norms)}."
    return Section("Norms", (text,), head=("norm", "ran as", "problem"), rows=rows)


def _generation(report: GenerationReport) -> Section:
    ratios = {(r.against, r.prompt, r.batch, r.stage): r.spread for r in report.ratios}

    def against(name: str, prompt: int, batch: int) -> str:
        spread = ratios.get((name, prompt, batch, "decode"))
        if spread is None:
            return ""
        words = speed_up(Ratio("", name, median=spread.ratio, p25=spread.low, p75=spread.high))
        return words if math.isfinite(spread.high) else f"{words.partition(' (')[0]} ({spread.text()})"

    rows = tuple(
        (
            t.name,
            str(t.prompt),
            str(t.batch),
            three_digits(t.first_token_ms),
            three_digits(t.inter_token_p50_ms),
            three_digits(t.inter_token_p99_ms),
            three_digits(t.prefill_tokens_per_s),
            three_digits(t.decode_tokens_per_s),
            "" if t.peak_memory_mb is None else f"{t.peak_memory_mb:.0f}",
            against(t.name, t.prompt, t.batch),
        )
        for t in report.timings
    )
    head = (
        "candidate",
        "prompt",
        "batch",
        "first token ms",
        "token p50 ms",
        "token p99 ms",
        "prefill tokens/s",
        "decode tokens/s",
        "peak MB",
        "decoding of the first against it",
    )
    names = [f"{t.name}, {t.prompt}, {t.batch}" for t in report.timings]
    first = {"first token": [t.first_token_ms for t in report.timings]}
    between = {
        "p50": [t.inter_token_p50_ms for t in report.timings],
        "p90": [t.inter_token_p90_ms for t in report.timings],
        "p99": [t.inter_token_p99_ms for t in report.timings],
    }
    caption = "Candidate, tokens of the prompt, rows. Further left is faster."
    plots = (
        (dots("Time to the first token", "ms", names=names, series=first), caption),
        (dots("Time between tokens", "ms", names=names, series=between), caption),
    )
    text = f"The intervals of the last column have a confidence of {CONFIDENCE:.0%}."
    return Section("Generation", (text,), head=head, rows=rows, plots=plots if report.timings else ())


def write_comparison(comparison: BaselineComparison, path: str | Path) -> Path:
    """Write one self-contained page: every round of both baselines over the reference load, and the verdict.

    Raises:
        IBNormError: the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    before, after = comparison.before, comparison.after
    both = (("A", before), ("B", after))
    lines = [Curve(name, range(1, len(b.ratios) + 1), b.ratios) for name, b in both]
    plot = curves("Time over the reference load, by round", "round", y_label="ratio", lines=lines)
    spread = distributions(
        "Time over the reference load", "ratio", rows=[Distribution(name, b.ratios) for name, b in both]
    )
    rows = tuple(
        (
            name,
            b.model,
            three_digits(float(np.median(b.times_ms))),
            three_digits(float(np.median(b.ratios))),
            str(len(b.ratios)),
        )
        for name, b in both
    )
    head = ("baseline", "model", "median ms", "median over reference load", "rounds")
    plots = ((spread, "Each dot is a round. Further left is faster."), (plot, "Lower is faster."))
    return render(
        path,
        "B over A",
        verdict=_comparison_verdict(comparison),
        sections=[Section("Rounds", comparison.notes, head=head, rows=rows, plots=plots)],
        environment=after.environment,
        data=comparison.to_dict(),
    )


def _comparison_verdict(comparison: BaselineComparison) -> Verdict:
    verdict, spread = comparison.verdict, comparison.verdict.spread
    state = _STATES[verdict.decision]
    interval = f"The ratio of B to A is {ratio_text(spread.ratio)} ({spread.text(beside=verdict.budget)})"
    limit = f"at most {verdict.budget_text} passes"
    steps: tuple[str, ...] = ()
    if state is State.CANNOT_TELL:
        steps = (
            f"Measure both with {verdict.rounds_text} (`ibnorm-export bench --rounds`), on a machine that does nothing "
            "else.",
        )
    elif state is State.FAIL:
        steps = (
            "See where the time goes: `ibnorm-export bench` with `--against` the earlier file measures both at once.",
        )
    return Verdict(state, f"{interval}; {limit}.", next_steps=steps)
