"""Write the tables of docs/compatibility.md from the records: python -m benchmarks.suites.runtimes_page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites import tools
from benchmarks.suites.runtimes_cases import FORMS, HALF_LIMIT, MODELS, OVER_PYTORCH, VARIANTS
from benchmarks.suites.runtimes_webgpu import RUNTIME as WEBGPU
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.runtimes.runner import Backend

__all__ = ["between_marks", "table"]

#: What the table calls a runtime.
TITLES = {
    "onnxruntime": "ONNX Runtime",
    Backend.ORT_CPU: "ONNX Runtime",
    Backend.REFERENCE: "onnx.reference",
    Backend.ORT_NODE: "onnxruntime-node",
    Backend.ORT_WEB: "onnxruntime-web (WASM)",
    WEBGPU: "onnxruntime-web (WebGPU, emulated)",
    Backend.OPENVINO: "OpenVINO (--backend openvino)",
    "openvino": "OpenVINO, precision f32",
    "openvino-default": "OpenVINO, its own defaults",
    "litert": "LiteRT (onnx2tf)",
    "iree": "IREE",
    "tvm": "TVM",
    "mnn": "MNN",
    "tract": "tract",
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


_NOT_RUN = "not run"


def _result(row: Mapping[str, Any], notes: list[str]) -> str:
    details = row["details"]
    if "refuses" in details:
        # The line names the --for, and docs/how-to/export-for-a-runtime.md its reasons.
        reason = re.sub(r" \(--for .*\)$", "", details["refuses"]).replace("|", "\\|")
        if reason not in notes:
            notes.append(reason)
        return f"refuses [{notes.index(reason) + 1}]"
    error = details["error"]
    if isinstance(error, str):
        return "**wrong: NaN**"
    return f"{error:.0e}" if error <= details["limit"] else f"**wrong: {error:.0e}**"


def _cell(rows: Mapping[str, Mapping[str, Any]], notes: list[str]) -> str:
    """The results of all models: the largest error where all are right, else each model's own.

    Beside an error in float16 above the limit is the one of PyTorch, twice of which is right too.
    """
    if not rows:
        return _NOT_RUN
    results = {model: _result(row, notes) for model, row in rows.items()}
    right = all("refuses" not in result and "wrong" not in result for result in results.values())
    if right:
        worst = max(rows.values(), key=lambda row: float(row["details"]["error"]))["details"]
        if FORMS[worst["form"]].options.get("dtype") == DType.FP16 and worst["error"] > HALF_LIMIT:
            return f"{worst['error']:.1e} (PyTorch {worst['limit'] / OVER_PYTORCH:.1e})"
        return f"{worst['error']:.0e}"
    if len(set(results.values())) == 1:
        return next(iter(results.values()))
    return "; ".join(f"{model} {result}" for model, result in results.items())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each runtime and version, a column for each form, and the reasons of refusals below.

    A runtime that ran one form only, besides those that are made for it, is in a table with a column for each model.
    """
    places = {title: index for index, title in enumerate(TITLES.values())}  # "onnxruntime" and "ort-cpu" share one
    named = {row["details"]["form"] for row in rows}
    runtimes = sorted(
        {(row["details"]["runtime"], row["details"]["version"]) for row in rows},
        key=lambda key: (
            places.get(TITLES.get(key[0], ""), len(places)),
            [int(p) if p.isdigit() else 0 for p in key[1].split(".")],
        ),
    )
    ran = {
        runtime: {
            row["details"]["form"]
            for row in rows
            if (row["details"]["runtime"], row["details"]["version"]) == runtime
            and not FORMS[row["details"]["form"]].runtimes
        }
        for runtime in runtimes
    }
    most = max(map(len, ran.values()))
    once = {runtime: next(iter(forms)) for runtime, forms in ran.items() if len(forms) == 1 < most}
    notes: list[str] = []
    parts = []
    for title, expanded in (("with functions", False), ("with the norms expanded", True)):
        forms = [
            form.name
            for form in FORMS.values()
            if form.expanded is expanded and not form.runtimes and form.name in named
        ]
        if forms:
            columns = {form: form for form in forms}
            several = [runtime for runtime in runtimes if runtime not in once]
            parts.append(_part(rows, columns, title=f"files {title}", runtimes=several, notes=notes))
    if once:
        parts.append(_by_model(rows, once, notes=notes))
    parts += _made_for(rows, runtimes=runtimes, notes=notes)
    reasons = "\n".join(f"{index}. {reason}" for index, reason in enumerate(notes, 1))
    return "\n\n".join([*parts, *([f"Reasons of refusals:\n\n{reasons}"] if reasons else [])])


def _by_model(rows: Sequence[Mapping[str, Any]], once: Mapping[tuple[str, str], str], *, notes: list[str]) -> str:
    """A table with a column for each model, and a line for each runtime that ran one form."""
    lines = [f"| one form only | form | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 2) + "|"]
    for (runtime, version), form in once.items():
        cells = [_cell(_found(rows, runtime, version, form=form, models=[model]), notes) for model in MODELS]
        cells = [cell.removeprefix(f"{model} ") for model, cell in zip(MODELS, cells, strict=True)]
        lines.append(f"| {TITLES.get(runtime, runtime)} {version} | {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _found(
    rows: Sequence[Mapping[str, Any]], runtime: str, version: str, *, form: str, models: Sequence[str] = tuple(MODELS)
) -> dict[str, Mapping[str, Any]]:
    """The row of each model that a runtime ran in a form."""
    wanted = (runtime, version, form)
    rows = [row for row in rows if tuple(row["details"][key] for key in ("runtime", "version", "form")) == wanted]
    found = {row["details"]["model"]: row for row in rows}
    return {model: found[model] for model in models if model in found}


def _made_for(rows: Sequence[Mapping[str, Any]], *, runtimes: Sequence[tuple[str, str]], notes: list[str]) -> list[str]:
    """The part about files of `--for`, if some were run: a line for each, in the runtimes that it is for."""
    named = {row["details"]["form"] for row in rows}
    targets = dict.fromkeys(form.options["runtime"] for form in FORMS.values() if form.runtimes and form.name in named)
    lines: list[str] = []
    for target in targets:
        columns = {f"for {target}, {variant}": variant for variant in VARIANTS}
        part = _part(rows, columns, title="files of", runtimes=runtimes, notes=notes, prefix=f"`--for {target}`: ")
        lines += part.splitlines()[2 if lines else 0 :]
    return ["\n".join(lines)] if lines else []


def _part(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    title: str,
    runtimes: Sequence[tuple[str, str]],
    notes: list[str],
    prefix: str = "",
) -> str:
    """A table with a column for each form, and a line for each runtime that ran one of them."""
    lines = [f"| {title} | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for runtime, version in runtimes:
        cells = [_cell(_found(rows, runtime, version, form=form), notes) for form in columns]
        if set(cells) != {_NOT_RUN}:
            lines.append(f"| {prefix}{TITLES.get(runtime, runtime)} {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Replace the tables in docs/compatibility.md by those of runtimes.json and tools.json in benchmarks/results."""
    page = ROOT / "docs" / "compatibility.md"
    text = page.read_text(encoding="utf-8")
    for name, render in (("runtimes", table), ("tools", tools.table)):
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        text = between_marks(text, render(rows), name=name)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
