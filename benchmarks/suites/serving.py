"""Serving: a real Triton on packaged models, and the text endpoint, called by clients in this process.

`--prepare` exports the models into the folder of `--models` and measures nothing; that takes minutes. The models are a
ViT and a LLaMA of the demo's shapes, and for text LLaMA-60M with its vocabulary of 32000 too, all with random weights.
Clients and servers share the machine's cores, so times are those of both together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import Unavailable
from benchmarks.suites.serving_text import text
from benchmarks.suites.serving_triton import concurrent_requests, parity, sigterm_under_load
from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.cli.demo_app.configs import CONFIGS
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.serving.triton.binary import find_triton


def extend_vocabulary(folder: Path, vocabulary: int) -> None:
    """Extend a tokenizer of bytes to `vocabulary` tokens; the new ones are words that no prompt contains."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    words = ("\u0120" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    tokenizer["model"]["vocab"] |= {word: token for token, word in zip(range(256, vocabulary), words, strict=False)}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def prepare(folder: Path) -> None:
    """Write checkpoints, exported files in both types, and folders for GenAI."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (config, spec) in CONFIGS.items():
        models.save(models.new_model(config, spec), folder / name)
        for dtype in (DType.FP32, DType.FP16):
            export(
                models.load(folder / name), folder / f"{name}-{dtype.value}.onnx", options=ExportOptions(dtype=dtype)
            )
    models.save(models.new_model("llama-60m", IBNormSpec("L", bias=False)), folder / "llama-60m")
    for checkpoint, name in (("llama", "text"), ("llama-60m", "text-60m")):
        write_byte_tokenizer(folder / checkpoint)
        if name == "text-60m":
            extend_vocabulary(folder / checkpoint, 32000)
        export_genai(models.load(folder / checkpoint, task="text-generation"), folder / name)


STAGES = {"parity": parity, "crowd": concurrent_requests, "ended": sigterm_under_load, "text": text}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=Path, required=True, help="Folder of the models.")
    parser.add_argument("--prepare", action="store_true", help="Make the models and measure nothing.")
    help_only = "Measure only these stages; rows of the others stay in the record."
    parser.add_argument("--only", choices=STAGES, action="append", help=help_only)


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure the chosen stages; rows of the others come from the record."""
    if options.prepare:
        prepare(options.models)
        raise SystemExit(0)
    chosen = options.only or list(STAGES)
    recorded = report.recorded_rows() if options.only else []
    if any("figures" not in row for row in recorded):
        raise Unavailable(f"{report.record} was written by an earlier version; record all stages, without --only")
    binary = find_triton()
    report.facts["server"] = (
        "tritonserver on PATH" if binary.root is None else "tritonserver of nvidia-pytriton, Python backend"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name, stage in STAGES.items():
            if name in chosen:
                for row in stage(options.models, Path(scratch)):
                    report.add(replace(row, details={**row.details, "stage": name}))
            else:
                report.recorded += [row for row in recorded if row["details"]["stage"] == name]
