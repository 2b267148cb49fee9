"""The plugin library on the emulated kernels, and the mock of TensorRT, built once per checkout and source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

import trt_plugin  # noqa: E402 - behind the path that finds it
from trt_plugin import cuda_emulator  # noqa: E402 - as above


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
