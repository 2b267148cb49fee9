"""The parts of the GPU benchmark that need no GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suites import cuda_static
from tests.support.cuda_emulator import ROOT

torch = pytest.importorskip("torch")
HAS_GPU = torch.cuda.is_available()


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_reports_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "op_cuda", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("op_cuda: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_library_loads_and_a_refused_launch_is_a_status(tmp_path: Path) -> None:
    """Without a device a legal call fails to launch, and an illegal one is an invalid argument.

    The kernels are those of `make native-cuda` where they are built: compiling them takes 50 s of one core.
    """
    try:
        cuda_static.tool("nvcc")
    except cuda_static.ToolMissingError as missing:
        pytest.skip(str(missing))
    from benchmarks.suites import op_cuda

    built = ROOT / "build" / "native-cuda" / "CMakeFiles" / "ibnorm_cuda.dir" / "kernels" / "cuda"
    library = op_cuda.load_kernels("sm_90", tmp_path, kernels=tuple(sorted(built.glob("*.o"))))
    for cols in (1024, 1023, 8192):
        for compression in range(3):
            pointers = (ctypes.c_void_p * 6)(4096, None, 4096, 4096, 4096, None)
            assert library.op_cuda_run(pointers, 2, cols, 1, 1, compression, 4.0, 1e-5, None) == 2
            assert library.op_cuda_run(pointers, 0, cols, 1, 1, compression, 4.0, 1e-5, None) == 0
            assert library.op_cuda_run(pointers, 2, cols, 1, 1, compression, 0.0, 1e-5, None) == 1


def test_byte_formula() -> None:
    from benchmarks.suites import op_cuda

    assert op_cuda.bytes_per_element("bfloat16", skip=False) == 4
    assert op_cuda.bytes_per_element("float16", skip=True) == 8
    assert op_cuda.bytes_per_element("float32", skip=False) == 8
