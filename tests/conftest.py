"""Small models that tests share: made once in a session, saved as checkpoints, and exported."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from onnxscript._framework_apis import torch_2_9

from ibnorm_export import IBNormSpec
from ibnorm_export.artifacts.exported_model import ExportedModel
from tests.processors.run import PROCESSORS
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint
from tests.support.shared_exports import SharedExports, once

# Commands that tests start find bytecode, also where the environment asks for none: compiling torch and transformers
# takes ten seconds of each. Python compares a file's time and size, or its hash after `make setup`, before it uses any.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell makes a suite in the background ignore Ctrl-C, and the commands that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A tenth of the suite's time would go into searching for cycles: torch and its exporter create millions of objects. The
# command line does the same.
gc.set_threshold(50_000)

# PyTorch's exporter parses the source of its 500 translations again for every export, which takes 0.4 s. They are the
# same each time; an onnxscript that has no such function is as quick as it is.
with contextlib.suppress(AttributeError):
    torch_2_9.get_torchlib_ops = functools.cache(torch_2_9.get_torchlib_ops)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared-folder",
        type=Path,
        help="folder for the checkpoints and exports that tests share; a second run with the same folder makes none",
    )
    parser.addoption(
        "--processor",
        choices=PROCESSORS,
        help="newest instruction set that libraries must see, else the run ends (python -m tests.processors.run)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """In every process of a run, workers included."""
    processor: str | None = config.getoption("--processor")
    difference = processor and PROCESSORS[processor].difference()
    if difference:
        raise pytest.UsageError(f"--processor={processor}: {difference}")


@pytest.fixture(scope="session")
def shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test run have in common."""
    given: Path | None = request.config.getoption("--shared-folder")
    if given is not None:
        return given.absolute()
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared"


@pytest.fixture(scope="session")
def llama_checkpoint(shared_folder: Path) -> Path:
    spec = IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)
    return once(shared_folder / "checkpoints" / "llama", lambda folder: save_checkpoint(folder, LLAMA, spec))


@pytest.fixture(scope="session")
def vit_checkpoint(shared_folder: Path) -> Path:
    spec = IBNormSpec("T", 3.0, epsilon=1e-5)
    return once(shared_folder / "checkpoints" / "vit", lambda folder: save_checkpoint(folder, VIT, spec))


@pytest.fixture(scope="session")
def exports(shared_folder: Path, llama_checkpoint: Path, vit_checkpoint: Path) -> SharedExports:
    """`exports("llama", dtype="fp16")` is an export of the shared checkpoint, made once."""
    return SharedExports(shared_folder / "exports", {"llama": llama_checkpoint, "vit": vit_checkpoint})


@pytest.fixture(scope="session", params=["llama", "vit"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each family in turn."""
    found: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    return found


@pytest.fixture(scope="session")
def exported_llama(exports: SharedExports) -> ExportedModel:
    return exports("llama")


@pytest.fixture(scope="session")
def exported_vit(exports: SharedExports) -> ExportedModel:
    return exports("vit")
