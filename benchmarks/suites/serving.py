"""The bars of serving: a real Triton on packaged models, and the text endpoint, by clients in this process.

    python -m benchmarks.suites.serving --models build/serving-models --prepare     # export, minutes, no timing
    python -m benchmarks.suites.serving --models build/serving-models --record benchmarks/results/serving.json

Models: a ViT and a LLaMA of the demo's shapes, and for text LLaMA-60M with its vocabulary of 32000 too; random weights.
Clients and servers share the machine's cores, so the times are those of both together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.suites.serving_text import text
from benchmarks.suites.serving_triton import crowd, ended, parity
from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.environment import environment
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.serving.triton.binary import find_triton

CONFIGS = {
    "llama": (
        {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 256,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        IBNormSpec("L", bias=False),
    ),
    "vit": (
        {
            "model_type": "vit",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "num_labels": 10,
        },
        IBNormSpec("T"),
    ),
}


def give_words(folder: Path, vocabulary: int) -> None:
    """Make a tokenizer of bytes one of `vocabulary` tokens: the others are words, which no prompt is cut into."""
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    words = ("\u0120" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    made["model"]["vocab"] |= {word: token for token, word in zip(range(256, vocabulary), words, strict=False)}
    file.write_text(json.dumps(made), encoding="utf-8")


def prepare(folder: Path) -> None:
    """Checkpoints, exported files in both types, and a folder for GenAI."""
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
            give_words(folder / checkpoint, 32000)
        export_genai(models.load(folder / checkpoint, task="text-generation"), folder / name)


STAGES = {"parity": parity, "crowd": crowd, "ended": ended, "text": text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, required=True, help="folder of the models")
    parser.add_argument("--prepare", action="store_true", help="make them, and measure nothing")
    parser.add_argument("--only", choices=STAGES, action="append", help="these parts; others stay in --record's file")
    parser.add_argument("--record", type=Path, help="write the JSON here")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.models)
        return 0
    chosen = options.only or list(STAGES)
    rows: list[dict[str, Any]] = []
    if options.record and options.record.exists():
        found = json.loads(options.record.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in found if row.get("stage") in set(STAGES) - set(chosen)]
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            for row in STAGES[name](options.models, Path(scratch)):
                rows.append({"stage": name, **row.to_json()})
                sign = "<=" if row.at_most else ">="
                print(f"{'met   ' if row else 'MISSED'} {row.what}: {row.value:g} ({sign} {row.bar:g})")
                print(f"       {row.note}", flush=True)
    rows.sort(key=lambda row: list(STAGES).index(row["stage"]))
    binary = find_triton()
    met = all(row["verdict"] == "met" for row in rows)
    report = {
        "benchmark": "serving",
        "server": "tritonserver on PATH" if binary.root is None else "tritonserver of nvidia-pytriton, Python backend",
        "environment": environment(),
        "rows": rows,
        "verdict": "met" if met else "missed",
    }
    if options.record:
        options.record.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
