"""Time and peak memory of an export once everything is imported, beside one copy of the file.

Each preset of the paper is exported from a checkpoint with random weights by its own process. That process first
exports a tiny model of the same family, so that imports and caches are not measured. Then it loads and exports the
preset several times; the time is the median of load and export together, the peak is that of the first export.

Physical limit: an export writes every weight once and must read it once, so it cannot be faster than a copy of the
file. No weight needs to stay in memory, so the limit of the peak is one block of one weight.

A preset may name the type of its weights, as in llama-60m:int4, which is exported for text generation. Matrices are
quantised one by one while the file is written. A target of time is on presets without a type. llama-7b:bf16 is a
checkpoint of 13.5 GB in bf16, which is made a block at a time; it takes 41 GB of disk.

`peak over weights` is the growth of the resident set, mapped pages of the checkpoint included, over the process that
has everything imported. `process over weights` also counts that process, about 0.5 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target

#: argv: tiny checkpoint, checkpoint, file, number of runs, type of the weights in the file.
_EXPORT = """
import gc, json, shutil, sys, time
from pathlib import Path
from ibnorm_export import models
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.graph.quantization import Quantization

def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024

tiny, checkpoint, target, runs, dtype = *map(Path, sys.argv[1:4]), int(sys.argv[4]), sys.argv[5]
bits = int(dtype.removeprefix("int")) if dtype.startswith("int") else None
task = "text-generation" if bits else "forward"
options = ExportOptions(quantization=Quantization(bits)) if bits else ExportOptions(dtype)
export(models.load(tiny, task=task), target, options=options)
gc.collect()
before = memory("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
times, stages, peak = [], [], 0
for run in range(runs):
    start = time.perf_counter()
    model = models.load(checkpoint, task=task)
    marks = [("loading", start)]
    export(model, target, options=options, progress=lambda what, *_: marks.append((what, time.perf_counter())))
    times.append(time.perf_counter() - start)
    stages.append({name: later - at for (name, at), (_, later) in zip(marks, marks[1:])})
    peak = peak or memory("VmHWM:")
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
    del model
    gc.collect()
copies = []
files = [f for f in (target, Path(f"{target}.data"), *target.rglob("*")) if f.is_file()]
for _ in range(max(runs, 2)):
    start = time.perf_counter()
    for file in files:
        shutil.copyfile(file, f"{file}.copy")
    copies.append(time.perf_counter() - start)
print(json.dumps({"times": times, "stages": stages, "copies": copies, "before": before, "peak": peak,
    "weights": weights, "file": sum(f.stat().st_size for f in files)}))
"""

_NEW = """
import sys
from ibnorm_export import IBNormSpec, models
from ibnorm_export.models.registry import preset
spec = IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)
models.save(models.new_model(sys.argv[1], spec), sys.argv[3])
config = preset(sys.argv[1])[1]
config |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
models.save(models.new_model(config, spec), sys.argv[2])
"""

#: LLaMA-7B with random weights, a shard for each block. argv: its config.json without sizes, checkpoint.
_NEW_SHARDS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

config, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
blocks, index, generator = config["num_hidden_layers"], {}, torch.Generator().manual_seed(0)
folder.mkdir(parents=True)

def random(*shape, mean=0.0):
    return (mean + 0.02 * torch.randn(*shape, generator=generator)).to(torch.bfloat16)

def write(number, tensors):
    name = f"model-{number:05}-of-{blocks + 1:05}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    index.update(dict.fromkeys(tensors, name))

for block in range(blocks):
    place = f"model.layers.{block}."
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = {f"{place}{name}_layernorm.weight": random(hidden, mean=1.0) for name in ("input", "post_attention")}
    write(block + 1, {f"{place}{name}.weight": random(*shape) for name, shape in shapes.items()} | norms)
ends = {name: random(words, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
write(blocks + 1, ends | {"model.norm.weight": random(hidden, mean=1.0)})
(folder / "config.json").write_text(json.dumps(config))
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
"""

#: Presets that are made by `_NEW_SHARDS`: what they have in place of the sizes of llama-60m.
_SHARDED: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
}

