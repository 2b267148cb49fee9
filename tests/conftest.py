"""Small models that tests share: made once in a session, saved as checkpoints, and exported in fp32."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.exporter.export import export
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint

# Commands that tests start find bytecode, also where the environment asks for none: compiling torch and transformers
# takes ten seconds of each. Python compares a file's time and size, or its hash after `make setup`, before it uses any.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell makes a suite in the background ignore Ctrl-C, and the commands that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "llama", LLAMA, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)
    )


@pytest.fixture(scope="session")
def vit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "vit", VIT, IBNormSpec("T", 3.0, epsilon=1e-5))


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
