"""Stock architectures with a stranger's norms: export, `verify`, and the file in onnxruntime against their module.

One row for each architecture, compression and task. Rows that the record already holds are kept, so an interrupted run
continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export import models
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.errors import IBNormError
from ibnorm_export.exporter.export import export
from ibnorm_export.op.spec import Compression
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.architectures import ARCHITECTURES, CAUSAL, ENCODERS, save_theirs
from tests.support.file_against_module import (
    TOLERANCE,
    decoding_error,
    encoder_error,
    greedy_tokens,
    image_error,
    logits_error,
)


def measure_one(name: str, kind: str, *, task: Task) -> dict[str, Any]:
    """Export, verify and compare one architecture; the details of its row."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        theirs = save_theirs(name, kind, where / "c")
        model = models.load(where / "c", task=task)
        exported = export(model, where / ("m.onnx" if task is Task.FORWARD else "out"))
        verdict = verify(exported, model, options=VerifyOptions(kernels=Kernels.FUNCTION))
        same_tokens = None
        if task is Task.TEXT_GENERATION:
            error = decoding_error(exported.path, theirs)
            tokens, expected = greedy_tokens(exported.path, theirs)
            same_tokens = tokens == expected
        elif name in CAUSAL:
            error = logits_error(exported.path, theirs)
        else:
            error = (encoder_error if name in ENCODERS else image_error)(exported.path, theirs)
        return {
            "architecture": name,
            "compression": kind,
            "task": task.value,
            "norms": len(exported.norms),
            "error": error,
            "same_tokens": same_tokens,
            "verify": bool(verdict),
            "findings": [str(finding) for finding in verdict.findings],
            "seconds": time.perf_counter() - start,
        }


def row_of(details: dict[str, Any]) -> Row:
    """A row from details that were measured now or recorded earlier."""
    failures = int(not details["verify"]) + int(details["same_tokens"] is False)
    figures = {"error": Figure(details["error"]), "failures": Figure(failures)}
    name = ", ".join(details[key] for key in ("architecture", "compression", "task"))
    return Row(name, figures, targets=(Target("error", TOLERANCE), Target("failures", 0)), details=details)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[*ARCHITECTURES], choices=[*ARCHITECTURES], help="Architectures.")
    parser.add_argument("--kinds", nargs="+", default=[c.value for c in Compression], choices=[*Compression])
    parser.add_argument("--tasks", nargs="+", default=[t.value for t in Task], choices=[t.value for t in Task])


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure every case that the record does not hold yet."""
    for recorded in report.recorded_rows():
        report.add(row_of(recorded["details"]))
    done = {row.name for row in report.rows}
    for kind in options.kinds:
        for name in options.only:
            for task in Task if name in CAUSAL else (Task.FORWARD,):
                if f"{name}, {kind}, {task}" in done or task.value not in options.tasks:
                    continue
                try:
                    report.add(row_of(measure_one(name, kind, task=task)))
                except IBNormError as error:
                    print(f"{name}, {kind}, {task}: refused: {error}", file=sys.stderr, flush=True)
                report.save()
