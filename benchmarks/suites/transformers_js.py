"""Every architecture that `export --target transformers.js` takes, in Node, against a stranger's module.

Texts are the same token by token, classes and entities the same, and logits, features and scores within the target. It
needs Node and what `make test-targets` installs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from tests.support.architectures import CAUSAL, ENCODERS
from tests.support.web_architectures import NAMES, PIPELINES, export_for_web, in_node, job_of, relative_error

MODULES = Path(__file__).resolve().parents[2] / "build" / "node"
#: As for the files of every runtime: roundings of float32 in sums of up to 64 terms, through two layers.
MAX_ERROR = 2e-6


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, help="Architectures (all).")


def _pipeline(name: str) -> str:
    if name in CAUSAL:
        return "text-generation"
    return PIPELINES[name] if name in ENCODERS else "image-classification"


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export and run each architecture in turn; recorded rows of the others are kept."""
    described = MODULES / "node_modules" / "@huggingface" / "transformers" / "package.json"
    if shutil.which("node") is None or not described.is_file():
        raise Unavailable("Node or transformers.js is missing: make test-targets")
    version = json.loads(described.read_text(encoding="utf-8"))["version"]
    recorded = report.recorded_rows()
    for name in options.only:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            module = export_for_web(name, folder)
            (found,) = in_node(MODULES, [job_of(name, folder)], file=folder / "jobs.json")
            error = relative_error(name, module, found)
        details = {"architecture": name, "pipeline": _pipeline(name), "transformers.js": version}
        title = f"{name}, {_pipeline(name)}"
        report.add(Row(title, {"error": Figure(error)}, targets=(Target("error", MAX_ERROR),), details=details))
        now = {row.name for row in report.rows}
        report.recorded = [row for row in recorded if row["name"] not in now]
        report.save()
