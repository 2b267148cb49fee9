"""Export a LLaMA preset with random weights: time and peak memory.

Physical limit: the weights must be in memory once and on disk twice (checkpoint and ONNX file). So peak memory cannot
be below 1.0 times the weights, and time cannot be below twice their size over the disk's write bandwidth. Peak is the
largest resident set of the exporting process, mapped pages of the checkpoint included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target

_EXPORT = """
import json, resource, sys, time
from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.exporter.export import export
start = time.perf_counter()
model = models.load(sys.argv[1])
loaded = time.perf_counter()
exported = export(model, sys.argv[2])
done = time.perf_counter()
weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"weights_bytes": weights, "peak_bytes": peak, "load_s": loaded - start, "export_s": done - loaded,
    "file_bytes": exported.size_bytes, "norms": len(exported.norms)}))
"""

_NEW = """
import sys
from ibnorm_export import IBNormSpec, models
models.save(models.new_model(sys.argv[1], IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)), sys.argv[2])
"""

MAX_PEAK_OVER_WEIGHTS = 2.5


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="llama-1b", help="Preset of the model (%(default)s).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export the preset once."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, target = Path(folder) / "checkpoint", Path(folder) / "model.onnx"
        subprocess.run([sys.executable, "-c", _NEW, options.preset, str(checkpoint)], check=True)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _EXPORT, str(checkpoint), str(target)], check=True, capture_output=True, text=True
        )
        wall_s = time.perf_counter() - start
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        files = {p.name: p.stat().st_size for p in Path(folder).iterdir() if p.is_file()}
    figures = {
        "peak over weights": Figure(measured["peak_bytes"] / measured["weights_bytes"]),
        "weights": Figure(measured["weights_bytes"] / 1e9, "GB"),
        "load": Figure(measured["load_s"], "s"),
        "export": Figure(measured["export_s"], "s"),
        "whole process": Figure(wall_s, "s"),
    }
    targets = (Target("peak over weights", MAX_PEAK_OVER_WEIGHTS),)
    report.add(Row(options.preset, figures, targets=targets, details={"files": files, "norms": measured["norms"]}))
