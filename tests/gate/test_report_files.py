"""The report files: what JUnit shows, what is escaped, and what is left out without matplotlib."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ibnorm_export.errors import IBNormError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.report_files import check_report_files, write_report_files


def report_of(*cases: Case, config: str = "check.toml") -> CheckReport:
    return CheckReport(config, cases, parity={}, environment={"processor": "x"}, seconds=0.0)


def test_a_report_without_cases_is_false() -> None:
    assert not report_of().passed


def test_the_text_leaves_out_layers_that_pass() -> None:
    report = report_of(
        Case("m", "export", outcome=Outcome.PASS, message="3 MB"),
        Case("m.ort-cpu.layers", "norm a", outcome=Outcome.PASS),
        Case("m.ort-cpu.layers", "norm b", outcome=Outcome.FAIL, message="error 1", code=FindingCode.FIRST_LAYER),
    )
    assert str(report).splitlines() == [
        "check.toml: 2 pass, 1 fail, 0 s",
        "pass         m  export: 3 MB",
        "FAIL         m.ort-cpu.layers  norm b: error 1 [IBN212]",
        "verdict: fail",
    ]


def test_cannot_tell_is_skipped_in_junit_with_the_reason(tmp_path: Path) -> None:
    case = Case("m.latency", "at most 1 ms", outcome=Outcome.CANNOT_TELL, message="about 90 rounds would decide")
    write_report_files(report_of(case), tmp_path)
    skipped = ET.parse(tmp_path / "junit.xml").find(".//skipped")
    assert skipped is not None
    assert skipped.get("message") == "cannot tell: about 90 rounds would decide"


@pytest.mark.parametrize("mark", ["\x00", "\x1b", "\ud800", "\uffff"])
def test_characters_that_xml_does_not_allow_are_escaped(tmp_path: Path, mark: str) -> None:
    case = Case(f"m{mark}", f"node {mark}", outcome=Outcome.ERROR, message=f"é 😀 {mark}")
    write_report_files(report_of(case, config=f"c{mark}"), tmp_path)
    error = ET.parse(tmp_path / "junit.xml").find(".//error")
    assert error is not None
    assert error.text == f"é 😀 {ascii(mark)[1:-1]}"


def test_the_files_are_listed(tmp_path: Path) -> None:
    report = write_report_files(report_of(Case("m", "export", outcome=Outcome.PASS)), tmp_path)
    names = ("junit.xml", "report.json", "report.md", "report.html")
    assert report.files == tuple(str(tmp_path / name) for name in names)
    assert all((tmp_path / name).is_file() for name in names)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["written"] == list(report.files)


def test_without_matplotlib_the_page_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = write_report_files(report_of(Case("m", "export", outcome=Outcome.PASS)), tmp_path)
    assert report.passed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["junit.xml", "report.json", "report.md"]
    (note,) = report.notes
    assert note.startswith("report.html is not written: ")
    assert "pip install 'ibnorm-export[plots]'" in note


@pytest.mark.parametrize("name", ["junit.xml", "report.json", "report.md", "report.html"])
def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path, name: str) -> None:
    report = report_of(Case("m", "export", outcome=Outcome.PASS))
    check_report_files(tmp_path)
    write_report_files(report, tmp_path)
    check_report_files(tmp_path)
    write_report_files(report, tmp_path)
    (tmp_path / name).write_text("# Notes of a user\n")
    for write in (lambda: check_report_files(tmp_path), lambda: write_report_files(report, tmp_path)):
        with pytest.raises(IBNormError, match=f"{name} exists and is not a (report|page) of .*: it would be lost"):
            write()
    assert (tmp_path / name).read_text() == "# Notes of a user\n"
