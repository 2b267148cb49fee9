"""Export and verify large language models with random weights for generation: time and peak memory of each step.

Every step runs in its own process. Its peak is the largest resident set, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target

CASES = (("llama-350m", "portable"), ("llama-350m", "ort-genai"), ("gpt2-355m", "portable"))

#: The last argument names the file that takes seconds and peak bytes.
_RUN = """
import json, pathlib, sys, time
from ibnorm_export.cli.main import main
cost, begin = pathlib.Path(sys.argv.pop()), time.perf_counter()
code = main()
status = pathlib.Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
cost.write_text(json.dumps([time.perf_counter() - begin, peak]))
sys.exit(code)
"""

_NEW = """
import sys
from ibnorm_export import IBNormSpec, models
spec = IBNormSpec("L", 4.0, epsilon=1e-5, bias=sys.argv[1].startswith("gpt2"))
models.save(models.new_model(sys.argv[1], spec), sys.argv[2])
"""


def command(folder: Path, *arguments: str) -> tuple[dict[str, Any], float, int]:
    """The output of `ibnorm-export ARGUMENTS --json`, its seconds and its peak bytes."""
    cost = folder / "step.cost"
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments, "--json", str(cost)], capture_output=True, text=True, check=False
    )
    if not done.stdout:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
    output = json.loads(done.stdout)
    if "error" in output:
        raise RuntimeError(f"{' '.join(arguments)}: {output['error']['message']}")
    seconds, peak = json.loads(cost.read_text(encoding="ascii"))
    return output, round(seconds, 1), peak


def row_of(preset: str, target: str) -> Row:
    """Export and verify one preset."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, out = folder / "checkpoint", folder / "out"
        subprocess.run([sys.executable, "-c", _NEW, preset, str(checkpoint)], check=True, capture_output=True)
        weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        wanted = ["export", str(checkpoint), "-o", str(out), "--task", "text-generation", "--target", target]
        exported, export_s, export_peak = command(folder, *wanted)
        report, verify_s, verify_peak = command(folder, "verify", str(out), str(checkpoint), "--samples", "2")
    findings = [f["what"] for part in ("static", "numeric") for f in (report[part] or {}).get("findings", [])]
    outputs = (report["numeric"] or {}).get("outputs", [])
    figures = {
        "failures": Figure(int(report["verdict"] != "pass")),
        "weights": Figure(weights / 1e9, "GB"),
        "export": Figure(export_s, "s"),
        "export peak": Figure(export_peak / 1e9, "GB"),
        "verify": Figure(verify_s, "s"),
        "verify peak": Figure(verify_peak / 1e9, "GB"),
        "largest error": Figure(max((o["error"] for o in outputs), default=math.nan)),
    }
    details = {"file_bytes": exported["size_bytes"], "norms": exported["norms"], "findings": findings}
    return Row(f"{preset}, {target}", figures, targets=(Target("failures", 0),), details=details)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=sorted({preset for preset, _ in CASES}), help="One preset (all by default).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export and verify every preset."""
    for preset, target in CASES:
        if options.only in (None, preset):
            report.add(row_of(preset, target))
