"""The CPU kernels on processors that this machine does not have: arm64 and older x86-64, under qemu's user emulation.

The kernels are those that CMake compiles for a release. They are compared with the float64 reference through a pipe.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibnorm_export.op import reference
from ibnorm_export.op.spec import Compression, IBNormSpec
from tests.custom_ops.ort.conftest import SETS, TYPE_CODES
from tests.custom_ops.ort.test_kernels import PAIR_IDS, PAIRS, REGIMES, check, make
from tests.support.cross_kernels import ROOT, cross_kernels


@dataclass(frozen=True)
class Processor:
    """A processor: its compiler, its emulator, and the kernels that it runs."""

    compiler: str
    emulator: tuple[str, ...]
    kernels: Callable[[], Path]
    sets: tuple[str, ...] = ("generic",)


def native_kernels() -> Path:
    """The kernels of build/native: those for AVX2 and AVX-512 are in it too, and must not run."""
    kernels = ROOT / "build" / "native" / "libibnorm_cpu.a"
    if not kernels.is_file():
        pytest.skip("the native library is not built (make native)")
    return kernels


PROCESSORS = {
    "arm64": Processor("aarch64-linux-gnu-g++", ("qemu-aarch64",), lambda: cross_kernels("aarch64")),
    "x86-64 without AVX": Processor("g++", ("qemu-x86_64", "-cpu", "Nehalem"), native_kernels),
}


@dataclass(frozen=True)
class Emulated:
    """A running program of kernels."""

    process: subprocess.Popen[bytes]
    sets: tuple[str, ...]

    def run(
        self,
        isa: str,
        x: np.ndarray[Any, Any],  # (rows, cols)
        scale: np.ndarray[Any, Any],  # (cols,)
        bias: np.ndarray[Any, Any],
        spec: IBNormSpec,
        *,
        skip: np.ndarray[Any, Any] | None = None,
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """y, and the sum of x and skip if there is a skip."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        kind = list(Compression).index(spec.compression)
        codes = SETS[isa], TYPE_CODES[x.dtype], TYPE_CODES[scale.dtype], kind, int(skip is not None), *x.shape
        self.process.stdin.write(struct.pack("<7i2f", *codes, spec.lambd, spec.epsilon))
        for array in (x, skip, scale, bias):
            if array is not None:
                self.process.stdin.write(array.tobytes())
        self.process.stdin.flush()
        answer = self.process.stdout.read(4)
        assert answer == bytes(4), f"status {answer!r}"
        outputs = [
            np.frombuffer(self.process.stdout.read(x.nbytes), x.dtype).reshape(x.shape)
            for _ in range(1 if skip is None else 2)
        ]
        return outputs[0], outputs[1] if skip is not None else None


def compiled(processor: Processor, folder: Path) -> Path:
    """A static program of the kernels for a processor."""
    program, sources = folder / "kernels", ROOT / "custom_ops"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{sources}/include", f"-I{sources}/kernels/cpu"]
    linked = [sources / "testing/kernels_pipe.cc", processor.kernels()]
    subprocess.run([processor.compiler, *flags, "-static", *linked, "-o", program], check=True)
    return program


@pytest.fixture(scope="module", params=list(PROCESSORS))
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    processor = PROCESSORS[request.param]
    for tool in (processor.compiler, processor.emulator[0]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = compiled(processor, tmp_path_factory.mktemp("emulated"))
    command = [*processor.emulator, str(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Emulated(process, processor.sets)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_accuracy(emulated: Emulated, dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression) -> None:
    for lambd, epsilon, std, mean, tolerance in REGIMES:
        spec = IBNormSpec(kind, lambd, epsilon=epsilon)
        for cols in (1, 2, 7, 17, 63, 111, 768, 1500, 8193):
            x, scale, bias = make(-(-4096 // cols), cols, dtype, affine, std, mean)
            exact = reference.ibnorm(x, scale, bias=bias, spec=spec)
            for isa in emulated.sets:
                y, _ = emulated.run(isa, x, scale, bias, spec)
                check(y, exact, scale, bias, tolerance, f"{isa} D={cols} {spec} std {std:g} mean {mean:g}")


@pytest.mark.parametrize("kind", list(Compression), ids=str)
@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_skip(emulated: Emulated, dtype: np.dtype[Any], affine: np.dtype[Any], kind: Compression) -> None:
    """The sum is rounded as NumPy rounds it, subnormal and huge values included, and y is the norm of the sum."""
    spec = IBNormSpec(kind)
    for cols in (1, 17, 768):
        x, scale, bias = make(9, cols, dtype, affine)
        skip = make(10, cols, dtype, affine, 3.0)[0][:9]
        x[0], skip[0] = np.finfo(np.float16).smallest_subnormal, 0
        x[1, :1] = 6e4
        for isa in emulated.sets:
            y, total = emulated.run(isa, x, scale, bias, spec, skip=skip)
            assert total is not None
            np.testing.assert_array_equal(total, (x.astype(np.float32) + skip.astype(np.float32)).astype(dtype))
            np.testing.assert_array_equal(y, emulated.run(isa, total, scale, bias, spec)[0])


@pytest.mark.parametrize(("dtype", "affine"), PAIRS, ids=PAIR_IDS)
def test_nan_and_infinity_stay_in_their_row(emulated: Emulated, dtype: np.dtype[Any], affine: np.dtype[Any]) -> None:
    for kind in Compression:
        x, scale, bias = make(5, 33, dtype, affine)
        x[1, 4], x[3, 32] = np.nan, np.inf
        for isa in emulated.sets:
            y, _ = emulated.run(isa, x, scale, bias, IBNormSpec(kind))
            found = np.isnan(y.astype(float))
            assert found[[1, 3]].all()
            assert not found[[0, 2, 4]].any()
