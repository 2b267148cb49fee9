"""The plugin library with emulated kernels, and the mock of TensorRT, built once for each version of the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import cuda_emulator, trt_plugin


@pytest.fixture(scope="session")
def trt_headers() -> Path:
    found = trt_plugin.headers()
    if found is None:
        pytest.skip("TensorRT's headers are not here: run `python scripts/fetch_headers.py`")
    if cuda_emulator.compiler() is None:
        pytest.skip("no C++ compiler: install g++ 12 or newer")
    return found


@pytest.fixture(scope="session")
def plugin_library(trt_headers: Path) -> Path:
    return trt_plugin.build_plugin(trt_headers)


@pytest.fixture(scope="session")
def harness(trt_headers: Path) -> Path:
    return trt_plugin.build_harness(trt_headers)
