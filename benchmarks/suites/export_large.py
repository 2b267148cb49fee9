"""Export a LLaMA preset with random weights and record time and peak memory.

Physical limit: the weights must be in memory once and on disk twice (checkpoint and ONNX file), so
peak memory cannot be below 1.0 times the weights and time not below twice their size over the
disk's write bandwidth. Peak is the largest resident set of the exporting process, mapped pages of
the checkpoint included.

    python -m benchmarks.suites.export_large --preset llama-1b --json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import publish

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

PEAK_OVER_WEIGHTS = 2.5


def main() -> int:
    parser = publish.parser(__doc__)
    parser.add_argument("--preset", default="llama-1b")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, target = Path(folder) / "checkpoint", Path(folder) / "model.onnx"
        subprocess.run([sys.executable, "-c", _NEW, options.preset, str(checkpoint)], check=True)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _EXPORT, str(checkpoint), str(target)], check=True, capture_output=True, text=True
        )
        wall_s = time.perf_counter() - start
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        files = {p.name: p.stat().st_size for p in Path(folder).iterdir() if p.is_file()}
    ratio = figures["peak_bytes"] / figures["weights_bytes"]
    good = ratio <= PEAK_OVER_WEIGHTS
    content = {
        "preset": options.preset,
        **figures,
        "files": files,
        "wall_s": wall_s,
        "peak_over_weights": ratio,
        "bar": PEAK_OVER_WEIGHTS,
    }
    line = (
        f"{options.preset}: {figures['weights_bytes'] / 1e9:.2f} GB of weights, peak {ratio:.2f} times that, "
        f"load {figures['load_s']:.0f} s, export {figures['export_s']:.0f} s: {'met' if good else 'missed'}"
    )
    return publish.publish("export_large", content, good, [line], options)


if __name__ == "__main__":
    sys.exit(main())
