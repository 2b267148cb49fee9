"""Folders for transformers.js, loaded in Node: the same text and class as in Python, for each type of weights."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from tokenizers import Tokenizer

from ibnorm_export import ExportedModel, IBNormSpec, LoadedModel, export, load, verify
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint

SCRIPT = Path(__file__).with_name("transformers.cjs")
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx"}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PROMPT = "The import"
NEW_TOKENS = 12

#: How images of the demo become inputs: one channel, white on black, 0 to 16.
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": False,
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_rescale": True,
    "rescale_factor": 16 / 255,
    "do_normalize": True,
    "image_mean": [4.9],
    "image_std": [6.0],
}

#: Relative error in fp32: roundings of 2**-24 in sums of up to 64 terms, through two layers that amplify them little.
FP32 = 2e-6
#: In fp16 every value is rounded to 2**-11 of itself; two layers add up about ten of these.
FP16 = 5e-3


@dataclass(frozen=True)
class Case:
    """A model, its folder, and what transformers.js computed with each type of weights."""

    model: LoadedModel
    folder: Path
    results: dict[str, dict[str, Any]]


def in_node(modules: Path, folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What transformers.js computes with a folder, by type of weights."""
    file = folder.parent / "jobs.json"
    listed = [{"folder": str(folder), "dtype": dtype, **job} for dtype, job in jobs.items()]
    file.write_text(json.dumps(listed), encoding="utf-8")
    done = subprocess.run(["node", SCRIPT, modules, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


def error(found: list[float], truth: NDArray[Any]) -> float:
    assert len(found) == truth.size
    return float(np.linalg.norm(np.array(found) - truth.ravel()) / np.linalg.norm(truth))


@pytest.fixture(scope="module", params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def text(request: pytest.FixtureRequest, node_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("text")
    spec = IBNormSpec("L", 4.0, epsilon=1e-5, bias=request.param is GPT2)
    write_byte_tokenizer(save_checkpoint(root / "checkpoint", request.param, spec, seed=1))
    model = load(root / "checkpoint", task="text-generation")
    export(model, root / "web", target="transformers.js")
    job = {"prompt": PROMPT, "tokens": NEW_TOKENS}
    return Case(model, root / "web", in_node(node_folder, root / "web", dict.fromkeys(FILES, job)))


def greedy(logits: Any, ids: list[int]) -> list[int]:
    """Continue `ids` with the most probable token, without a cache; `logits` takes all tokens and returns all rows."""
    for _ in range(NEW_TOKENS):
        ids = [*ids, int(np.asarray(logits(ids))[-1].argmax())]
    return ids


def in_pytorch(model: LoadedModel) -> Any:
    truth = model.truth()

    def logits(ids: list[int]) -> NDArray[np.float64]:
        with torch.no_grad():
            result: NDArray[np.float64] = truth(input_ids=torch.tensor([ids])).logits[0].numpy()
        return result

    return logits


def in_onnxruntime(file: Path) -> Any:
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtypes[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past")
    }

    def logits(ids: list[int]) -> NDArray[np.float32]:
        tokens, n = np.array([ids]), len(ids)
        feeds = {"input_ids": tokens, "attention_mask": np.ones((1, n), np.int64), "position_ids": np.arange(n)[None]}
        result: NDArray[np.float32] = session.run(["logits"], feeds | past)[0][0]
        return result

    return logits


def test_the_same_text_as_pytorch(text: Case) -> None:
    found = text.results["fp32"]
    logits = in_pytorch(text.model)
    ids = list(PROMPT.encode())
    assert found["ids"] == greedy(logits, ids)
    assert error(found["logits"], logits(ids)) <= FP32
    decode = Tokenizer.from_file(str(text.folder / "tokenizer.json")).decode
    assert found["text"] == decode(found["ids"])


@pytest.mark.parametrize("dtype", FILES)
def test_the_same_text_as_onnxruntime(text: Case, dtype: str) -> None:
    """Of the same file: rounding can change the tokens of weights in fp16, int8 and int4, but not between runtimes."""
    found = text.results[dtype]
    logits = in_onnxruntime(text.folder / "onnx" / FILES[dtype])
    ids = list(PROMPT.encode())
    assert found["ids"] == greedy(logits, ids)
    assert found["type"] == "float32"
    assert error(found["logits"], logits(ids).astype(np.float64)) <= 2 * FP32


def test_half_precision_is_near(text: Case) -> None:
    assert error(text.results["fp16"]["logits"], in_pytorch(text.model)(list(PROMPT.encode()))) <= FP16


PIXELS = [int(v) for v in np.random.default_rng(0).integers(0, 256, 64)]


@pytest.fixture(scope="module")
def image(node_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("image")
    config = VIT | {"id2label": {str(digit): f"digit {digit}" for digit in range(10)}}
    save_checkpoint(root / "checkpoint", config, IBNormSpec("T", 3.0, epsilon=1e-5), seed=1)
    (root / "checkpoint" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    model = load(root / "checkpoint")
    export(model, root / "web", target="transformers.js")
    job = {"pixels": PIXELS, "size": 8}
    return Case(model, root / "web", in_node(node_folder, root / "web", dict.fromkeys(["fp32", "fp16"], job)))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_same_class_as_pytorch(image: Case, dtype: str) -> None:
    found = image.results[dtype]
    pixels = np.array(PIXELS, dtype=np.float64).reshape(1, 1, 8, 8)
    values = (pixels * PREPROCESSOR["rescale_factor"] - 4.9) / 6.0
    assert error(found["inputs"], values) <= FP32
    with torch.no_grad():
        truth = image.model.truth()(pixel_values=torch.from_numpy(values)).logits[0].numpy()
    assert error(found["logits"], truth) <= (FP32 if dtype == "fp32" else FP16)
    assert found["type"] == "float32"
    best = found["classes"][0]
    assert best["label"] == f"digit {truth.argmax()}"
    assert best["score"] == pytest.approx(softmax(truth).max(), abs=1e-2 if dtype == "fp16" else 1e-5)


def test_the_folder_passes_verification(text: Case) -> None:
    report = verify(text.folder, text.model)
    assert report.passed, report
    assert ExportedModel(text.folder).metadata.target == "transformers.js"
    assert not any("next to the file" in note for note in report.static.notes)
