"""Tiny models as folders for transformers.js, exported once, and the packages that run them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ibnorm_export import IBNormSpec, LoadedModel, export, load
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from tests.support.checkpoints import GPT2, LLAMA, VIT, save_checkpoint

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


@dataclass(frozen=True)
class WebModel:
    """A model and the folder that was exported from it, with every type of weights."""

    model: LoadedModel
    folder: Path


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the exported folders."""
    return tmp_path_factory.mktemp("web")


def _text(web: Path, checkpoint: Path, config: dict[str, Any]) -> WebModel:
    spec = IBNormSpec("L", 4.0, epsilon=1e-5, bias=config is GPT2)
    write_byte_tokenizer(save_checkpoint(checkpoint, config, spec, seed=1))
    model = load(checkpoint, task="text-generation")
    folder = web / config["model_type"]
    export(model, folder, target="transformers.js")
    return WebModel(model, folder)


@pytest.fixture(scope="session")
def web_llama(web: Path, tmp_path_factory: pytest.TempPathFactory) -> WebModel:
    return _text(web, tmp_path_factory.mktemp("checkpoints") / "llama", LLAMA)


@pytest.fixture(scope="session")
def web_gpt2(web: Path, tmp_path_factory: pytest.TempPathFactory) -> WebModel:
    return _text(web, tmp_path_factory.mktemp("checkpoints") / "gpt2", GPT2)


@pytest.fixture(scope="session")
def web_vit(web: Path, tmp_path_factory: pytest.TempPathFactory) -> WebModel:
    checkpoint = tmp_path_factory.mktemp("checkpoints") / "vit"
    save_checkpoint(checkpoint, VIT, IBNormSpec("T", 3.0, epsilon=1e-5), seed=1)
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    model = load(checkpoint)
    export(model, web / "vit", target="transformers.js")
    return WebModel(model, web / "vit")


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """The folder whose node_modules has what tests/node/package.json names."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed (Debian: apt-get install nodejs npm)")
    folder = Path(__file__).resolve().parents[2] / "build" / "node"
    if not (folder / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("transformers.js is not installed (make test-targets)")
    return folder
