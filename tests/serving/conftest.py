"""Small models in fp32 and fp16, each with a server that the command starts and a signal stops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.serving.triton.config import TritonLimits
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions
from ibnorm_export.serving.triton.repository import package
from tests.support.checkpoints import LLAMA, save_checkpoint
from tests.support.running_server import Running, running
from tests.support.shared_exports import SharedExports

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('no booms') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GenAI folder with random weights. Its text is noise, but the same noise on every machine."""
    place = tmp_path_factory.mktemp("text")
    config = {
        **LLAMA,
        "hidden_size": 64,
        "max_position_embeddings": 512,
    }  # GenAI's attention needs heads whose size is a multiple of 16
    checkpoint = save_checkpoint(place / "checkpoint", config, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False))
    write_byte_tokenizer(checkpoint)
    made = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**made, "chat_template": TEMPLATE}))
    export_genai(models.load(checkpoint, task="text-generation"), place / "noise")
    return place / "noise"


@pytest.fixture(scope="session")
def exported(exports: SharedExports) -> dict[str, ExportedModel]:
    """Exported models by name and type, e.g. "llama-fp16"."""
    return {
        f"{name}-{dtype.value}": exports(name, dtype=dtype)
        for name in ("llama", "vit")
        for dtype in (DType.FP32, DType.FP16)
    }


@pytest.fixture(scope="session", params=["llama-fp32", "llama-fp16", "vit-fp32", "vit-fp16"])
def served(
    request: pytest.FixtureRequest, exported: dict[str, ExportedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ExportedModel, str, Running]]:
    """A model, its name, and a server with both variants, NAME and NAME-portable, without batching."""
    model = exported[request.param]
    folder = tmp_path_factory.mktemp("served") / "repository"
    options = PackageOptions(name=request.param, variant=PackagedNorms.BOTH, limits=TritonLimits(max_batch=0))
    with running(package(model, folder, options=options).path) as server:
        yield model, request.param, server
