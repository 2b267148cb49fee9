"""What a gate found, case by case: JUnit XML, JSON, GitHub's Markdown and one self-contained page."""

from __future__ import annotations

import enum
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import IBNormError
from ibnorm_export.files import new_file
from ibnorm_export.html_page import Section, render
from ibnorm_export.json_text import json_text
from ibnorm_export.verifier.html import sections
from ibnorm_export.verifier.report import LayerParity, ParityReport

__all__ = ["Case", "CheckReport", "Outcome", "parity_cases", "write_all"]


class Outcome(enum.StrEnum):
    """Of one case. `FAIL` and `ERROR` make the whole red."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"  # it could not be tried
    SKIPPED = "skipped"  # something before it failed
    CANNOT_TELL = "cannot tell"  # too few rounds for their spread


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that was asked: where ("NAME" or "NAME.BACKEND.layers"), what, and what came of it."""

    suite: str
    name: str
    _: KW_ONLY
    outcome: Outcome
    says: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All cases, in the order they were tried; true when there are some and none is red."""

    config: str
    cases: tuple[Case, ...]
    _: KW_ONLY
    parity: Mapping[str, ParityReport]
    environment: Mapping[str, Any]
    seconds: float

    def __bool__(self) -> bool:
        return bool(self.cases) and not self.red

    @property
    def red(self) -> tuple[Case, ...]:
        """The cases that failed or could not be tried."""
        return tuple(case for case in self.cases if case.outcome in (Outcome.FAIL, Outcome.ERROR))

    @property
    def counts(self) -> str:
        """E.g. "12 pass, 1 fail"."""
        counted = Counter(case.outcome for case in self.cases)
        return ", ".join(f"{counted[outcome]} {outcome.value}" for outcome in Outcome if counted[outcome])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": "pass" if self else "fail",
            "config": self.config,
            "seconds": self.seconds,
            "cases": [
                {
                    "suite": c.suite,
                    "name": c.name,
                    "outcome": c.outcome.value,
                    "says": c.says,
                    "seconds": c.seconds,
                    "figures": dict(c.figures),
                }
                for c in self.cases
            ],
            "parity": {name: report.to_dict() for name, report in self.parity.items()},
            "environment": dict(self.environment),
        }


def _layer_cases(suite: str, layers: Iterable[LayerParity], *, first: str, failed: bool) -> Iterable[Case]:
    """One a norm and block; the first that leaves its bound fails where the outputs do, those behind it are skipped."""
    guilty = ""
    for layer in layers:
        name = f"{layer.kind} {layer.module}"
        figures = {corner.norms: corner.error for corner in layer.corners} | {"torch": layer.torch_error}
        if guilty:
            yield Case(suite, name, outcome=Outcome.SKIPPED, says=f"behind {guilty}, which failed", figures=figures)
        elif failed and not layer.passed:
            guilty = name
            yield Case(suite, name, outcome=Outcome.FAIL, says=first, figures=figures)
        else:
            yield Case(suite, name, outcome=Outcome.PASS, figures=figures)


def parity_cases(
    name: str, backend: str, *, report: ParityReport, max_error: float | None, seconds: float
) -> list[Case]:
    """The cases of one comparison.

    Args:
        name: of the export.
        backend: that ran it.
        report: of `verify`.
        max_error: limit on every output's error, or None.
        seconds: that the comparison took.
    """
    suite, cases = f"{name}.{backend}", []
    if report.static is not None:
        listed = [Case(f"{name}.static", f.where, outcome=Outcome.FAIL, says=f.what) for f in report.static.findings]
        compared = f"{report.static.norms} norms and {report.static.weights} weights compared"
        cases += listed or [Case(f"{name}.static", "norms, functions and weights", outcome=Outcome.PASS, says=compared)]
    numeric = report.numeric
    if numeric is None:
        return cases
    for output in numeric.outputs:
        above = max_error is not None and not output.error <= max_error
        says = f"relative error {output.error:.3g}, allowed {output.allowed:.3g}"
        if above:
            says += f", max_error {max_error:.3g}"
        passed = output.passed and not above
        figures = {"error": output.error, "torch": output.torch_error, "allowed": output.allowed}
        which = f"output {output.name}, norms {output.norms}"
        cases.append(Case(suite, which, outcome=Outcome.PASS if passed else Outcome.FAIL, says=says, figures=figures))
    told = {"layer"} | {f"output {output.name}" for output in numeric.outputs if not output.passed}
    cases += [Case(suite, f.where, outcome=Outcome.FAIL, says=f.what) for f in numeric.findings if f.where not in told]
    red = any(case.suite == suite and case.outcome is Outcome.FAIL for case in cases)
    if not red and not numeric:
        words = "nothing was compared" if not numeric.outputs else "; ".join(f.what for f in numeric.findings)
        cases.append(Case(suite, "outputs", outcome=Outcome.FAIL, says=words))
    if numeric.layers is not None:
        cases += _layer_cases(f"{suite}.layers", numeric.layers.layers, first=numeric.layers.first, failed=not numeric)
    return [replace(cases[0], seconds=seconds), *cases[1:]]


#: What XML 1.0 cannot hold, control characters and lone surrogates: a node's name or an exception may.
_UNWRITABLE: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _plain(text: str) -> str:
    return _UNWRITABLE.sub(lambda found: ascii(found.group())[1:-1], text)


def _junit(report: CheckReport) -> bytes:
    suites: dict[str, list[Case]] = {}
    for case in report.cases:
        suites.setdefault(case.suite, []).append(case)
    root = ET.Element("testsuites", name="ibnorm-export check", time=f"{report.seconds:.3f}")
    tags = {Outcome.FAIL: "failure", Outcome.ERROR: "error", Outcome.SKIPPED: "skipped", Outcome.CANNOT_TELL: "skipped"}
    for name, cases in suites.items():
        found = [tags.get(case.outcome, "") for case in cases]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=name,
            tests=str(len(cases)),
            failures=str(found.count("failure")),
            errors=str(found.count("error")),
            skipped=str(found.count("skipped")),
            time=f"{sum(case.seconds for case in cases):.3f}",
        )
        for case, tag in zip(cases, found, strict=True):
            made = ET.SubElement(suite, "testcase", classname=name, name=case.name, time=f"{case.seconds:.3f}")
            if tag:
                says = case.says if case.outcome is not Outcome.CANNOT_TELL else f"cannot tell: {case.says}"
                ET.SubElement(made, tag, message=says).text = says if tag != "skipped" else None
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))


def _markdown(report: CheckReport) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

    verdict = "✅ pass" if report else "❌ fail"
    lines = [f"## IBNorm export: {verdict}", "", f"{report.counts}; {report.seconds:.0f} s, {cell(report.config)}", ""]
    if report.red:
        lines += ["| where | what | says |", "|---|---|---|"]
        lines += [f"| {cell(c.suite)} | {cell(c.name)} | {cell(c.says)} |" for c in report.red]
        lines.append("")
    lines += ["<details><summary>All cases</summary>", "", "| where | what | outcome | says |", "|---|---|---|---|"]
    lines += [f"| {cell(c.suite)} | {cell(c.name)} | {c.outcome.value} | {cell(c.says)} |" for c in report.cases]
    return "\n".join([*lines, "", "</details>", ""])


def _page(report: CheckReport, path: Path) -> None:
    rows = tuple((c.suite, c.name, c.outcome.value, c.says) for c in report.cases)
    parts = [Section("Cases", (report.counts + ".",), head=("where", "what", "outcome", "says"), rows=rows)]
    for name, parity in report.parity.items():
        parts += [replace(section, title=f"{name}: {section.title}") for section in sections(parity)]
    summary = f"{report.counts}; {report.config}"
    render(
        path,
        "IBNorm export check",
        passed=bool(report),
        summary=summary,
        sections=parts,
        environment=report.environment,
    )


def write_all(report: CheckReport, folder: Path) -> tuple[Path, ...]:
    """Write junit.xml, report.json, report.md and report.html into `folder`.

    Raises:
        IBNormError: a file cannot be written.
    """
    cases = tuple(replace(c, suite=_plain(c.suite), name=_plain(c.name), says=_plain(c.says)) for c in report.cases)
    report = replace(report, config=_plain(report.config), cases=cases)
    texts = {
        "junit.xml": _junit(report),
        "report.json": (json_text(report.to_dict(), indent=1) + "\n").encode(),
        "report.md": _markdown(report).encode(),
    }
    for name, content in texts.items():
        with new_file(folder / name, IBNormError) as beside:
            (beside / name).write_bytes(content)
    _page(report, folder / "report.html")
    return tuple(folder / name for name in (*texts, "report.html"))
