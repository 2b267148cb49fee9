"""Cost and decisions of the gates on the demo's models: time of --layers and `check`, errors, latency verdicts.

`make demo` makes the models. The latency verdict judges a file against itself, and a runner that takes a tenth longer
against the plain one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from benchmarks.turns import compare, ms, take_turns, timed
from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.benchmark.measure import measure as measure_runners
from ibnorm_export.benchmark.options import Timing
from ibnorm_export.benchmark.statistics import judge, paired
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.verifier.verify import VerifyOptions, verify

#: Largest relative error of the demo's logits in fp32.
MAX_ERROR = {"fused": 5e-7, "as functions": 2e-6}

#: Share by which the planted slowdown is slower.
SLOWER = 0.1
NAMES = ("llama", "vit")


class Slower:
    """Wraps a runner and takes a tenth longer, by its own clock."""

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


def layers_row(folder: Path, name: str, rounds: int) -> Row:
    """Time of verify with --layers over verify without."""
    exported, model = ExportedModel(folder / f"{name}.onnx"), models.load(folder / name)

    def once(*, layers: bool) -> None:
        assert verify(exported, model, options=VerifyOptions(layers=layers))

    candidates = {"with --layers": timed(lambda: once(layers=True)), "plain": timed(lambda: once(layers=False))}
    times = take_turns(candidates, rounds=rounds, warmup=1)
    figures = {**compare(times, "with --layers", over="plain"), **{key: ms(times, key) for key in candidates}}
    return Row(f"{name}: verify --layers over verify", figures, targets=(Target("time over baseline", 3.0),))


def verdict_rows(folder: Path, name: str, *, threads: int, rounds: int) -> Iterator[Row]:
    """The verdict on a file against itself, and on a slower one against it."""
    exported = ExportedModel(folder / f"{name}.onnx")
    inputs = draw_inputs(exported, {"batch_size": 1, "sequence_length": 128})
    for case, wrong in (("itself", "fail"), ("slower", "pass")):
        first = open_runner("ort-cpu", exported, threads=threads)
        candidates = {case: first if case == "itself" else Slower(first)}
        candidates["again"] = open_runner("ort-cpu", exported, threads=threads)
        timing = Timing(warmup_ms=200.0)
        report = measure_runners(candidates, inputs, threads=threads, rounds=rounds, timing=timing)
        verdict = judge(paired(report.latencies[0].round_ms, report.latencies[1].round_ms), 1.0)
        figures = {
            "wrong verdicts": Figure(int(verdict.decision == wrong)),
            "time over baseline": Figure(round(verdict.spread.ratio, 4)),
            "low": Figure(round(verdict.spread.low, 4)),
            "high": Figure(round(verdict.spread.high, 4)),
        }
        targets = (Target("wrong verdicts", 0),)
        yield Row(f"{name}: verdict on {case}", figures, targets=targets, details=verdict.to_dict())


def error_rows(folder: Path, name: str) -> Iterator[Row]:
    """Relative error of the logits against float64, with fused kernels and with functions."""
    report = verify(ExportedModel(folder / f"{name}.onnx"), models.load(folder / name))
    assert report.numeric is not None
    for output in report.numeric.outputs:
        targets = (Target("error", MAX_ERROR[output.norms]),)
        yield Row(f"{name}: norms {output.norms}", {"error": Figure(output.error)}, targets=targets)


def check_row(folder: Path) -> Row:
    """Time of `check` on what `check --init` writes, with every backend that is present."""
    command = [sys.executable, "-c", "from ibnorm_export.cli.__main__ import run; run()", "check"]
    seconds = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as place:
            checkpoint = (folder / name).resolve()
            subprocess.run([*command, "--init", str(checkpoint)], cwd=place, check=True, capture_output=True)
            config = Path(place) / "check.toml"
            written = config.read_text(encoding="utf-8")
            every = written.replace('backends = ["ort-cpu"]', 'backends = ["present"]')
            assert every != written
            config.write_text(every, encoding="utf-8")
            start = time.perf_counter()
            subprocess.run(command, cwd=place, check=True, capture_output=True)
            seconds[name] = time.perf_counter() - start
    figures = {"both": Figure(round(sum(seconds.values()), 1), "s")}
    figures |= {name: Figure(round(value, 1), "s") for name, value in seconds.items()}
    return Row("check with every backend that is present", figures, targets=(Target("both", 180.0),))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="Folder that `make demo` wrote (%(default)s).")
    parser.add_argument("--threads", type=int, default=1, help="Threads of each candidate (%(default)s).")
    parser.add_argument("--rounds", type=int, default=60, help="Turns of each candidate (%(default)s).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure both models of the demo."""
    if not (options.demo / "llama.onnx").is_file():
        raise Unavailable(f"{options.demo} holds no llama.onnx; run `make demo`, or name its folder with --demo")
    for name in NAMES:
        report.add(layers_row(options.demo, name, 5))
        for row in verdict_rows(options.demo, name, threads=options.threads, rounds=options.rounds):
            report.add(row)
        for row in error_rows(options.demo, name):
            report.add(row)
    report.add(check_row(options.demo))
