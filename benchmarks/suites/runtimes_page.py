"""Write the tables of docs/compatibility.md from the records: python -m benchmarks.suites.runtimes_page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites.runtimes_cases import FORMS, MODELS
from ibnorm_export.runtimes.runner import Backend

__all__ = ["between_marks", "table"]

#: What the table calls a runtime.
TITLES = {
    "onnxruntime": "ONNX Runtime",
    Backend.ORT_CPU: "ONNX Runtime",
    Backend.REFERENCE: "onnx.reference",
    Backend.ORT_NODE: "onnxruntime-node",
    Backend.ORT_WEB: "onnxruntime-web (WASM)",
    Backend.OPENVINO: "OpenVINO (--backend openvino)",
    "openvino": "OpenVINO, precision f32",
    "openvino-default": "OpenVINO, its own defaults",
    "iree": "IREE",
}

ROOT = Path(__file__).resolve().parents[2]

_BEGIN, _END = "<!-- {name}: written by a command -->", "<!-- end of {name} -->"


def between_marks(text: str, content: str, *, name: str) -> str:
    """The text of a page with other content between the marks of a table."""
    begin, end = _BEGIN.format(name=name), _END.format(name=name)
    before, found, rest = text.partition(f"{begin}\n")
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no lines {begin!r} and {end!r}")
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def _result(row: Mapping[str, Any], notes: list[str]) -> str:
    details = row["details"]
    if "refuses" in details:
        reason = f"{details['refuses']}".replace("|", "\\|")
        if reason not in notes:
            notes.append(reason)
        return f"refuses [{notes.index(reason) + 1}]"
    error = details["error"]
    if isinstance(error, str):
        return "**wrong: NaN**"
    return f"{error:.0e}" if error <= details["limit"] else f"**wrong: {error:.0e}**"


def _cell(rows: Mapping[str, Mapping[str, Any]], notes: list[str]) -> str:
    """The results of all models: one figure where all are right, else each model's own."""
    if not rows:
        return "not run"
    results = {model: _result(row, notes) for model, row in rows.items()}
    right = all("refuses" not in result and "wrong" not in result for result in results.values())
    if right:
        worst = max(float(row["details"]["error"]) for row in rows.values())
        return f"{worst:.0e}"
    if len(set(results.values())) == 1:
        return next(iter(results.values()))
    return "; ".join(f"{model} {result}" for model, result in results.items())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each runtime and version, a column for each form, and the reasons of refusals below."""
    places = {runtime: index for index, runtime in enumerate(TITLES)}
    named = {row["details"]["form"] for row in rows}
    runtimes = sorted(
        {(row["details"]["runtime"], row["details"]["version"]) for row in rows},
        key=lambda key: (places.get(key[0], len(places)), [int(p) if p.isdigit() else 0 for p in key[1].split(".")]),
    )
    notes: list[str] = []
    parts = []
    for title, expanded in (("with functions", False), ("with the norms expanded", True)):
        forms = [form.name for form in FORMS.values() if form.expanded is expanded and form.name in named]
        if forms:
            parts.append(_part(rows, forms, title=title, runtimes=runtimes, notes=notes))
    reasons = "\n".join(f"{index}. {reason}" for index, reason in enumerate(notes, 1))
    return "\n\n".join([*parts, *([f"Reasons of refusals:\n\n{reasons}"] if reasons else [])])


def _part(
    rows: Sequence[Mapping[str, Any]],
    forms: Sequence[str],
    *,
    title: str,
    runtimes: Sequence[tuple[str, str]],
    notes: list[str],
) -> str:
    lines = [f"| files {title} | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|"]
    for runtime, version in runtimes:
        cells = []
        for form in forms:
            found = {
                row["details"]["model"]: row
                for row in rows
                if (row["details"]["runtime"], row["details"]["version"], row["details"]["form"])
                == (runtime, version, form)
            }
            cells.append(_cell({model: found[model] for model in MODELS if model in found}, notes))
        lines.append(f"| {TITLES.get(runtime, runtime)} {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Replace the table in docs/compatibility.md by that of benchmarks/results/runtimes.json."""
    page = ROOT / "docs" / "compatibility.md"
    rows = json.loads((ROOT / "benchmarks" / "results" / "runtimes.json").read_text(encoding="utf-8"))["rows"]
    text = page.read_text(encoding="utf-8")
    page.write_text(between_marks(text, table(rows), name="runtimes"), encoding="utf-8")


if __name__ == "__main__":
    main()
