"""What the gate costs and decides on the demo's models: time of --layers and `check`, the error, the latency verdict.

    make demo && python -m benchmarks.suites.gates_live demo --record benchmarks/results/gates_live.json

The verdict judges a file against itself, and a runner that takes a tenth longer against the plain one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.measure import measure
from ibnorm_export.benchmark.options import Timing
from ibnorm_export.benchmark.statistics import judge, paired
from ibnorm_export.environment import environment
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.verifier.verify import VerifyOptions, verify

#: Relative error of the demo's logits in fp32.
BARS = {"fused": 5e-7, "as functions": 2e-6}

#: Of the planted slowdown.
SLOWER = 0.1


class Slower:
    """A runner that takes a share longer than another, by its own clock."""

    name = "slower"

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, inputs: Arrays) -> Arrays:
        start = time.perf_counter()
        outputs = self._runner.run(inputs)
        end = start + (time.perf_counter() - start) * (1.0 + SLOWER)
        while time.perf_counter() < end:
            pass
        return outputs


def overhead(folder: Path, name: str, rounds: int) -> dict[str, Any]:
    """Time of verify with --layers over plain verify, median of alternating rounds."""
    exported, model = ExportedModel(folder / f"{name}.onnx"), models.load(folder / name)
    times: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds + 1):
        for layers in (False, True):
            start = time.perf_counter()
            assert verify(exported, model, options=VerifyOptions(layers=layers))
            if index:  # the first round warms up
                times[layers].append(time.perf_counter() - start)
    ratio = float(np.median(np.array(times[True]) / np.array(times[False])))
    return {"model": name, "plain_s": np.median(times[False]), "layers_s": np.median(times[True]), "ratio": ratio}


def verdicts(folder: Path, name: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """The verdict on a file against itself, and on a slower one against it."""
    exported = ExportedModel(folder / f"{name}.onnx")
    inputs = draw_inputs(exported, {"batch": 1, "sequence": 128})
    found = []
    for case in ("itself", "slower"):
        first = open_runner("ort-cpu", exported, threads=threads)
        candidates = {case: first if case == "itself" else Slower(first)}
        candidates["again"] = open_runner("ort-cpu", exported, threads=threads)
        report = measure(candidates, inputs, threads=threads, rounds=rounds, timing=Timing(warmup_ms=200.0))
        verdict = judge(paired(report.latencies[0].round_ms, report.latencies[1].round_ms), 1.0)
        found.append({"model": name, "case": case, **verdict.to_dict()})
        print(f"{name} {case}: {verdict}")
    return found


def errors(folder: Path, name: str) -> list[dict[str, Any]]:
    """Relative error of the logits against float64, with the fused kernels and with the functions."""
    report = verify(ExportedModel(folder / f"{name}.onnx"), models.load(folder / name))
    assert report.numeric is not None
    return [{"model": name, "norms": o.norms, "error": o.error, "bar": BARS[o.norms]} for o in report.numeric.outputs]


def gate(checkpoint: Path) -> dict[str, Any]:
    """Time of `check` on what `check --init` writes, with every backend that is present."""
    command = [sys.executable, "-c", "from ibnorm_export.cli.__main__ import run; run()", "check"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--init", str(checkpoint.resolve())], cwd=folder, check=True, capture_output=True)
        config = Path(folder) / "check.toml"
        written = config.read_text(encoding="utf-8")
        every = written.replace('backends = ["ort-cpu"]', 'backends = ["present"]')
        assert every != written
        config.write_text(every, encoding="utf-8")
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return {"model": checkpoint.name, "check_s": time.perf_counter() - start}


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    rows = [overhead(arguments.folder, name, 5) for name in ("llama", "vit")]
    for row in rows:
        print(
            f"{row['model']}: {row['plain_s']:.2f} s, with --layers {row['layers_s']:.2f} s: {row['ratio']:.2f} times"
        )
    judged = [
        v for name in ("llama", "vit") for v in verdicts(arguments.folder, name, arguments.threads, arguments.rounds)
    ]
    parity = [row for name in ("llama", "vit") for row in errors(arguments.folder, name)]
    for row in parity:
        print(f"{row['model']}, norms {row['norms']}: relative error {row['error']:.2e}, bar {row['bar']:.0e}")
    gates = [gate(arguments.folder / name) for name in ("llama", "vit")]
    print(", ".join(f"check of {row['model']}: {row['check_s']:.0f} s" for row in gates))
    if arguments.record is not None:
        content = {
            "environment": environment(),
            "layers_overhead": rows,
            "check": gates,
            "verdicts": judged,
            "errors": parity,
        }
        arguments.record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    wrong = [v for v in judged if v["decision"] == ("fail" if v["case"] == "itself" else "pass")]
    slow = any(row["ratio"] > 3.0 for row in rows) or sum(row["check_s"] for row in gates) > 180.0
    return 1 if wrong or slow or any(row["error"] > row["bar"] for row in parity) else 0


if __name__ == "__main__":
    sys.exit(main())
