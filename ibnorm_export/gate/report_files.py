"""The files of a report: JUnit XML, JSON, GitHub's Markdown, and one self-contained HTML page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Final

from ibnorm_export.errors import BackendUnavailable, IBNormError, printable
from ibnorm_export.files import Kind, check_target, new_file
from ibnorm_export.gate.case import Case, Outcome
from ibnorm_export.gate.html import write_page
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.summary import summary_table
from ibnorm_export.html_page import PAGE
from ibnorm_export.json_text import json_text

__all__ = ["check_report_files", "write_report_files"]

_COLUMNS: Final = ("where", "what", "outcome", "message")

#: JUnit's element for each outcome that is not a pass.
_JUNIT_TAGS: Final = {
    Outcome.FAIL: "failure",
    Outcome.ERROR: "error",
    Outcome.SKIPPED: "skipped",
    Outcome.CANNOT_TELL: "skipped",
}

#: Characters that XML 1.0 does not allow, which a node's name or an exception may contain.
_NOT_IN_XML: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


#: What each file is recognised by, so that no other file is replaced.
_KINDS: Final = {
    "junit.xml": Kind.marked("a report of `ibnorm-export check`", b'<testsuites name="ibnorm-export check"'),
    "report.json": Kind.marked("a report of `ibnorm-export check`", b'"verdict": "'),
    "report.md": Kind.marked("a report of `ibnorm-export check`", b"## IBNorm export: "),
    "report.html": PAGE,
}


def check_report_files(folder: Path) -> None:
    """Check before long work that the report files may be written.

    Raises:
        IBNormError: a file of another kind is in the place of one.
    """
    for name, kind in _KINDS.items():
        check_target(folder / name, kind, error=IBNormError)


def write_report_files(report: CheckReport, folder: Path) -> CheckReport:
    """Write report.html, junit.xml, report.json and report.md into `folder`.

    Without matplotlib the page is left out, and a note of the report gives the reason.

    Returns:
        The report, which now lists the files.

    Raises:
        IBNormError: a file cannot be written.
    """
    report = _printable(report)
    names, notes = ["junit.xml", "report.json", "report.md"], list(report.notes)
    try:
        write_page(report, folder / "report.html")
        names.append("report.html")
    except BackendUnavailable as error:
        notes.append(f"report.html is not written: {error}")
    report = replace(report, files=tuple(str(folder / name) for name in names), notes=tuple(notes))
    texts = {
        "junit.xml": _junit(report),
        "report.json": (json_text(report.to_dict(), indent=1) + "\n").encode(),
        "report.md": _markdown(report).encode(),
    }
    for name, content in texts.items():
        with new_file(folder / name, IBNormError, kind=_KINDS[name]) as partial:
            (partial / name).write_bytes(content)
    return report


def _escape(text: str) -> str:
    return _NOT_IN_XML.sub(lambda found: ascii(found.group())[1:-1], printable(text))


def _printable(report: CheckReport) -> CheckReport:
    """The report with characters escaped that XML does not allow."""
    cases = tuple(
        replace(case, suite=_escape(case.suite), name=_escape(case.name), message=_escape(case.message))
        for case in report.cases
    )
    return replace(report, config=_escape(report.config), cases=cases)


def _junit(report: CheckReport) -> bytes:
    suites: dict[str, list[Case]] = {}
    for case in report.cases:
        suites.setdefault(case.suite, []).append(case)
    root = ET.Element("testsuites", name="ibnorm-export check", time=f"{report.seconds:.3f}")
    for name, cases in suites.items():
        tags = [_JUNIT_TAGS.get(case.outcome, "") for case in cases]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=name,
            tests=str(len(cases)),
            failures=str(tags.count("failure")),
            errors=str(tags.count("error")),
            skipped=str(tags.count("skipped")),
            time=f"{sum(case.seconds for case in cases):.3f}",
        )
        for case, tag in zip(cases, tags, strict=True):
            element = ET.SubElement(suite, "testcase", classname=name, name=case.name, time=f"{case.seconds:.3f}")
            if tag:
                cannot_tell = case.outcome is Outcome.CANNOT_TELL
                message = f"cannot tell: {case.message}" if cannot_tell else case.message
                about = {"message": message} if case.code is None else {"message": message, "type": case.code.value}
                ET.SubElement(element, tag, about).text = message if tag != "skipped" else None
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))


def _markdown(report: CheckReport) -> str:
    def row(*cells: str) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    verdict = "✅ pass" if report else "❌ fail"
    summary = row(f"{report.counts}; {report.seconds:.0f} s", report.config).strip("| ").replace(" | ", ", ")
    lines = [f"## IBNorm export: {verdict}", "", summary, ""]
    if report.red:
        lines += [row("where", "what", "message", "code"), "|---|---|---|---|"]
        lines += [row(c.suite, c.name, c.message, c.code or "") for c in report.red]
        lines.append("")
    heads, summary_cells = summary_table(report.summary)
    if summary_cells:
        lines += [row(*heads), "|---" * len(heads) + "|", *(row(*cells) for cells in summary_cells), ""]
    lines += ["<details><summary>All cases</summary>", "", row(*_COLUMNS), "|---|---|---|---|"]
    lines += [row(c.suite, c.name, c.outcome.value, c.message) for c in report.cases]
    return "\n".join([*lines, "", "</details>", ""])
