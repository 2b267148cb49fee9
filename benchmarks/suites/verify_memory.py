"""Peak memory of `verify --layers` on models whose weights are large, over the weights.

Each preset is exported from a checkpoint with random weights and verified by its own process, static verdict, numbers
and layers, on one ordinary input without the covering ones, whose size would count rather than the weights.

The peak is that of anonymous memory (RssAnon in /proc/PID/status), read every 10 ms from outside. Mapped pages of the
checkpoint and of the file are not in it: the kernel drops them when memory is needed. The `whole peak` counts them too.

Physical limit: weights are compared in float64, so at least one matrix is there in float64 beside its product. No other
weight needs to be in memory.

llama-7b:bf16 is a checkpoint of 13.5 GB in bf16; it takes 28 GB of disk, and up to an hour on two cores. With
`--blocks 4` it has 4 blocks instead of 32, which takes some minutes: what a block adds to the peak shows from two runs.
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

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from benchmarks.suites.export_speed import make_checkpoint

__all__ = ["add_options", "measure"]

#: argv: checkpoint, file, dtype.
_EXPORT = """
import sys
from ibnorm_export import ExportOptions, export, load
export(load(sys.argv[1]), sys.argv[2], options=ExportOptions(dtype=sys.argv[3]))
"""

#: argv: checkpoint, file. Prints the time at which each stage began.
_VERIFY = """
import json, sys, time
from ibnorm_export import VerifyOptions, load, verify

stages = [(time.time(), "loading")]
model = load(sys.argv[1])
report = verify(
    sys.argv[2],
    model,
    options=VerifyOptions(samples=1, layers=True, coverage="fast"),
    progress=lambda what, *_: stages.append((time.time(), what)),
)
assert report.passed, report
layers = report.numeric.layers.layers
weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
print(json.dumps({"weights": weights, "layers": len(layers), "stages": stages}))
"""

#: Largest anonymous memory.
_MOST_GIB = {"llama-7b:bf16": 12.0}

_EVERY_S = 0.01


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", default=list(_MOST_GIB), help="Presets of models (%(default)s).")
    parser.add_argument("--blocks", type=int, help="Number of blocks; the default is the preset's.")
    parser.add_argument("--checkpoints", type=Path, help="Folder of checkpoints and exports, to make them only once.")


def _memory(process: int) -> dict[str, int]:
    """Memory of a process in bytes, by the name in its status; empty once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines if line.startswith(("RssAnon:", "VmHWM:"))]
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in fields}


def _watch(command: list[str]) -> tuple[str, dict[str, int], list[tuple[float, int]]]:
    """Run a command: what it prints, its peaks by name, and its anonymous memory by time."""
    peaks: dict[str, int] = {}
    samples: list[tuple[float, int]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            found = _memory(running.pid)
            samples.append((time.time(), found.get("RssAnon", 0)))
            peaks |= {name: max(size, peaks.get(name, 0)) for name, size in found.items()}
            time.sleep(_EVERY_S)
        assert running.stdout is not None
        printed = running.stdout.read()
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command, output=printed)
    return printed, peaks, samples


def _by_stage(stages: list[tuple[float, str]], samples: list[tuple[float, int]]) -> list[tuple[str, float, float]]:
    """Name, seconds and peak in GiB of every stage."""
    ends = [*(begin for begin, _ in stages[1:]), samples[-1][0]]
    found = []
    for (begin, name), end in zip(stages, ends, strict=True):
        peak = max((size for at, size in samples if begin <= at <= end), default=0)
        found.append((name, round(end - begin, 1), round(peak / 2**30, 2)))
    return found


def _row(form: str, folder: Path, *, blocks: int | None) -> Row:
    preset, _, dtype = form.partition(":")
    checkpoint, file = folder / "checkpoint", folder / "model.onnx"
    if not file.exists():
        make_checkpoint(preset, folder / "tiny", checkpoint, blocks=blocks)
        subprocess.run([sys.executable, "-c", _EXPORT, str(checkpoint), str(file), dtype or "fp32"], check=True)
    printed, peaks, samples = _watch([sys.executable, "-c", _VERIFY, str(checkpoint), str(file)])
    measured: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    figures = {
        "peak": Figure(peaks["RssAnon"] / 2**30, "GiB"),
        "peak over weights": Figure(peaks["RssAnon"] / measured["weights"]),
        "whole peak": Figure(peaks["VmHWM"] / 2**30, "GiB"),
        "weights": Figure(measured["weights"] / 1e9, "GB"),
        "time": Figure(samples[-1][0] - samples[0][0], "s"),
        "layers": Figure(measured["layers"]),
    }
    targets = (Target("peak", _MOST_GIB[form]),) if form in _MOST_GIB and blocks is None else ()
    name = form if blocks is None else f"{form}, {blocks} blocks"
    return Row(name, figures, targets=targets, details={"stages_s_gib": _by_stage(measured["stages"], samples)})


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export and verify every preset."""
    for form in options.presets:
        name = form.replace(":", "-") if options.blocks is None else f"{form.replace(':', '-')}-{options.blocks}"
        with tempfile.TemporaryDirectory() as place:
            folder = (Path(place) if options.checkpoints is None else options.checkpoints) / name
            folder.mkdir(parents=True, exist_ok=True)
            report.add(_row(form, folder, blocks=options.blocks))
