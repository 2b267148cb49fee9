"""Models that are exported once for all tests of the exporter."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.exporter import single_file
from ibnorm_export.exporter.export import ExportOptions


@pytest.fixture(scope="session", params=["llama", "vit"])
def pair(request: pytest.FixtureRequest) -> tuple[ExportedModel, Path]:
    """The fp32 export and the checkpoint of each family in turn."""
    return request.getfixturevalue(f"exported_{request.param}"), request.getfixturevalue(f"{request.param}_checkpoint")


@pytest.fixture(scope="module")
def built(vit_checkpoint: Path) -> ir.Model:
    """A model in memory, so that tests of writing need not trace it again."""
    return single_file.build(models.load(vit_checkpoint), ExportOptions())


@pytest.fixture
def prebuilt(built: ir.Model, vit_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A checkpoint whose export only has to write the file."""
    monkeypatch.setattr(single_file, "build", lambda *_, **__: built)
    return models.load(vit_checkpoint)
