"""Export and verify language models with random weights for generation; record time and peak memory of each step.

    python -m benchmarks.suites.generation_large --json

Every step runs in a process of its own; its peak is the largest resident set, mapped files included. Verification
holds the weights for PyTorch as they are stored, and in one session of ONNX Runtime at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import publish

CASES = (("llama-350m", "portable"), ("llama-350m", "ort-genai"), ("gpt2-355m", "portable"))

#: The last argument names the file for the cost.
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


def command(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, float]]:
    """What `ibnorm-export ARGUMENTS --json` says, and what it cost."""
    cost = folder / "step.cost"
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments, "--json", str(cost)], capture_output=True, text=True, check=False
    )
    if not done.stdout:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    said = json.loads(done.stdout)
    if "error" in said:
        raise SystemExit(f"{' '.join(arguments)}: {said['error']['message']}")
    seconds, peak = json.loads(cost.read_text(encoding="ascii"))
    return said, {"seconds": round(seconds, 1), "peak_bytes": peak}


def measure(preset: str, target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, out = folder / "checkpoint", folder / "out"
        subprocess.run([sys.executable, "-c", _NEW, preset, str(checkpoint)], check=True, capture_output=True)
        weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        wanted = ["export", str(checkpoint), "-o", str(out), "--task", "text-generation", "--target", target]
        exported, export_cost = command(folder, *wanted)
        report, verify_cost = command(folder, "verify", str(out), str(checkpoint), "--samples", "2")
        outputs = (report["numeric"] or {}).get("outputs", [])
        return {
            "preset": preset,
            "target": target,
            "weights_bytes": weights,
            "file_bytes": exported["size_bytes"],
            "norms": exported["norms"],
            "export": export_cost,
            "verify": verify_cost,
            "verdict": report["verdict"],
            "findings": [f["what"] for part in ("static", "numeric") for f in (report[part] or {}).get("findings", [])],
            "worst_error": max((o["error"] for o in outputs), default=None),
            "top1_agreement": min((o["top1_agreement"] for o in outputs if o.get("top1_agreement")), default=None),
        }


def main() -> int:
    parser = publish.parser(__doc__)
    parser.add_argument("--only", help="a preset; default all")
    options = parser.parse_args()
    rows = []
    for preset, target in CASES:
        if options.only not in (None, preset):
            continue
        rows.append(measure(preset, target))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    lines = [
        f"{row['preset']}, {row['target']}: {row['verdict']}; export {row['export']['seconds']} s, "
        f"{row['export']['peak_bytes'] / 1e9:.1f} GB; verify {row['verify']['seconds']} s, "
        f"{row['verify']['peak_bytes'] / 1e9:.1f} GB; worst error {row['worst_error']:.2g}"
        for row in rows
    ]
    good = all(row["verdict"] == "pass" for row in rows)
    return publish.publish("generation_large", {"rows": rows}, good, lines, options)


if __name__ == "__main__":
    sys.exit(main())
