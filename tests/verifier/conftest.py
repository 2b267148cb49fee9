"""Models and half-precision files that several tests of the verifier share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from tests.support.shared_exports import SharedExports


@pytest.fixture(scope="session")
def llama(llama_checkpoint: Path) -> LoadedModel:
    return models.load(llama_checkpoint)


@pytest.fixture(scope="session")
def vit(vit_checkpoint: Path) -> LoadedModel:
    return models.load(vit_checkpoint)


@pytest.fixture(scope="session")
def fp16_llama(exports: SharedExports) -> ExportedModel:
    return exports("llama", dtype="fp16")


@pytest.fixture(scope="session")
def bf16_vit(exports: SharedExports) -> ExportedModel:
    return exports("vit", dtype="bf16")
