"""The kernels, built for the emulator once per checkout and source.

The options exist only if this folder, or a file in it, is on the command line.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import cuda_emulator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-cuda-sweep", action="store_true", help="run the sweep over every combination of parameters"
    )
    parser.addoption("--all-mutants", action="store_true", help="plant every bug, not only the default ones")
    parser.addoption("--kernels", type=Path, help="another custom_ops folder; its library is in its folder `built`")


def _option(config: pytest.Config, name: str) -> object:
    return config.getoption(name, default=None)


@pytest.fixture(scope="session")
def emulator(request: pytest.FixtureRequest) -> cuda_emulator.Emulator:
    """The kernels of this checkout, compiled by g++."""
    cxx = cuda_emulator.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler: install g++ 12 or newer")
    probe = subprocess.run(
        [cxx, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"], input="_Float16 x;", text=True, capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip(f"{cxx} has no _Float16 in C++: the emulator needs GCC 12 or Clang 15")
    other = _option(request.config, "--kernels")
    if isinstance(other, Path) and other != cuda_emulator.ROOT / "custom_ops":
        (library,) = (other / "built").glob("*.so")
        return cuda_emulator.Emulator(library)
    # The full sweep traps on every kind of undefined behaviour, which doubles the time to compile.
    extra = ("-fsanitize=undefined",) if _option(request.config, "--full-cuda-sweep") else ()
    return cuda_emulator.Emulator(cuda_emulator.build(cuda_emulator.CACHE, extra=extra))
