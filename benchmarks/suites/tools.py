"""What tools do to an exported file: keeps, loses or breaks it, and the remedy.

Tools are run on LLaMA, GPT-2 and ViT (tiny, random weights, opset 20), with functions and expanded, each tool in its
own process. Packages: onnxsim, onnxslim, onnxoptimizer, polygraphy, onnx-graphsurgeon and onnxconverter-common;
a tool that is not installed is left as it was recorded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from benchmarks.suites.tools_worker import TOOLS
from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.axes import BATCH, SEQUENCE
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.runtimes.ort import OrtRunner

__all__ = ["add_options", "measure", "table"]

WORKER = Path(__file__).with_name("tools_worker.py")

#: Tiny models by name.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 256, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "vit": {
        "model_type": "vit",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "num_labels": 10,
    },
}

#: Package of each tool that does not come with this one.
PACKAGES = {
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
    "onnxoptimizer": "onnxoptimizer",
    "polygraphy fold_constants": "polygraphy",
    "onnxconverter_common float16": "onnxconverter-common",
}

#: The largest error, relative to the largest output, of tools that change the type of weights; else it is `_EXACT`.
#: Eight bits leave steps of 1/127 of the largest weight of a matrix, half precision ones of 2^-11.
_LIMITS = {"onnxruntime quantize_dynamic": 0.2, "onnxconverter_common float16": 2e-2, "onnxruntime float16": 2e-2}
_EXACT = 2e-6

#: What to do about a tool that does not keep the file.
REMEDIES = {
    "onnx.version_converter": "export at the opset (--opset)",
    "onnxscript.optimizer": "optimize(model, inline=False), or none: an export is optimised already",
    "polygraphy fold_constants": "none needed: an export has no constants to fold",
    "onnxruntime quantize_dynamic": "--dtype int8 for language models",
    "onnxconverter_common float16": "export with --dtype fp16",
    "onnxruntime float16": "export with --dtype fp16",
    "onnx.inliner": "export with --inline",
    "onnxruntime offline optimisation": "leave it to the session: it optimises when it loads",
    "onnxruntime transformers optimizer": "leave it to the session: it optimises when it loads",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS), help="Tools to run.")


def _sources(folder: Path) -> Iterator[ExportedModel]:
    """Every model, with functions and expanded."""
    for name, config in MODELS.items():
        checkpoint = folder / name
        models.save(models.new_model(config, IBNormSpec("T" if name == "vit" else "L", 4.0, epsilon=1e-5)), checkpoint)
        for inline in (False, True):
            file = folder / f"{name}-{'inlined' if inline else 'functions'}.onnx"
            yield export(models.load(checkpoint), file, options=ExportOptions(opset=20, inline=inline))


def _run_tool(tool: str, pairs: Sequence[tuple[Path, Path]]) -> list[str]:
    """What the tool raised on each pair of files; empty where it raised nothing."""
    words = [str(path) for pair in pairs for path in pair]
    done = subprocess.run([sys.executable, str(WORKER), tool, *words], capture_output=True, text=True, check=False)
    found = [json.loads(line[7:])["error"] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [*found, *["ends the process"] * (len(pairs) - len(found))]


def _error(actual: Arrays, expected: Arrays) -> float:
    """The largest difference, relative to the largest output; infinite where a value is not finite."""
    (name,), values = expected, list(actual.values())
    if len(values) != 1 or values[0].shape != expected[name].shape or not np.isfinite(values[0]).all():
        return float("inf")
    scale = float(np.abs(expected[name]).max())
    return float(np.abs(values[0].astype(np.float64) - expected[name]).max()) / scale


def _outcome(source: ExportedModel, target: Path, problem: str, *, limit: float) -> dict[str, Any]:
    """What became of a file: keeps, loses (its functions) or breaks, with the reason."""
    if problem:
        return {"outcome": "breaks", "why": f"the tool fails: {problem}"}
    inputs = draw_inputs(source, {BATCH: 2, SEQUENCE: 5})
    expected = OrtRunner(source.path, threads=1).run(inputs)
    try:
        error = _error(OrtRunner(target, threads=1).run(inputs), expected)
    except ModelFileError as refused:
        return {"outcome": "breaks", "why": f"ONNX Runtime refuses the result: {refused}".replace(str(target), "it")}
    if not error <= limit:
        return {"outcome": "breaks", "why": f"other numbers: {error:.0e}", "error": error}
    kept = len(onnx.load(target, load_external_data=False).functions) == len(source.proto.functions)
    why = "" if kept else "functions are expanded, so that fused kernels cannot run"
    return {"outcome": "keeps" if kept else "loses", "why": why, "error": error}


def _version(tool: str) -> str:
    package = PACKAGES.get(tool, tool.split()[0].split(".")[0])
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def measure(options: argparse.Namespace, report: Report) -> None:
    """Run every tool that is installed on every file."""
    measured: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = list(_sources(folder))
        for tool in options.tools:
            version = _version(tool)
            if not version:
                continue
            pairs = [(s.path, folder / f"{tool.replace(' ', '_')}-{s.path.name}") for s in sources]
            limit = _LIMITS.get(tool, _EXACT)
            for source, (_, target), problem in zip(sources, pairs, _run_tool(tool, pairs), strict=True):
                found = _outcome(source, target, problem, limit=limit)
                report.add(_row(tool, version, source.path.stem, found=found))
                measured.add(f"{tool}, {source.path.stem}")
    report.recorded = [row for row in report.recorded_rows() if row["name"] not in measured]


def _row(tool: str, version: str, file: str, *, found: Mapping[str, Any]) -> Row:
    model, _, form = file.partition("-")
    details = {**found, "tool": tool, "version": version, "model": model, "form": form}
    remedy = "" if found["outcome"] == "keeps" else REMEDIES.get(tool, "")
    error = found.get("error")
    finite = error is not None and np.isfinite(error)
    figures = {"broken": Figure(float(found["outcome"] == "breaks"))} | ({"error": Figure(error)} if finite else {})
    targets = () if remedy else (Target("broken", 0.0),)
    details["error"] = str(error) if error is not None and not finite else error
    note = "; ".join(filter(None, (found["outcome"], found["why"])))
    return Row(f"{tool}, {file}", figures, targets=targets, details={**details, "remedy": remedy}, note=note)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a record as a table in Markdown: one line for each tool.

    Args:
        rows: `rows` of tools.json.
    """
    lines = ["| tool | with functions | expanded | remedy |", "|---|---|---|---|"]
    tools = dict.fromkeys((row["details"]["tool"], row["details"]["version"]) for row in rows)
    for tool, version in tools:
        own = [row["details"] for row in rows if row["details"]["tool"] == tool]
        cells = [_cell([d for d in own if d["form"] == form]) for form in ("functions", "inlined")]
        remedy = next((d["remedy"] for d in own if d["remedy"]), "")
        lines.append(f"| {tool} {version} | {cells[0]} | {cells[1]} | {remedy} |")
    return "\n".join(lines)


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    """The outcome of all models: the first one's where they agree, else each model's own."""
    texts = {d["model"]: _text(d) for d in found}
    if len({d["outcome"] for d in found}) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{model} {text}" for model, text in texts.items())


def _text(details: Mapping[str, Any]) -> str:
    if details["outcome"] == "breaks":
        reason = str(details["why"]).rpartition("failed:")[2].removeprefix("Fatal error: ")
        return f"**breaks**: {reason}".replace("|", "\\|")
    return "keeps" if details["outcome"] == "keeps" else "loses the functions"
