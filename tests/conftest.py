"""Shared small models: made once a session, saved as checkpoints, exported in fp32."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.export import export

# A shell that runs the suite in the background has it ignore Ctrl-C, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 10,
}


def save_checkpoint(folder: Path, config: dict[str, Any], spec: IBNormSpec, seed: int | None = None) -> Path:
    """Random weights, none of them zero: a zero bias would hide that it was dropped."""
    if seed is not None:
        torch.manual_seed(seed)
    model = models.new_model(config, spec)
    for index, (_, parameter) in enumerate(model.named_parameters()):
        values = (parameter.detach().flatten() * 0).float()
        values += 0.1 + 0.05 * ((values.new_tensor(range(len(values))) + index) * 0.7).sin()
        if parameter.dim() == 1:
            parameter.data += values
    models.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "llama", LLAMA, IBNormSpec("L", 4.0, 1e-5, bias=False)
    )


@pytest.fixture(scope="session")
def vit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "vit", VIT, IBNormSpec("T", 3.0, 1e-5))


@pytest.fixture(scope="session", params=["llama", "vit"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each family in turn."""
    found: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    return found


@pytest.fixture(scope="session")
def exported_llama(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export(models.load(llama_checkpoint), tmp_path_factory.mktemp("exported") / "llama.onnx")


@pytest.fixture(scope="session")
def exported_vit(vit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export(models.load(vit_checkpoint), tmp_path_factory.mktemp("exported") / "vit.onnx")
