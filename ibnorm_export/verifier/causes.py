"""Findings by cause, and what to do about them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from ibnorm_export.text_report import counted
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.report import NumericReport, ParityReport

__all__ = ["Cause", "causes", "next_steps", "reasons"]

#: What differs between two findings of one cause: numbers, and names in dots such as "layers.0.norm".
_PARTICULAR: Final = re.compile(r"\S*\d\S*|\b\w+(\.\w+)+")

#: Places and reasons that a sentence names.
_NAMED: Final = 3
_REASONS: Final = 5

#: What to do about an error, by the step that adds it.
_STEPS: Final = {
    "mapping": "Your own norm computes something else than the IBNorm in its place: compare the formula of your class "
    "with the table “Your own norms”.",
    "dtype": "PyTorch has the same error in this type: export in a wider one, e.g. with `--dtype fp32`.",
    "exporter": "The file computes something else than the checkpoint. If it is from an older version or another tool, "
    "write it again with `ibnorm-export export`; if not, please report it.",
    "optimiser": "ONNX Runtime's optimiser changes the values: use the level that the table below shows as correct, "
    "and report it to ONNX Runtime.",
    "kernel": "The fused kernel is at fault: run with `--kernels function` until it is mended, and please report it.",
}


@dataclass(frozen=True, slots=True)
class Cause:
    """Findings that state the same except for names and numbers."""

    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        first, *others = self.findings
        if not others:
            return str(first)
        listed = ", ".join(finding.where for finding in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        return f"{first}. The same at {counted(len(others), 'other place')}: {listed}{more}."


def causes(findings: Iterable[Finding]) -> tuple[Cause, ...]:
    """Findings grouped by what they state, the most frequent cause first."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.code.value, _PARTICULAR.sub("", f"{finding.where}: {finding.what}"))
        groups.setdefault(key, []).append(finding)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return tuple(Cause(tuple(group)) for group in ordered)


def reasons(report: ParityReport) -> tuple[str, ...]:
    """Why a report is false, the most useful statement first; empty if it is true."""
    return tuple(_reasons(report))[:_REASONS]


def _reasons(report: ParityReport) -> Iterator[str]:
    if report:
        return
    static = () if report.static is None else report.static.findings
    for cause in causes(static):  # a difference in the file explains what it computes
        yield str(cause)
    covered = {"layer"} | {f"error source {name}" for name in _STEPS}
    for numeric in _failed(report):
        if numeric.attribution is not None and numeric.attribution.source:
            covered |= {f"output {output.name}" for output in numeric.outputs}
            yield f"{numeric.attribution.summary}."
        if numeric.layers is not None and numeric.layers.first_failure:
            yield f"{numeric.layers.first_failure}."
    for cause in causes(f for f in report.findings if f.where not in covered and f not in static):
        yield str(cause)


def _failed(report: ParityReport) -> Iterator[NumericReport]:
    if report.numeric is not None and not report.numeric:
        yield report.numeric
        if report.numeric.exact is not None and not report.numeric.exact:
            yield report.numeric.exact


def next_steps(report: ParityReport) -> tuple[str, ...]:
    """What to do about a report that is false; empty if it is true."""
    if report:
        return ()
    steps = []
    numeric = report.numeric
    source = next((n.attribution.source for n in _failed(report) if n.attribution and n.attribution.source), "")
    if source:
        steps.append(_STEPS[source])
    if report.static is not None and report.static.findings:
        steps.append(
            "The file does not hold what the checkpoint holds. Check that both belong together; then write the file "
            f"again: `ibnorm-export export {report.checkpoint} -o {report.model}`."
        )
    if numeric is not None and not numeric and numeric.layers is None:
        command = f"ibnorm-export verify {report.model} {report.checkpoint} --layers"
        steps.append(f"Find the first layer that differs: `{command}`.")
    if report.expected is not None and not report.expected:
        steps.append("The training code computes other values: compare its configuration with the checkpoint's.")
    if report.findings:
        steps.append(
            f"Read what a code means, and what to do about it: `ibnorm-export explain {report.findings[0].code}`."
        )
    return tuple(steps)
