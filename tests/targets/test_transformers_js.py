"""Folders for transformers.js, loaded in Node: the same text and class as in Python, for each type of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from tokenizers import Tokenizer

from ibnorm_export import ExportedModel, LoadedModel, verify
from tests.support.web_architectures import export_for_web, job_of, relative_error
from tests.support.web_architectures import in_node as run_jobs
from tests.targets.conftest import PREPROCESSOR, WebModel
from tests.targets.greedy import continued, in_onnxruntime, in_pytorch

FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx"}
PROMPT = "The import"
IDS = list(PROMPT.encode())
NEW_TOKENS = 12
PIXELS = [int(v) for v in np.random.default_rng(0).integers(0, 256, 64)]

#: Relative error in fp32: roundings of 2**-24 in sums of up to 64 terms, through two layers that amplify them little.
FP32 = 2e-6
#: In fp16 every value is rounded to 2**-11 of itself; two layers add up about ten of these.
FP16 = 5e-3


@dataclass(frozen=True)
class Case:
    """A model, its folder, and what transformers.js computes with each type of weights."""

    model: LoadedModel
    folder: Path
    results: dict[str, dict[str, Any]]


def in_node(modules: Path, web: WebModel, job: dict[str, Any], *, dtypes: list[str]) -> Case:
    """Run a job in Node for each type of weights."""
    listed = [{"folder": str(web.folder), "dtype": dtype, **job} for dtype in dtypes]
    results = run_jobs(modules, listed, file=web.folder.parent / "jobs.json")
    return Case(web.model, web.folder, dict(zip(dtypes, results, strict=True)))


def error(found: list[float], truth: NDArray[Any]) -> float:
    assert len(found) == truth.size
    return float(np.linalg.norm(np.array(found) - truth.ravel()) / np.linalg.norm(truth))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def text(request: pytest.FixtureRequest, node_folder: Path) -> Case:
    web: WebModel = request.getfixturevalue(f"web_{request.param}")
    return in_node(node_folder, web, {"prompt": PROMPT, "tokens": NEW_TOKENS}, dtypes=list(FILES))


def test_the_same_text_as_pytorch(text: Case) -> None:
    found = text.results["fp32"]
    logits = in_pytorch(text.model)
    assert found["ids"] == continued(logits, IDS, tokens=NEW_TOKENS)
    assert error(found["logits"], logits(IDS)) <= FP32
    decode = Tokenizer.from_file(str(text.folder / "tokenizer.json")).decode
    assert found["text"] == decode(found["ids"])


@pytest.mark.parametrize("dtype", FILES)
def test_the_same_text_as_onnxruntime(text: Case, dtype: str) -> None:
    """Of the same file: rounding can change the tokens of weights in fp16, int8 and int4, but not between runtimes."""
    found = text.results[dtype]
    logits = in_onnxruntime(text.folder / "onnx" / FILES[dtype])
    assert found["ids"] == continued(logits, IDS, tokens=NEW_TOKENS)
    assert found["type"] == "float32"
    assert error(found["logits"], logits(IDS).astype(np.float64)) <= 2 * FP32


def test_other_architectures_compute_the_same(node_folder: Path, tmp_path: Path) -> None:
    """`python -m benchmarks.run transformers_js` runs all of them."""
    names = ("gemma", "phi3", "roberta", "swin")
    modules = {name: export_for_web(name, tmp_path) for name in names}
    found = run_jobs(node_folder, [job_of(name, tmp_path) for name in names], file=tmp_path / "jobs.json")
    for (name, module), result in zip(modules.items(), found, strict=True):
        assert relative_error(name, module, result) <= FP32, (name, result)


def test_half_precision_is_near(text: Case) -> None:
    assert error(text.results["fp16"]["logits"], in_pytorch(text.model)(IDS)) <= FP16


def test_the_folder_passes_verification(text: Case) -> None:
    report = verify(text.folder, text.model)
    assert report.passed, report
    assert ExportedModel(text.folder).metadata.target == "transformers.js"
    assert not any("next to the file" in note for note in report.static.notes)


@pytest.fixture(scope="module")
def image(node_folder: Path, web_vit: WebModel) -> Case:
    return in_node(node_folder, web_vit, {"pixels": PIXELS, "size": 8}, dtypes=["fp32", "fp16"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_same_class_as_pytorch(image: Case, dtype: str) -> None:
    found = image.results[dtype]
    values = (np.array(PIXELS, dtype=np.float64).reshape(1, 1, 8, 8) * PREPROCESSOR["rescale_factor"] - 4.9) / 6.0
    assert error(found["inputs"], values) <= FP32
    with torch.no_grad():
        truth = image.model.truth()(pixel_values=torch.from_numpy(values)).logits[0].numpy()
    assert error(found["logits"], truth) <= (FP32 if dtype == "fp32" else FP16)
    assert found["type"] == "float32"
    best = found["classes"][0]
    assert best["label"] == f"LABEL_{truth.argmax()}"
    assert best["score"] == pytest.approx(softmax(truth).max(), abs=1e-2 if dtype == "fp16" else 1e-5)
