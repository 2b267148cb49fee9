"""One line for each export on each backend, with what the check measured and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.report_files import write_report_files
from ibnorm_export.gate.summary import SummaryRow, parity_key, summary_rows, summary_table
from ibnorm_export.verifier.report import NumericReport, OutputParity, ParityReport

OUTPUT = OutputParity(
    "logits",
    "fused",
    max_abs=1e-5,
    error=2e-6,
    baseline_error=1e-6,
    worst_sample=0,
    worst_sample_error=2e-6,
    worst_sample_tolerance=4e-6,
    worst_sample_covers="",
    tolerance=4e-6,
    ratio=2.0,
    cosine=1.0,
    top1_agreement=None,
    elements=1,
    passed=True,
)


def parity(backend: str) -> ParityReport:
    outputs = (OUTPUT, replace(OUTPUT, name="hidden", error=1e-6))
    numeric = NumericReport(backend, "fp32", method="m", samples=1, outputs=outputs, findings=())
    return ParityReport("f", "c", static=None, numeric=numeric)


def latency(suite: str, **figures: Any) -> Case:
    return Case(suite, "at most", outcome=Outcome.PASS, figures=figures)


EXPORT = Case("a", "export", outcome=Outcome.PASS, figures={"size_bytes": 3_450_000})
COMPARED = {parity_key("a", "ort-cpu"): parity("ort-cpu"), parity_key("a", "reference"): parity("reference")}


def test_a_row_has_error_size_time_and_speed() -> None:
    timed = latency("a.ort-cpu.latency", ms=2.0, tokens_per_s=64000.0, ratio=0.25, against="torch")
    first, second = summary_rows([EXPORT, timed], COMPARED)
    assert (first.export, first.backend, first.excess, first.output) == ("a", "ort-cpu", 0.5, "logits")
    assert (second.backend, second.ms, second.size_bytes) == ("reference", None, 3_450_000)
    heads, (shown, other) = summary_table((first, second))
    assert heads == ("export", "backend", "type", "verdict", "error of tolerance", "MB", "ms", "per second", "speed")
    assert shown[3:] == ("pass", "50.0%", "3.45", "2.00", "64000 tokens", "4.00 times faster than torch")
    assert other[5:] == ("3.45", "", "", "")


@pytest.mark.parametrize("suite", ["a.static", "a.ort-cpu", "a.ort-cpu.latency", "a.ort-cpu.evaluate"])
def test_a_row_fails_with_each_of_its_cases(suite: str) -> None:
    """A limit of the check's own, a budget or an evaluation may fail where the comparison passes."""
    verdicts = {
        outcome: [row.verdict for row in summary_rows([EXPORT, Case(suite, "limit", outcome=outcome)], COMPARED)]
        for outcome in Outcome
    }
    for outcome in (Outcome.FAIL, Outcome.ERROR):
        assert verdicts[outcome] == ["fail", "fail" if suite == "a.static" else "pass"]
    for outcome in (Outcome.PASS, Outcome.SKIPPED, Outcome.CANNOT_TELL):
        assert verdicts[outcome] == ["pass", "pass"]


def test_what_no_row_has_gets_no_column() -> None:
    heads, _ = summary_table(summary_rows([], COMPARED))
    assert heads == ("export", "backend", "type", "verdict", "error of tolerance")
    assert summary_table(()) == ((), [])


@pytest.mark.parametrize(("ratio", "text"), [(2.0, "2.00 times slower than torch"), (None, "")])
def test_a_budget_in_ms_has_no_speed(ratio: float | None, text: str) -> None:
    row = SummaryRow("a", "b", dtype="fp32", verdict="pass", excess=0.5, ms=1.0, ratio=ratio, against="torch")
    heads, (cells,) = summary_table((row,))
    assert dict(zip(heads, cells, strict=True)).get("speed", "") == text


def test_the_files_of_a_check_have_it(tmp_path: Path) -> None:
    report = CheckReport("c", (EXPORT,), parity=COMPARED, environment={}, seconds=1.0)
    assert "3.45" in str(report)
    write_report_files(report, tmp_path)
    assert "| a | ort-cpu | fp32 | pass | 50.0% | 3.45 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "error of tolerance" in (tmp_path / "report.html").read_text(encoding="utf-8")
