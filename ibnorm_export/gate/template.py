"""A commented check.toml to start from, for one checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ibnorm_export.artifacts.tensors import default_length
from ibnorm_export.errors import ConfigError
from ibnorm_export.files import new_file
from ibnorm_export.models.loading import load

__all__ = ["write_start"]

_TEXT = """\
# What `ibnorm-export check {file}` does, for {source}:
# {family}, {norms} IBNorm norms, {parameters:.1f} M parameters. Exit status 1 when anything fails.
# An unknown key is an error. Paths are relative to this file.
format = 1
results = "check-results"        # junit.xml, report.json, report.md, report.html and the exported files

[[export]]
name = "{name}"
checkpoint = {checkpoint}
# model = "package.module:factory"   # for code of your own
# task = "text-generation"       # a language model with a cache of keys and values
# file = "{name}.onnx"           # judge this file instead of exporting one
dtype = "fp32"                   # fp32, fp16 or bf16

[export.parity]                  # against PyTorch in float64, by PyTorch's own error: docs/verification.md
backends = ["ort-cpu"]           # or ["present"]: every one that this machine can run
samples = 4                      # drawn inputs; they walk through batch 1, padding, single tokens
exposing = true                  # and heavy tails, large means, constant and near-zero rows, maximum length
layers = true                    # name the first norm or block that leaves its bound
# inputs = ["batch.npz"]         # your own inputs instead
# require_fused = true           # a norm that does not run as a fused kernel fails
# max_error = 1e-5               # a limit of your own beside the bounds

# A budget has one of max_ms, baseline and against. Where the rounds cannot tell, the case says so and does not fail.
[[export.latency]]
against = "torch"                # or "torch.compile", or the name of another export
max_ratio = 2.0
batch = 1
{sequence}rounds = 20
max_rounds = 80

# [[export.latency]]
# max_ms = 50.0

# [[export.latency]]             # made by: ibnorm-export bench MODEL.onnx --save-baseline baseline.json
# baseline = "baseline.json"
# max_ratio = 1.05

[[export]]
name = "{name}-fp16"
checkpoint = {checkpoint}
dtype = "fp16"
"""


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_start(checkpoint: Path, path: Path) -> Path:
    """Write a starting file for `checkpoint`.

    Args:
        checkpoint: a folder that `ibnorm_export.models.load` reads.
        path: the file; its folder exists.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the file exists already, or cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already; name another file, or remove it")
    model = load(checkpoint)
    relative = os.path.relpath(checkpoint.resolve(), path.resolve().parent)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", checkpoint.resolve().name).lstrip(".") or "model"
    text = _TEXT.format(
        file=path.name,
        source=checkpoint.resolve().name,
        family=model.family,
        norms=len(model.norms),
        name=name,
        parameters=sum(p.numel() for p in model.module.parameters()) / 1e6,
        checkpoint=_quoted(relative),
        sequence=f"sequence = {default_length(model.max_positions)}\n" if model.max_positions else "",
    )
    with new_file(path, ConfigError) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
    return path
