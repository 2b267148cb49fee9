"""Properties of the kernels that nvcc compiles: no spills, and only 128-bit accesses in row kernels.

The tests compile for one architecture. For all that the package ships:
`python -m benchmarks.run cuda_static --record`.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.suites import cuda_static

ARCHITECTURE = "sm_90"


def _need(name: str) -> None:
    try:
        cuda_static.tool(name)
    except cuda_static.ToolMissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[cuda_static.Kernel]:
    """All kernels for one architecture, with SASS if a disassembler is installed."""
    _need("nvcc")
    try:
        cuda_static.tool("cuobjdump")
        cuda_static.tool("nvdisasm")
        sass = True
    except cuda_static.ToolMissingError:
        sass = False
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        read = pool.map(
            lambda dtype: cuda_static.read_kernels(dtype, ARCHITECTURE, folder, sass=sass), cuda_static.TYPES
        )
        return [kernel for found in read for kernel in found]


def test_every_variant_is_compiled(kernels: list[cuda_static.Kernel]) -> None:
    """Each compression, form and pair of types has 6 or 7 warp kernels, a block kernel and a stream kernel."""
    expected = {"float32": 3 * 2 * (7 + 2), "float16": 2 * 3 * 2 * (6 + 2), "bfloat16": 2 * 3 * 2 * (6 + 2)}
    for dtype, number in expected.items():
        assert sum(k.dtype == dtype for k in kernels) == number


def test_no_kernel_spills(kernels: list[cuda_static.Kernel]) -> None:
    assert [(k.name, k.spill_bytes, k.stack_bytes) for k in kernels if k.spill_bytes or k.stack_bytes] == []


def test_registers_leave_sixteen_warps(kernels: list[cuda_static.Kernel]) -> None:
    """With 128 registers per thread, the 65536 of a multiprocessor hold 16 warps."""
    assert max(k.registers for k in kernels) <= 128


def test_row_kernels_access_128_bits(kernels: list[cuda_static.Kernel]) -> None:
    """In SASS each vector of x, skip, scale and bias is one load, and each vector of y and sum one store."""
    if not any(k.instructions for k in kernels):
        _need("cuobjdump")
        _need("nvdisasm")
    for kernel in kernels:
        if kernel.method == "stream":
            continue
        parameters = 2 * kernel.vectors * (2 if kernel.affine != kernel.dtype else 1)
        assert kernel.access_bits == {
            "load": {128: kernel.vectors * (2 if kernel.skip else 1) + parameters},
            "store": {128: kernel.vectors * (2 if kernel.skip else 1)},
        }, kernel.name


def test_issue_slots_suffice(kernels: list[cuda_static.Kernel]) -> None:
    """At the H200's nominal bandwidth no execution unit limits a row kernel of at least 32 elements per thread."""
    if not any(k.instructions for k in kernels):
        _need("cuobjdump")
        _need("nvdisasm")
    for kernel in kernels:
        if kernel.method != "stream" and kernel.elements >= 32 and kernel.affine == kernel.dtype:
            used = cuda_static.slots_used(kernel, cuda_static.H200)
            assert max(used.values()) < 0.95, (kernel.name, used)


def test_ptx_accesses_are_vectors(tmp_path: Path) -> None:
    """PTX for the oldest architecture shows the same without a disassembler."""
    _need("nvcc")
    ptx = tmp_path / "float16.ptx"
    cuda_static.compile_ptx("float16", "sm_75", ptx)
    bodies = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    assert len(bodies) == 96
    for body in bodies:
        if "stream_kernel" in body.splitlines()[0]:
            continue
        accesses = re.findall(r"\b(?:ld|st)\.global\S*", body)
        assert accesses
        assert all(".v4." in a for a in accesses), body.splitlines()[0]
