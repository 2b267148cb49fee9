"""Engines of TensorRT-RTX for the op, the demo's models and the paper's: build time, and what became of each norm.

No GPU is used. The op (S, L, T, plain and skip), the demo's ViT and LLaMA, ViT-S/16, and LLaMA-60M with a cache
(profiles prefill and decode), all untrained, are exported with default options in fp32, fp16 and bf16, and built for
sm_89, for sm_120 and for both together. Each is built once, while the machine also does other work, so times are rough.
Target: at most two kernels for each norm, for every model, type and GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export import Compression, IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.cli.demo_app.train import train_checkpoint
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
MAX_KERNELS = 2


def exported(name: str, dtype: DType, folder: Path) -> ExportedModel:
    """Export the model `name` into `folder`."""
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


def rows_of(name: str, dtype: DType, folder: Path) -> Iterator[Row]:
    """One row for each set of GPUs."""
    model = exported(name, dtype, folder)
    for targets in TARGETS:
        options = EngineOptions(Runtime.TENSORRT_RTX, compute_capabilities=targets)
        engine = build_engine(model, folder / "model.plan", options=options)
        realised = Counter(norm.realised for norm in engine.norms)
        figures = {
            "kernels of one norm, most": Figure(max((len(norm.kernels) for norm in engine.norms), default=0)),
            "norms without a known kernel": Figure(sum(not n.kernels or n.realised == "unknown" for n in engine.norms)),
            "norms": Figure(len(engine.norms)),
            "build": Figure(engine.description.build_s, "s"),
            "size": Figure(round(engine.description.size_bytes / 1e6, 1), "MB"),
        }
        details = {
            "profiles": [profile.name for profile in engine.description.profiles],
            "skip_forms": sum(norm.op_type.startswith("Skip") for norm in engine.norms),
            "realised": dict(sorted(realised.items())),
        }
        limits = (
            Target("kernels of one norm, most", MAX_KERNELS),
            Target("norms without a known kernel", 0),
            Target("norms", 1, at_least=True),
        )
        yield Row(f"{name}, {dtype.value}, {' and '.join(targets)}", figures, targets=limits, details=details)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS), help="Models to build.")
    parser.add_argument("--dtype", type=DType, choices=list(DType), nargs="+", default=list(DType))


def measure(options: argparse.Namespace, report: Report) -> None:
    """Build every engine."""
    with tempfile.TemporaryDirectory() as folder:
        for name in options.model:
            for dtype in options.dtype:
                for row in rows_of(name, dtype, Path(folder)):
                    report.add(row)
