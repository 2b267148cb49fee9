"""Small models in both types, and a server on each repository: started by the command, stopped by a signal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import Running, running

from ibnorm_export import models
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.export import ExportOptions, export
from ibnorm_export.loaded import DType
from ibnorm_export.serving.repository import PackageOptions, Variant, package
from ibnorm_export.serving.triton_config import Limits


@pytest.fixture(scope="session")
def exported(
    exported_llama: ExportedModel, exported_vit: ExportedModel, llama_checkpoint: Path, vit_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, ExportedModel]:  # fmt: skip
    """By name and type, as "llama-fp16"."""
    folder = tmp_path_factory.mktemp("halves")
    half = ExportOptions(dtype=DType.FP16)
    return {
        "llama-fp32": exported_llama,
        "vit-fp32": exported_vit,
        "llama-fp16": export(models.load(llama_checkpoint), folder / "llama.onnx", half),
        "vit-fp16": export(models.load(vit_checkpoint), folder / "vit.onnx", half),
    }


@pytest.fixture(scope="session", params=["llama-fp32", "llama-fp16", "vit-fp32", "vit-fp16"])
def served(
    request: pytest.FixtureRequest, exported: dict[str, ExportedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ExportedModel, str, Running]]:
    """A model, its name, and a server that has it in both variants, NAME and NAME-portable, without batching."""
    model = exported[request.param]
    folder = tmp_path_factory.mktemp("served") / "repository"
    options = PackageOptions(name=request.param, variant=Variant.BOTH, limits=Limits(max_batch=0))
    with running(package(model, folder, options).path) as server:
        yield model, request.param, server
