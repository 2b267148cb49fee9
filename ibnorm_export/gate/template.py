"""A commented check.toml for one checkpoint, to start from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.artifacts.tensors import default_length
from ibnorm_export.errors import ConfigError
from ibnorm_export.evaluation.options import TaskName
from ibnorm_export.files import new_file
from ibnorm_export.models.loading import load

__all__ = ["write_template"]

_EXAMPLE_WEIGHTS = '# weights = "ema"                # or "raw", if the checkpoint has a moving average too'

_TEXT = """\
# What `ibnorm-export check {file}` does, for {source}:
# {family}, {norms} IBNorm norms, {parameters:.1f} M parameters. The exit code is 1 when anything fails.
# An unknown key is an error. Paths are relative to this file.
format = 1
results = "check-results"        # folder for junit.xml, report.json, report.md, report.html and the exported files

[[export]]
name = "{name}"
checkpoint = {checkpoint}
# model = "package.module:factory"   # for a model of your own code
{weights}
# task = "text-generation"       # for a language model with a cache
# file = "{name}.onnx"           # check this file instead of exporting one
dtype = "fp32"                   # fp32, fp16 or bf16

[export.parity]                  # tolerances: docs/concepts/verdict.md
backends = ["ort-cpu"]           # or ["present"]: every backend that this machine can run
samples = 4                      # random inputs, among them batch 1, padding and single tokens
stress = true                    # add heavy tails, large means, constant and near-zero rows, maximum length
# coverage = "fast"              # leave out the longest sequence, a large batch and large values
layers = true                    # name the first norm or block beyond its tolerance
# inputs = ["batch.npz"]         # your own inputs instead
# require_fused = true           # fail if a norm does not run as a fused kernel
# max_error = 1e-5               # a limit in addition to the tolerances

# A budget has one of max_ms, baseline and against. If the rounds do not decide, the outcome is "cannot tell",
# which is not a failure.
[[export.latency]]
against = "torch"                # or "torch.compile", another backend, or another export
max_ratio = 2.0
batch = 1
{sequence}rounds = 20
max_rounds = 80

# [[export.evaluate]]            # does the file still do its task? docs/how-to/evaluate.md
# task = "{task}"
# data = "validation"            # texts or labelled images on this machine; nothing is downloaded
# max_drop = 0.005               # of accuracy as a share, of perplexity as a relative increase

# [[export.latency]]
# max_ms = 50.0

# [[export.latency]]             # from: ibnorm-export bench MODEL.onnx --save-baseline baseline.json
# baseline = "baseline.json"
# max_ratio = 1.05

[[export]]
name = "{name}-fp16"
checkpoint = {checkpoint}
{weights_again}dtype = "fp16"
"""


def _quoted(text: str) -> str:
    """The text as a basic string of TOML."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_template(checkpoint: Path, path: Path, *, weights: Weights | None = None) -> Path:
    """Write a check.toml for `checkpoint`.

    Args:
        checkpoint: a folder that `ibnorm_export.load` reads.
        path: the file to write, in an existing folder.
        weights: raw or EMA weights, where the checkpoint has both.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the file already exists, or cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} already exists; name another file, or remove it")
    if checkpoint.is_file():
        raise ConfigError(
            f"{checkpoint} is a file of weights, and a template is for a checkpoint folder; for a model of your "
            f'own code, write {path} with [[export]], name = "{checkpoint.stem}", checkpoint = "{checkpoint}" and '
            'model = "package.module:factory"'
        )
    model = load(checkpoint, weights=weights)
    relative = os.path.relpath(checkpoint.resolve(), path.resolve().parent)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", checkpoint.resolve().name).lstrip(".") or "model"
    text = _TEXT.format(
        file=path.name,
        source=checkpoint.resolve().name,
        family=model.family,
        norms=len(model.norms),
        name=name,
        weights=f'weights = "{weights}"' if weights else _EXAMPLE_WEIGHTS,
        weights_again=f'weights = "{weights}"\n' if weights else "",
        parameters=sum(p.numel() for p in model.module.parameters()) / 1e6,
        checkpoint=_quoted(relative),
        task=TaskName.PERPLEXITY if model.max_positions else TaskName.CLASSIFICATION,
        sequence=f"sequence = {default_length(model.max_positions)}\n" if model.max_positions else "",
    )
    with new_file(path, ConfigError) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
    return path
