"""Engines of TensorRT-RTX for the op, the demo and the paper's models: time to build, what became of the norms.

    python -m benchmarks.suites.tensorrt_rtx_builds --record benchmarks/results/tensorrt_rtx_builds.json

No GPU is used. The op alone (S, L, T, plain and skip), the demo's ViT and LLaMA, ViT-S/16, and LLaMA-60M with a cache
(profiles prefill and decode), untrained, exported as by default, in fp32, fp16 and bf16, each for sm_89 and sm_120
together and by each alone. Times are of the builder alone, once, on whatever else the machine
does; they say "seconds", not more. The bar: at most two kernels a norm, for every model, type and target.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ibnorm_export import Compression, IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.cli.demo_app.train import train_checkpoint
from ibnorm_export.environment import environment
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.runtimes.tensorrt.build import build_engine
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, Runtime
from tests.support.one_norm import one_norm

TARGETS = (("sm_89",), ("sm_120",), ("sm_89", "sm_120"))
OPS = {f"op-{form}-{kind}": (kind, form == "skip") for form in ("plain", "skip") for kind in Compression}
DEMOS = {"demo-vit": "vit", "demo-llama": "llama"}
PRESETS = {
    "vit-s16": (IBNormSpec("T", 4.0, epsilon=1e-5), "forward"),
    "llama-60m": (IBNormSpec("L", 4.0, epsilon=1e-5, bias=False), "text-generation"),
}
MODELS = (*OPS, *DEMOS, *PRESETS)
MOST_KERNELS = 2


def exported(name: str, dtype: DType, folder: Path) -> ExportedModel:
    """The model of one row, written into `folder`."""
    if name in OPS:
        compression, skip = OPS[name]
        ones = np.ones(768)
        return one_norm(folder / f"{name}.onnx", IBNormSpec(compression), dtype.value, skip, ones, 0.0 * ones)
    checkpoint, task = folder / name, "forward"
    if name in PRESETS:
        spec, task = PRESETS[name]
        if not checkpoint.is_dir():
            models.save(models.new_model(name, spec), checkpoint)
    elif not checkpoint.is_dir():
        train_checkpoint(DEMOS[name], checkpoint, max_steps=0)
    write = export_folder if task == "text-generation" else export
    return write(models.load(checkpoint, task=task), folder / f"{name}.{dtype.value}", options=ExportOptions(dtype))


def builds(name: str, dtype: DType, folder: Path) -> list[dict[str, Any]]:
    """One row for each set of targets."""
    model = exported(name, dtype, folder)
    rows = []
    for targets in TARGETS:
        options = EngineOptions(Runtime.TENSORRT_RTX, compute_capabilities=targets)
        engine = build_engine(model, folder / "model.plan", options=options)
        realised = Counter(norm.realised for norm in engine.norms)
        worst = max((len(norm.kernels) for norm in engine.norms), default=0)
        rows.append(
            {
                "model": name,
                "dtype": dtype.value,
                "targets": targets,
                "profiles": [profile.name for profile in engine.description.profiles],
                "build_s": engine.description.build_s,
                "size_mb": round(engine.description.size_bytes / 1e6, 1),
                "norms": len(engine.norms),
                "skip_forms": sum(norm.op_type.startswith("Skip") for norm in engine.norms),
                "realised": dict(sorted(realised.items())),
                "most_kernels_a_norm": worst,
                "verdict": "met" if 1 <= worst <= MOST_KERNELS and "unknown" not in realised else "missed",
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--dtype", type=DType, choices=list(DType), nargs="+", default=list(DType))
    parser.add_argument("--record", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = [row for m in options.model for dtype in options.dtype for row in builds(m, dtype, Path(folder))]
    except BackendUnavailable as missing:
        print(f"tensorrt_rtx_builds: {missing}", file=sys.stderr)
        return missing.exit_code
    verdict = "pass" if all(row["verdict"] == "met" for row in rows) else "fail"
    report = {"benchmark": "tensorrt_rtx_builds", "rows": rows, "verdict": verdict, "environment": environment()}
    text = json.dumps(report, indent=1)
    if options.record:
        options.record.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if verdict == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
