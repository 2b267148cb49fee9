"""Architectures as folders for transformers.js: what it is asked to compute, and what a stranger's module computes.

Used by the tests in Node, for a few of them, and by `benchmarks.suites.transformers_js`, for all.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ibnorm_export import ExportOptions, IBNormSpec, Task, export, load
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from tests.support.architectures import ARCHITECTURES, CAUSAL, ENCODERS, save_theirs
from tests.support.checkpoints import save_checkpoint

__all__ = ["NAMES", "PIPELINES", "export_for_web", "in_node", "job_of", "relative_error"]

#: All that are not refused.
NAMES = (*(name for name in ARCHITECTURES if name != "falcon"), "resnet")

#: The pipeline of each encoder, by its head.
PIPELINES = {
    "bert": "feature-extraction",
    "roberta": "fill-mask",
    "distilbert": "text-classification",
    "electra": "question-answering",
    "modernbert": "token-classification",
}
SCRIPT = Path(__file__).resolve().parents[1] / "targets" / "transformers.cjs"
NEW_TOKENS = 12
_PROMPT, _MASKED, _QUESTION = "The import", "The im@ort", ("what is it", "It is a thing")
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_labels": 10,
    "layer_type": "basic",
}
_MEAN, _STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.25])


def export_for_web(name: str, folder: Path) -> nn.Module:
    """Export an architecture to `folder` / name, and return the stranger's module in float64."""
    checkpoint = folder / "checkpoints" / name
    text = name in CAUSAL or name in ENCODERS
    if name == "resnet":  # the stranger's norm is for the last axis; this package's own module is the truth here
        theirs = load(save_checkpoint(checkpoint, _RESNET, IBNormSpec("L", 4.0, epsilon=1e-5), seed=1)).truth()
    else:
        theirs = save_theirs(name, "L", checkpoint, **({"vocab_size": 256} if text else {}))
    if text:
        write_byte_tokenizer(checkpoint)
        file = checkpoint / "tokenizer_config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text(encoding="utf-8")), "mask_token": "@"}), encoding="utf-8"
        )
    else:
        preprocessor = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": True}
        preprocessor |= {"image_mean": _MEAN.tolist(), "image_std": _STD.tolist()}
        (checkpoint / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    model = load(checkpoint, task=Task.TEXT_GENERATION if name in CAUSAL else Task.FORWARD)
    export(model, folder / name, target="transformers.js", options=[ExportOptions()])
    return theirs


def _pixels(name: str) -> NDArray[np.int64]:
    size = 224 if name == "resnet" else ARCHITECTURES[name].config["image_size"]  # ResNet's config.json states none
    return np.random.default_rng(0).integers(0, 256, (size, size, 3))


def job_of(name: str, folder: Path) -> dict[str, Any]:
    """What transformers.js is asked: see transformers.cjs."""
    job: dict[str, Any] = {"folder": str(folder / name), "dtype": "fp32"}
    if name in CAUSAL:
        return job | {"prompt": _PROMPT, "tokens": NEW_TOKENS}
    if name in ENCODERS:
        pipeline = PIPELINES[name]
        return job | {"pipeline": pipeline, "text": _QUESTION if pipeline == "question-answering" else _MASKED}
    pixels = _pixels(name)
    return job | {"pixels": pixels.ravel().tolist(), "size": len(pixels)}


def in_node(modules: Path, jobs: Sequence[Mapping[str, Any]], *, file: Path) -> list[dict[str, Any]]:
    """Run jobs in transformers.js; `file` is written with them."""
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(["node", SCRIPT, modules, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def _distance(found: Any, truth: NDArray[Any]) -> float:
    values = np.asarray(found, dtype=np.float64)
    assert values.size == truth.size, (values.shape, truth.shape)
    return float(np.linalg.norm(values.ravel() - truth.ravel()) / np.linalg.norm(truth))


def relative_error(name: str, theirs: nn.Module, found: Mapping[str, Any]) -> float:
    """The relative error of what transformers.js computed; infinite if it chose another token, class or answer."""
    with torch.no_grad():
        if name in CAUSAL:
            return _text_error(theirs, found)
        if name in ENCODERS:
            return _encoder_error(name, theirs, found)
        values = (_pixels(name) / 255 - _MEAN) / _STD
        logits = theirs(pixel_values=torch.from_numpy(values.transpose(2, 0, 1)[None])).logits[0].numpy()
    same = found["classes"][0]["label"] == f"LABEL_{logits.argmax()}"
    return _distance(found["logits"], logits) if same else float("inf")


def _text_error(theirs: nn.Module, found: Mapping[str, Any]) -> float:
    ids = list(_PROMPT.encode())
    logits = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    for _ in range(NEW_TOKENS):
        ids.append(int(theirs(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return _distance(found["logits"], logits) if found["ids"] == ids else float("inf")


def _encoder_error(name: str, theirs: nn.Module, found: Mapping[str, Any]) -> float:
    """Of the features, of the logits of an answer, or of the scores that a pipeline returns."""
    output = theirs(input_ids=torch.tensor([found["ids"]]))
    match PIPELINES[name]:
        case "feature-extraction":
            return _distance(found["features"], output.last_hidden_state[0].numpy())
        case "question-answering":
            truth = torch.cat([output.start_logits[0], output.end_logits[0]])
            return _distance([*found["start"], *found["end"]], truth.numpy())
        case "fill-mask":
            truth = output.logits[0, _MASKED.index("@")].softmax(-1)
            return _distance(
                [f["score"] for f in found["result"]], truth[[f["token"] for f in found["result"]]].numpy()
            )
        case "text-classification":
            truth = output.logits[0].softmax(-1)
            places = [int(f["label"].removeprefix("LABEL_")) for f in found["result"]]
            return _distance([f["score"] for f in found["result"]], truth[places].numpy())
        case "token-classification":
            best = output.logits[0].softmax(-1).max(-1)
            labels = [int(f["entity"].removeprefix("LABEL_")) for f in found["result"]]
            same = labels == best.indices.tolist()
            return _distance([f["score"] for f in found["result"]], best.values.numpy()) if same else float("inf")
    raise AssertionError(PIPELINES[name])
