"""The CPU kernels through their test-only C ABI, and the paths of the built libraries."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ibnorm_export.op.spec import Compression, IBNormSpec

BUILD = Path(__file__).resolve().parents[3] / "build" / "native"
KINDS = list(Compression)
TYPE_CODES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
SETS = {"generic": 0, "avx2": 1, "avx512": 2}
HOW_TO_BUILD = "run `make native`"
WIDTHS = (1, 2, 3, 7, 15, 16, 17, 41, 111, 199, 760, 768, 1023, 1024, 1500, 4096, 8191, 16384, 65536)
#: Less than a vector, whole vectors, whole vectors and a rest, and rows that do not fit into the kernels' buffers.
FEW_WIDTHS = (7, 768, 1500, 16384)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ibnorm-kernels", default=None, help="library to test instead of the one in build/native")
    parser.addoption("--few-widths", action="store_true", help="test rows of 4 widths instead of 19, for an emulator")


@dataclass(frozen=True)
class Kernels:
    """The kernels by instruction set. Arrays may be views at any element offset."""

    library: ctypes.CDLL
    sets: tuple[str, ...]

    def status(
        self,
        isa: str,
        x: np.ndarray[Any, Any] | None,  # (rows, cols)
        scale: np.ndarray[Any, Any] | None,  # (cols,)
        bias: np.ndarray[Any, Any] | None,  # (cols,)
        spec: IBNormSpec | tuple[int, float, float],
        y: np.ndarray[Any, Any] | None,
        *,
        shape: tuple[int, int],
        dtypes: tuple[int, int],
        skip: np.ndarray[Any, Any] | None = None,
        total: np.ndarray[Any, Any] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> int:
        kind, lambd, epsilon = (
            (KINDS.index(spec.compression), spec.lambd, spec.epsilon) if isinstance(spec, IBNormSpec) else spec
        )
        begin, end = rows or (0, shape[0])
        pointers = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (x, skip, scale, bias, y, total)]
        return int(
            self.library.ibnorm_test_run(
                SETS.get(isa, -1),
                *pointers,
                *map(ctypes.c_int64, shape),
                *dtypes,
                kind,
                ctypes.c_float(lambd),
                ctypes.c_float(epsilon),
                ctypes.c_int64(begin),
                ctypes.c_int64(end),
            )
        )

    def run(
        self,
        isa: str,
        x: np.ndarray[Any, Any],
        scale: np.ndarray[Any, Any],
        bias: np.ndarray[Any, Any],
        spec: IBNormSpec,
        *,
        skip: np.ndarray[Any, Any] | None = None,
        total: np.ndarray[Any, Any] | None = None,
        y: np.ndarray[Any, Any] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> np.ndarray[Any, Any]:
        out = np.full_like(x, 7) if y is None else y
        status = self.status(
            isa,
            x,
            scale,
            bias,
            spec,
            out,
            shape=(x.shape[0], x.shape[1]),
            dtypes=(TYPE_CODES[x.dtype], TYPE_CODES[scale.dtype]),
            skip=skip,
            total=total,
            rows=rows,
        )
        assert status == 0, f"status {status}"
        return out


@pytest.fixture(scope="session")
def widths(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """Lengths of the rows that tests normalise."""
    return FEW_WIDTHS if request.config.getoption("--few-widths", default=False) else WIDTHS


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    given = request.config.getoption("--ibnorm-kernels", default=None)
    path = Path(given) if given else BUILD / "libibnorm_kernels_test.so"
    if not path.is_file():
        pytest.skip(f"{path.name} is not built: {HOW_TO_BUILD}")
    library = ctypes.CDLL(str(path))
    library.ibnorm_test_instruction_set.restype = ctypes.c_char_p
    yield Kernels(library, tuple(name for name, code in SETS.items() if library.ibnorm_test_has(code)))


@pytest.fixture(scope="session")
def ort_library() -> Path:
    """The library in build/native, else the installed one."""
    path = BUILD / "libibnorm_ort.so"
    if path.is_file():
        return path
    from ibnorm_export.op import native

    found = native.availability()
    if not found.available or found.path is None:
        pytest.skip(f"libibnorm_ort.so is not built: {HOW_TO_BUILD}")
    return found.path
