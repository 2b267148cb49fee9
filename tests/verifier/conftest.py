"""Models and half-precision files that several tests of the verifier share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.exporter.export import ExportOptions, export


@pytest.fixture(scope="session")
def llama(llama_checkpoint: Path) -> LoadedModel:
    return models.load(llama_checkpoint)


@pytest.fixture(scope="session")
def vit(vit_checkpoint: Path) -> LoadedModel:
    return models.load(vit_checkpoint)


@pytest.fixture(scope="session")
def fp16_llama(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("half")
    return export(models.load(llama_checkpoint), folder / "llama.onnx", options=ExportOptions(dtype=DType.FP16))


@pytest.fixture(scope="session")
def bf16_vit(vit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("half")
    return export(models.load(vit_checkpoint), folder / "vit.onnx", options=ExportOptions(dtype=DType.BF16))
