"""Run one suite: `python -m benchmarks.run SUITE [--json] [--record [FILE]]`.

Exit codes: 0 all targets are met, 1 a target is missed, 2 wrong usage, 3 this machine lacks what the suite needs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Unavailable
from ibnorm_export.errors import BackendUnavailable

__all__ = ["RESULTS", "SUITES", "main"]

RESULTS = Path(__file__).resolve().parent / "results"

#: Modules of `benchmarks.suites`. Each has `add_options(parser)` and `measure(options, report)`.
SUITES = {
    "op_cpu": "The fused operator in ONNX Runtime on the CPU, against LayerNormalization and a memory copy.",
    "arm_instructions": "Instructions of the CPU kernels for each element on arm64, with NEON and without.",
    "op_cuda": "Bandwidth of the CUDA kernels, against a copy on the same GPU.",
    "model_cpu": "Whole models in ONNX Runtime on the CPU, fused and as functions, against LayerNorm.",
    "generation": "First token and decoding of LLaMA-60M in every form, against an RMSNorm model.",
    "generation_large": "Time and memory of exporting and verifying large language models.",
    "export_large": "Time and memory of exporting LLaMA-1B.",
    "export_speed": "Time and memory of an export once everything is imported, beside one copy of the file.",
    "serving": "A real Triton and the text endpoint, called by clients.",
    "serving_load": "Latency of the text endpoint over a growing load of texts that arrive at random.",
    "families": "Every preset of the paper, exported and verified with random weights.",
    "architectures": "Architectures of transformers with a stranger's norms, against their own module.",
    "identify": "Norms of strangers that `identify` must recognise, or name as something else.",
    "wrong_readings": "Wrong readings of a training code's norm, none of which may pass.",
    "evaluation": "Verdicts of evaluate on simulated pairs, its overhead over the runtime, and its memory.",
    "sweep": "Which file to ship: size, speed and accuracy of every form of the demo's models, and of SmolLM's size.",
    "planted_faults": "Faults that verification must find, and correct exports that it must pass.",
    "verify_time": "Time of a default verification, here and in an earlier version.",
    "verify_memory": "Peak memory of verify --layers on large models, over their weights.",
    "false_alarms": "Right exports that verification must pass, some with hostile weights.",
    "fuzz": "Damaged and hostile files for every reader, with a limit of memory.",
    "tools": "What simplifiers, quantisers and converters do to an exported file.",
    "gates_live": "Cost of --layers and check, errors and latency verdicts on the demo's models.",
    "training_checkpoints": "Checkpoints of eight training codes, written by their own functions, through `import`.",
    "strangers_path": "Training codes with their own norm classes, from training to serving, by commands only.",
    "runtimes": "Files in every form, in every runtime that is there, against PyTorch in float64.",
    "transformers_js": "Every architecture that transformers.js takes, in Node, against a stranger's module.",
    "browser_page": "The example page in a headless Chromium: time until it is ready, and tokens/s.",
    "gpu_check": "Kernels, plugin and bandwidth on a GPU in one call, or on the CPU emulator.",
    "cuda_races": "Proofs that the CUDA kernels have no data race.",
    "cuda_static": "Registers, spills and instructions of the compiled CUDA kernels.",
    "tensorrt_rtx_builds": "Engines of TensorRT-RTX: build time, and what became of each norm.",
}


def _usage() -> str:
    width = max(map(len, SUITES))
    suites = "\n".join(f"  {name:{width}}  {text}" for name, text in SUITES.items())
    return f"{__doc__}\n{suites}\n\n`python -m benchmarks.run SUITE --help` lists the options of a suite."


def _parser(name: str, suite: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.run {name}",
        description=suite.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = RESULTS / f"{name}.json"
    parser.add_argument("--json", action="store_true", help="Print one JSON object; lines go to standard error.")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=default,
        help=f"Write the result to FILE (benchmarks/results/{name}.json).",
    )
    suite.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite that `arguments` (the command line by default) names, and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    name, *rest = given
    if name not in SUITES:
        print(f"benchmarks.run: {name!r} is not a suite; the suites are {', '.join(SUITES)}", file=sys.stderr)
        return 2
    try:
        suite = importlib.import_module(f"benchmarks.suites.{name}")
    except ModuleNotFoundError as missing:
        print(
            f"{name}: {missing.name} is not installed; benchmarks/README.md lists what each suite needs",
            file=sys.stderr,
        )
        return 3
    options = _parser(name, suite).parse_args(rest)
    report = Report(name, record=options.record, lines=sys.stderr if options.json else sys.stdout)
    try:
        suite.measure(options, report)
    except (Unavailable, BackendUnavailable) as missing:
        print(f"{name}: {missing}", file=sys.stderr)
        return 3
    report.save()
    if options.json:
        print(json.dumps(report.to_dict(), indent=1))
    return 0 if report.met else 1


if __name__ == "__main__":
    sys.exit(main())
