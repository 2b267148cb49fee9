"""Time of a default verification after imports, here and in an earlier version of the package.

Models have the sizes of the demo's and random weights. Each version exports and verifies in its own processes, in
turn with the other, on one thread: a warm pass, then the median of several. Processor time is the figure, since a
busy neighbour does not add to it. `--before PYTHON` is the interpreter of an environment with the earlier version
installed; without it, only the time here is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export import models
from ibnorm_export.cli.demo_app.configs import CONFIGS

__all__ = ["add_options", "measure"]

#: Model, task and dtype of each case.
CASES = [
    *[(model, "forward", dtype) for model in ("llama", "vit") for dtype in ("fp32", "fp16")],
    *[("llama", "text-generation", dtype) for dtype in ("fp32", "fp16")],
]

_MOST = 2.0

#: argv: checkpoint, task, dtype, folder, passes. Prints processor seconds of each pass.
_VERIFY = """
import json, sys, time
from ibnorm_export import ExportOptions, export, load, verify

checkpoint, task, dtype, folder, passes = sys.argv[1:]
model = load(checkpoint, task=task)
target = folder if task == "text-generation" else folder + "/model.onnx"
file = export(model, target, options=ExportOptions(dtype=dtype))
assert verify(file, model).passed
seconds = []
for _ in range(int(passes)):
    start = time.process_time()
    verify(file, model)
    seconds.append(time.process_time() - start)
print(json.dumps(seconds))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, help="Python of an environment with an earlier version.")
    parser.add_argument("--rounds", type=int, default=3, help="Processes of each version (%(default)s).")
    parser.add_argument("--passes", type=int, default=3, help="Measured passes of each process (%(default)s).")


def _seconds(python: Path, checkpoint: Path, task: str, *, dtype: str, passes: int) -> list[float]:
    """Processor time of each pass with the package of an environment."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "exported"
        if task == "forward":
            target.mkdir()
        command = [python, "-c", _VERIFY, checkpoint, task, dtype, target, passes]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(part) for part in command], env=environment, cwd=folder, check=True, capture_output=True, text=True
        )
    measured: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def measure(options: argparse.Namespace, report: Report) -> None:
    """Verify every case in both versions in turn."""
    versions = {"here": Path(sys.executable)} | (
        {} if options.before is None else {"before": options.before.absolute()}
    )
    with tempfile.TemporaryDirectory() as place:
        checkpoints = {name: Path(place) / name for name in CONFIGS}
        for name, (config, norm) in CONFIGS.items():
            models.save(models.new_model(config, norm), checkpoints[name])
        for name, task, dtype in CASES:
            seconds: dict[str, list[float]] = {version: [] for version in versions}
            for _ in range(options.rounds):
                for version, python in versions.items():
                    seconds[version] += _seconds(python, checkpoints[name], task, dtype=dtype, passes=options.passes)
            figures = {version: Figure(statistics.median(values), "s") for version, values in seconds.items()}
            targets = ()
            if options.before is not None:
                figures["over the earlier version"] = Figure(figures["here"].value / figures["before"].value)
                targets = (Target("over the earlier version", _MOST),)
            report.add(Row(f"{name}, {task}, {dtype}", figures, targets=targets, details={"seconds": seconds}))
