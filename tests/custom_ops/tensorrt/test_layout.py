"""What the libraries export and need: those with emulated kernels, and those that CMake builds with nvcc."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support import trt_plugin

BUILT = trt_plugin.ROOT / "build" / "native-cuda"
NOT_BUILT = f"{BUILT.name} is not built: run `make native-cuda`, which needs nvcc and TensorRT's headers"
EXPORTED = {
    "libibnorm_trt.so": {"getCreators", "setLoggerFinder", "ibnorm_schema"},
    "libibnorm_trt_register.so": {"ibnorm_registered"},
}
NEEDED = {"libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}
#: Left open by the compiler's start-up code in every shared library.
WEAK = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_pure_virtual"}


def symbols(library: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def foreign(library: Path) -> set[str]:
    """Undefined symbols of a library, without those of the C library."""
    return {name for name in symbols(library, "--undefined-only") if "@GLIBC" not in name} - WEAK


def needed(library: Path) -> set[str]:
    done = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    return {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", done.stdout)}


def test_symbols_with_emulated_kernels(plugin_library: Path) -> None:
    assert symbols(plugin_library, "--defined-only") == EXPORTED["libibnorm_trt.so"]
    # The emulated kernels are a library beside it.
    assert all(name.startswith("_ZN6ibnorm4cuda3run") for name in foreign(plugin_library))
    assert {name for name in needed(plugin_library) if "libemulated-" not in name} <= NEEDED


@pytest.mark.parametrize("name", EXPORTED)
def test_symbols_of_a_cmake_build(name: str) -> None:
    """It has no undefined TensorRT or CUDA symbol: cudart is linked statically, and finds the driver at run time."""
    library = BUILT / name
    if not library.is_file():
        pytest.skip(NOT_BUILT)
    assert symbols(library, "--defined-only") == EXPORTED[name]
    assert not foreign(library)
    assert needed(library) <= NEEDED
    assert "libc" in needed(library)


def test_the_built_plugin_loads_without_a_driver(harness: Path) -> None:
    library = BUILT / "libibnorm_trt.so"
    if not library.is_file():
        pytest.skip(NOT_BUILT)
    assert len(trt_plugin.describe(harness, library)) == 6