#: Peak of the whole process.
_MOST_GIB = {"llama-7b:bf16": 4.0}

#: Seconds beyond the time of one copy of the file.
_MOST_S = {"llama-60m": 5.0, "vit-s16": 5.0, "llama-1b": 20.0}

#: Growth of memory over weights: of a file with external data, and of one file.
_MOST_EXTERNAL, _MOST_ONE_FILE = 0.3, 1.2

_EXTERNAL_ABOVE_BYTES = 2_000_000_000


def add_options(parser: argparse.ArgumentParser) -> None:
    forms = [*_MOST_S, "llama-60m:int8", "llama-60m:int4"]
    parser.add_argument("--presets", nargs="+", default=forms, help="Presets of models (%(default)s).")
    parser.add_argument("--runs", type=int, default=3, help="Exports of a preset of less than 2 GB (%(default)s).")
    parser.add_argument("--checkpoints", type=Path, help="Folder of checkpoints, to make them only once.")


def make_checkpoint(preset: str, tiny: Path, checkpoint: Path, *, blocks: int | None = None) -> None:
    """Write a checkpoint, and one of the same family with small sizes.

    Args:
        preset: name of the model.
        tiny: where the small one is written.
        checkpoint: where the checkpoint is written.
        blocks: number of blocks of a preset that is made in shards; None is the preset's own.
    """
    sizes = _SHARDED.get(preset)
    made = checkpoint if sizes is None else tiny.with_name("llama-60m")
    subprocess.run(
        [sys.executable, "-c", _NEW, preset if sizes is None else "llama-60m", str(tiny), str(made)], check=True
    )
    if sizes is not None:
        config = json.loads((made / "config.json").read_text(encoding="utf-8")) | sizes
        config |= {} if blocks is None else {"num_hidden_layers": blocks}
        subprocess.run([sys.executable, "-c", _NEW_SHARDS, json.dumps(config), str(checkpoint)], check=True)


def _measure(form: str, folder: Path, *, checkpoints: Path, runs: int) -> dict[str, Any]:
    """Export one preset in its own process."""
    preset, _, dtype = form.partition(":")
    tiny, checkpoint = checkpoints / f"tiny-{preset}", checkpoints / preset
    if not checkpoint.exists():
        make_checkpoint(preset, tiny, checkpoint)
    large = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) > _EXTERNAL_ABOVE_BYTES
    command = [sys.executable, "-c", _EXPORT, tiny, checkpoint, folder / "exported", 1 if large else runs]
    command.append(dtype or "fp32")
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def _row(preset: str, measured: dict[str, Any]) -> Row:
    seconds, copy = statistics.median(measured["times"]), statistics.median(measured["copies"])
    weights = measured["weights"]
    external = measured["file"] > _EXTERNAL_ABOVE_BYTES
    figures = {
        "load and export": Figure(seconds, "s"),
        "one copy of the file": Figure(copy, "s"),
        "beyond the copy": Figure(seconds - copy, "s"),
        "over a copy": Figure(seconds / copy),
        "peak over weights": Figure((measured["peak"] - measured["before"]) / weights),
        "process over weights": Figure(measured["peak"] / weights),
        "weights": Figure(weights / 1e9, "GB"),
        "process": Figure(measured["peak"] / 2**30, "GiB"),
    }
    targets = [Target("peak over weights", _MOST_EXTERNAL if external else _MOST_ONE_FILE)]
    if preset in _MOST_GIB:
        targets.append(Target("process", _MOST_GIB[preset]))
    if preset in _MOST_S:
        targets.append(Target("beyond the copy", _MOST_S[preset]))
    details = {"times_s": measured["times"], "stages_s": measured["stages"], "copies_s": measured["copies"]}
    return Row(preset, figures, targets=tuple(targets), details=details)


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export every preset."""
    with tempfile.TemporaryDirectory() as place:
        for preset in options.presets:
            folder = Path(place) / preset
            folder.mkdir()
            checkpoints = folder if options.checkpoints is None else options.checkpoints
            report.add(_row(preset, _measure(preset, folder, checkpoints=checkpoints, runs=options.runs)))
            shutil.rmtree(folder)  # the next preset needs the disk
