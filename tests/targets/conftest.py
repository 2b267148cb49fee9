"""The packages that run exports in Node."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """The folder whose node_modules has what tests/node/package.json names."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed (Debian: apt-get install nodejs npm)")
    folder = Path(__file__).resolve().parents[2] / "build" / "node"
    if not (folder / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("transformers.js is not installed (make test-targets)")
    return folder
