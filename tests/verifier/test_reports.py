"""Reports: when they are true, what they print, and how a check judges them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import ParityError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate.case import Outcome
from ibnorm_export.gate.parity import parity_cases
from ibnorm_export.verifier.html import sections, write_report
from ibnorm_export.verifier.report import (
    Finding,
    LayerParity,
    LayersReport,
    NumericReport,
    OutputParity,
    ParityReport,
    StaticReport,
)
from ibnorm_export.verifier.verify import VerifyOptions, verify


def test_an_empty_report_is_false() -> None:
    assert not StaticReport(0, 0, ())
    assert not StaticReport(3, 0, ())
    assert not NumericReport("ort-cpu", "fp32", method="", samples=0, outputs=(), findings=())
    assert not LayersReport((), "")
    assert not ParityReport("m", "c", static=None, numeric=None)
    assert ParityReport("m", "c", static=StaticReport(1, 1, ()), numeric=None)
    with pytest.raises(ParityError):
        ParityReport("m", "c", static=None, numeric=None).raise_if_failed()


@pytest.mark.parametrize(
    "numeric",
    [
        NumericReport("b", "fp32", method="m", samples=0, outputs=(), findings=()),
        NumericReport(
            "b",
            "fp32",
            method="m",
            samples=1,
            outputs=(),
            findings=(Finding("layer", "is wrong", code=FindingCode.FIRST_LAYER),),
        ),
        NumericReport(
            "b",
            "fp32",
            method="m",
            samples=1,
            outputs=(),
            findings=(Finding("runtime", "is wrong", code=FindingCode.FILE_REFUSED),),
        ),
    ],
)
def test_a_check_fails_whenever_the_report_fails(numeric: NumericReport) -> None:
    report = ParityReport("m", "c", static=StaticReport(3, 5, (), ()), numeric=numeric)
    assert not report
    assert any(case.outcome is Outcome.FAIL for case in parity_cases("m", "b", report=report, max_error=None))


def test_a_report_prints_itself(exported_vit: ExportedModel, vit: LoadedModel) -> None:
    report = verify(exported_vit, vit, options=VerifyOptions(samples=1, layers=True))
    lines = str(report).splitlines()
    assert report.passed
    assert lines[-1] == "verdict: pass"
    assert any(line.startswith("logits") and line.endswith("pass") for line in lines)
    assert any(line.startswith("vit.layernorm ") and line.endswith("pass") for line in lines)
    assert "layers: all are within their tolerance" in lines
    assert "static: 5 norms and 40 weights compared, 0 findings" in lines
    assert report._repr_html_().startswith("<pre>")


def test_fast_coverage_is_named_in_the_verdict(exported_vit: ExportedModel, vit: LoadedModel, tmp_path: Path) -> None:
    report = verify(exported_vit, vit, options=VerifyOptions(samples=1, static=False, coverage="fast"))  # type: ignore[arg-type]  # the text of a value
    assert report
    lines = str(report).splitlines()
    assert lines[-1] == "verdict: pass, with fast coverage only"
    assert any(line.startswith("not run: the longest sequence") and line.endswith("fast") for line in lines)
    assert report.to_dict()["numeric"]["coverage"] == "fast"
    cases = parity_cases("m", "b", report=report, max_error=None)
    assert [case.name for case in cases if case.outcome is Outcome.SKIPPED] == ["all inputs"]
    page = write_report(report, tmp_path / "r.html").read_text()
    assert "Pass, with fast coverage only" in page
    assert "Coverage was fast" in page


def test_the_page_shows_what_ran_and_what_did_not(exported_vit: ExportedModel, vit: LoadedModel) -> None:
    report = verify(exported_vit, vit, options=VerifyOptions(samples=1, static=False))
    found = {section.title: section for section in sections(report)}
    assert report.numeric is not None
    rows = found["Inputs of the comparison"].rows
    assert [row[1] for row in rows if row[0] == "ran"] == list(report.numeric.ran)
    assert any(text.startswith("batch ") for text in report.numeric.ran)
    left_out = ("lengths above 4096: too long", "negative positions")
    partly = replace(report, numeric=replace(report.numeric, not_run=left_out))
    found = {section.title: section for section in sections(partly)}
    rows = found["Inputs of the comparison"].rows
    assert [": ".join(filter(None, row[1:])) for row in rows if row[0] == "not run"] == [*left_out]
    exact = replace(report.numeric, not_run=("lengths above 4096: too long",), attribution=None)
    report = replace(report, numeric=replace(report.numeric, exact=exact))
    found = {section.title: section for section in sections(report)}
    assert found["Without rounding"].rows == found["Outputs"].rows


def layer(name: str, error: float) -> LayerParity:
    output = OutputParity(
        name,
        "fused",
        max_abs=error,
        error=error,
        baseline_error=1e-7,
        worst_sample=0,
        worst_sample_error=error,
        worst_sample_tolerance=1.3e-6,
        worst_sample_covers="",
        tolerance=1.3e-6,
        ratio=error / 1e-7,
        cosine=1.0,
        top1_agreement=None,
        elements=4,
        passed=error <= 1.3e-6,
    )
    return LayerParity(name, "norm", node=name, baseline_error=1e-7, variants=(output,))


def test_the_first_failed_layer_decides() -> None:
    good = LayersReport((layer("a", 1e-7),), "")
    bad = LayersReport((layer("a", 1e-7), layer("b", 1e-3), layer("c", 1e-2)), "b is wrong")
    assert good
    assert not bad
    assert bad.first_failed_layer == bad.layers[1]
    assert str(bad).splitlines()[-1] == "layers: b is wrong"


def test_findings_are_printed() -> None:
    finding = Finding("weight w", "1 of 2 values differ", code=FindingCode.WEIGHT_DIFFERS)
    report = ParityReport("m.onnx", "c", static=StaticReport(1, 2, (finding,)), numeric=None, notes=("a note",))
    assert str(report).splitlines() == [
        "m.onnx against c",
        "static: 1 norm and 2 weights compared, 1 finding",
        "note: a note",
        "FAIL weight w: 1 of 2 values differ [IBN121]",
        "verdict: fail",
    ]
