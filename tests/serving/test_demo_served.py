"""The demo's ViT and LLaMA, trained for 25 steps and served from their checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openai
import pytest
import sklearn.datasets
import torch

from ibnorm_export import models
from ibnorm_export.cli.demo_app.train import train_checkpoint
from ibnorm_export.exporter.export import export
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import open_checkpoint
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions
from ibnorm_export.serving.triton.repository import package
from tests.support.running_server import running
from tests.support.triton_clients import CLIENTS, ask, connect

PROMPT = "The import statement"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that `ibnorm-export demo` trains: vit and llama."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("vit", "llama"):
        before, *_, after = train_checkpoint(name, folder / name, max_steps=25)
        assert after.loss < before.loss
    return folder


def shipped(demo: Path, name: str) -> Path:
    exported = export(models.load(demo / name), demo / f"{name}.onnx")
    return package(exported, demo / f"{name}-repository", options=PackageOptions(variant=PackagedNorms.BOTH)).path


def answers_of(server: Any, name: str, arrays: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """The answers that both clients get from both variants."""

    def one(module: ModuleType, variant: str) -> np.ndarray[Any, Any]:
        with connect(server, module) as client:
            return ask(client, module, variant, arrays)

    return [one(module, variant) for module in CLIENTS for variant in (name, f"{name}-portable")]


def test_vit_reads_digits(demo: Path) -> None:
    images, _ = sklearn.datasets.load_digits(return_X_y=True)
    pixels = ((images[:8].reshape(-1, 1, 8, 8) - 4.9) / 6.0).astype(np.float32)  # as the demo trains on them
    with torch.no_grad():
        expected = models.load(demo / "vit").module(pixel_values=torch.from_numpy(pixels)).logits.numpy()
    assert len(set(expected.argmax(1))) > 1
    with running(shipped(demo, "vit")) as server:
        for answer in answers_of(server, "vit", {"pixel_values": pixels}):
            np.testing.assert_array_equal(answer.argmax(1), expected.argmax(1))


def test_llama_predicts_bytes(demo: Path) -> None:
    ids = np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int64)[None]
    with torch.no_grad():
        expected = models.load(demo / "llama").module(input_ids=torch.from_numpy(ids)).logits.numpy()
    with running(shipped(demo, "llama")) as server:
        for answer in answers_of(server, "llama", {"input_ids": ids, "attention_mask": np.ones_like(ids)}):
            np.testing.assert_array_equal(answer.argmax(-1), expected.argmax(-1))


def test_llama_writes(demo: Path) -> None:
    """The openai client gets the text that PyTorch generates."""
    sampling = Sampling(32, 0.7, top_p=0.9, seed=1)
    wanted = open_checkpoint(models.load(demo / "llama", task="text-generation")).generate(PROMPT, sampling).text
    export_genai(models.load(demo / "llama", task="text-generation"), demo / "text")
    with running(demo / "text") as server:
        client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0)
        given: dict[str, Any] = {
            "model": "text",
            "prompt": PROMPT,
            "max_tokens": 32,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 1,
        }
        assert client.completions.create(**given).choices[0].text == wanted
        parts = client.completions.create(**given, stream=True)
        assert "".join(part.choices[0].text for part in parts) == wanted
