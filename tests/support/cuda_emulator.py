"""Builds the CUDA kernels for the emulator with g++ and calls them with NumPy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ibnorm_export.op.spec import Compression, IBNormSpec

__all__ = [
    "CACHE",
    "DTYPES",
    "MUTANT_FLAGS",
    "ROOT",
    "Accuracy",
    "EmulationError",
    "Emulator",
    "Plan",
    "build",
    "compiler",
    "guarded",
    "judge",
    "norm_error",
    "outside_one_ulp",
]

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests" / "custom_ops" / "cuda" / "emulator"
#: The builds of this checkout's kernels.
CACHE = ROOT / ".cache" / "cuda-emulator"
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
#: Tolerance of the relative error in the norm of a float32 tensor of at least 4096 elements, by the mean of a row in
#: standard deviations.
FLOAT32_TOLERANCE = {0.0: 5e-7, 10.0: 1e-5}
#: Least fraction of float16 and bfloat16 elements that equal the rounded float64 result. It does not apply to fewer
#: than four columns: there all rows give nearly the same few values, and one of them near the middle of two
#: representable numbers makes up thousands of elements.
EQUAL_SHARE = 0.99
#: Elements of a tensor at least, for the two figures above.
ELEMENTS = 4096

_TYPES = list(DTYPES)
_COMPRESSIONS = list(Compression)
_STATUS = ("ok", "invalid argument", "launch failed", "unsupported")
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
#: A misaligned 16-byte access faults on a GPU; here it traps.
_TRAPS = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
#: Quick to compile; a planted bug may leave something unused.
MUTANT_FLAGS = ("-O0", "-w")


class EmulationError(RuntimeError):
    """A kernel misused a barrier or shuffle, or refused its arguments."""


def compiler() -> str | None:
    """The C++ compiler, or None. The float16 kernels need _Float16 (GCC 12, Clang 15)."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@dataclass(frozen=True, slots=True)
class _Compiler:
    """A compiler's call for one custom_ops folder, and a digest of it and of all headers."""

    command: tuple[str, ...]
    link: tuple[str, ...]
    digest: bytes

    @classmethod
    def of(cls, sources: Path, extra: tuple[str, ...]) -> _Compiler:
        cxx = compiler()
        if cxx is None:
            raise RuntimeError("no C++ compiler: install g++ 12 or set CXX")
        kernels = sources / "kernels" / "cuda"
        headers = [*sorted((sources / "include" / "ibnorm").glob("*.h")), *sorted(kernels.glob("*.*h"))]
        headers += sorted(HARNESS.glob("*.h"))
        machine = ("-mfma", "-mf16c") if platform.machine() == "x86_64" else ()
        flags = (*_FLAGS, *_TRAPS, *machine, *extra, "-Wno-unknown-pragmas", "-DIBNORM_EMULATED_INSTRUCTIONS")
        digest = hashlib.sha256("\0".join((cxx, *flags)).encode())
        for header in headers:
            digest.update(header.name.encode() + b"\0" + header.read_bytes())
        includes = (f"-I{HARNESS}", f"-I{sources / 'include'}", f"-I{kernels}")
        return cls((cxx, *flags, *includes), (cxx, "-shared", *machine, *extra), digest.digest())

    def compile(self, source: Path, folder: Path) -> Path:
        """The object of a source, which is compiled unless `folder` holds it already."""
        digest = hashlib.sha256(self.digest + source.read_bytes()).hexdigest()
        made = folder / f"{source.stem}-{digest[:20]}.o"
        if not made.exists():
            new = made.with_suffix(f".{os.getpid()}.new")
            command = [*self.command, "-c", "-x", "c++", str(source), "-o", str(new)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-4000:]}")
            new.rename(made)
        return made


def build(
    folder: Path,
    sources: Path = ROOT / "custom_ops",
    extra: tuple[str, ...] = (),
    *,
    types: tuple[str, ...] = tuple(DTYPES),
) -> Path:
    """Compile the kernels of a custom_ops folder for the emulator, unless `folder` already holds the same build.

    Args:
        folder: holds objects and libraries, whose names contain a digest of their sources.
        sources: custom_ops, or a copy of it with a planted bug.
        extra: further compiler flags, e.g. for a sanitizer.
        types: data types whose kernels come from `sources`; those of the others come from this checkout.

    Returns:
        The shared library.

    Raises:
        RuntimeError: it does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    made, unchanged = _Compiler.of(sources, extra), _Compiler.of(ROOT / "custom_ops", ())
    kernels, others = sources / "kernels" / "cuda", [name for name in DTYPES if name not in types]
    with ThreadPoolExecutor(2) as pool:
        # Of functions that several objects hold, the linker takes the first: those of `sources`.
        own = [*(kernels / f"{name}.cu" for name in (*types, "run")), HARNESS / "emulator.cpp"]
        objects = [*pool.map(lambda source: made.compile(source, folder), own)]
        rest = [ROOT / "custom_ops" / "kernels" / "cuda" / f"{name}.cu" for name in others]
        objects += pool.map(lambda source: unchanged.compile(source, CACHE), rest)
    name = hashlib.sha256("\0".join(o.name for o in objects).encode()).hexdigest()[:20]
    library = folder / f"libemulated-{name}.so"
    if not library.exists():
        new = library.with_suffix(f".{os.getpid()}.new")
        subprocess.run([*made.link, *map(str, objects), "-o", str(new)], check=True, capture_output=True)
        new.rename(library)
    return library


@dataclass(frozen=True, slots=True)
class Plan:
    """Which kernel runs a problem."""

    method: str
    vectors: int
    threads: int
    rows_per_block: int


class Emulator:
    """The kernels of one library, on fibres.

    Args:
        library: what `build` returned.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._library.emulator_run.argtypes = [
            *[pointer] * 6,
            *[wide] * 2,
            *[integer] * 3,
            *[ctypes.c_float] * 2,
            ctypes.c_uint64,
            integer,
        ]
        self._library.emulator_failure.restype = ctypes.c_char_p
        self._library.emulator_plan.argtypes = [wide, integer, integer, pointer]
        self._library.emulator_compress.argtypes = [pointer, pointer, wide, integer, integer, integer]
        self._library.guarded_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t, integer]
        self._library.guarded_allocate.restype = pointer
        self._library.guarded_free.argtypes = [pointer, ctypes.c_size_t, ctypes.c_size_t, integer]

    def plan(self, cols: int, dtype: str, aligned: bool = True) -> Plan:
        """The kernel for rows of `cols` elements."""
        out = (ctypes.c_int * 4)()
        self._library.emulator_plan(cols, _TYPES.index(dtype), int(aligned), out)
        return Plan(("warp", "block", "stream")[out[0]], out[1], out[2], out[3])

    def compress(self, t: NDArray[np.float32], compression: Compression, half: bool, injection: int = 1) -> Any:
        """g(t) in the unit of the float32 or of the half kernels, as float32."""
        g = np.empty_like(t)
        self._library.emulator_compress(
            t.ctypes.data, g.ctypes.data, t.size, _COMPRESSIONS.index(compression), int(half), injection
        )
        return g

    def raw_run(
        self,
        pointers: tuple[int | None, int | None, int | None, int | None, int | None, int | None],
        rows: int,
        cols: int,
        types: tuple[int, int],
        compression: int,
        lambd: float,
        epsilon: float,
        seed: int = 1,
        injection: int = 0,
    ) -> int:
        """Run the kernels on the addresses of x, skip, scale, bias, y and sum, and return their Status.

        Raises:
            EmulationError: a barrier or shuffle was misused.
        """
        status = self._library.emulator_run(*pointers, rows, cols, *types, compression, lambd, epsilon, seed, injection)
        if status < 0:
            raise EmulationError(self._library.emulator_failure().decode())
        return int(status)

    def run(
        self,
        x: NDArray[Any],  # (rows, cols)
        scale: NDArray[Any],  # (cols,)
        bias: NDArray[Any],  # (cols,)
        spec: IBNormSpec,
        *,
        skip: NDArray[Any] | None = None,  # (rows, cols)
        y: NDArray[Any] | None = None,  # (rows, cols)
        total: NDArray[Any] | None = None,  # (rows, cols)
        seed: int = 1,
        injection: int = 1,
    ) -> NDArray[Any]:  # (rows, cols)
        """Normalise `x` into `y`, which may be x or skip, or into a new array, and return it.

        Args:
            total: receives the rounded sum, if it is given; may be x or skip.
            seed: of the scheduler.
            injection: error of the approximate instructions: 0 none, 1 random within the bounds of
                the PTX ISA, 2 always the bound.

        Raises:
            EmulationError: a barrier or shuffle was misused, or the problem refused.
        """
        if y is None:
            y = np.full_like(x, np.nan)
        names = {value: name for name, value in DTYPES.items()}
        status = self.raw_run(
            (_address(x), _address(skip), _address(scale), _address(bias), _address(y), _address(total)),
            x.shape[0],
            x.shape[1],
            (_TYPES.index(names[x.dtype]), _TYPES.index(names[scale.dtype])),
            _COMPRESSIONS.index(spec.compression),
            spec.lambd,
            spec.epsilon,
            seed,
            injection,
        )
        if status != 0:
            raise EmulationError(_STATUS[status])
        return y

    @contextmanager
    def guarded(
        self, shape: tuple[int, ...], dtype: DTypeLike, offset: int = 0, at_end: bool = True
    ) -> Iterator[NDArray[Any]]:
        """An array of NaN between two pages that must not be accessed.

        Args:
            offset: bytes between the first page's end and the array, unless at_end.
            at_end: the array ends where the second page begins; its alignment follows from its size.
        """
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        address = self._library.guarded_allocate(size, offset, int(at_end))
        data = (ctypes.c_uint8 * size).from_address(address)
        try:
            yield np.ctypeslib.as_array(data).view(kind).reshape(shape)
        finally:
            self._library.guarded_free(address, size, offset, int(at_end))


def _address(array: NDArray[Any] | None) -> int | None:
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("the kernels take contiguous rows")
    return int(array.ctypes.data)


@contextmanager
def guarded(emulator: Emulator, like: NDArray[Any], offset: int = 0, at_end: bool = True) -> Iterator[NDArray[Any]]:
    """A copy of `like` between two inaccessible pages."""
    with emulator.guarded(like.shape, like.dtype, offset, at_end) as array:
        array[...] = like
        yield array


def norm_error(y: NDArray[Any], expected: NDArray[np.float64]) -> float:
    """Relative error in the norm of the whole tensor."""
    reference = float(np.linalg.norm(expected))
    return float(np.linalg.norm(y.astype(np.float64) - expected)) / (reference if reference > 0 else 1.0)


def outside_one_ulp(
    y: NDArray[Any], expected: NDArray[np.float64], scale: NDArray[Any], bias: NDArray[Any]
) -> tuple[float, float]:
    """(largest error in ulp, fraction equal) against the float64 result rounded to y's type.

    An ulp is taken at max(|y|, 2^-8 (|scale| + |bias|)): below that, cancellation of scale and bias decides.
    """
    rounded = expected.astype(y.dtype).astype(np.float64)
    size = np.abs(scale.astype(np.float64)) + np.abs(bias.astype(np.float64))
    at = np.maximum(np.abs(rounded), size * 2.0**-8)
    fraction, least = (10, -14) if y.dtype == np.float16 else (7, -126)
    exponent = np.maximum(np.floor(np.log2(np.maximum(at, 2.0**-140))), least)
    error = np.abs(y.astype(np.float64) - rounded)
    error /= 2.0 ** (exponent - fraction)
    return float(error.max()), float((y.astype(np.float64) == rounded).mean())


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy against the float64 reference. True when it is within the tolerances of the operator's definition.

    Args:
        error: relative, in the norm of the whole tensor.
        ulp: largest error of a half type; 0 for float32.
        equal: fraction of elements equal to the reference rounded to a half type; 1 for float32.
        problem: the tolerance that is exceeded; empty when none is.
    """

    error: float
    ulp: float = 0.0
    equal: float = 1.0
    problem: str = ""

    def __bool__(self) -> bool:
        return not self.problem


def judge(
    y: NDArray[Any],  # (rows, cols)
    expected: NDArray[np.float64],  # (rows, cols)
    scale: NDArray[Any],  # (cols,)
    bias: NDArray[Any],  # (cols,)
    mean: float,
) -> Accuracy:
    """Compare `y` with the exact result.

    Args:
        mean: of the rows that it was made from, in standard deviations: a key of `FLOAT32_TOLERANCE`.
    """
    if not np.isfinite(y.astype(np.float64)).all():
        return Accuracy(np.inf, problem="not finite")
    error = norm_error(y, expected)
    if y.dtype == np.float32:
        tolerance = FLOAT32_TOLERANCE[mean]
        problem = "" if error <= tolerance else f"relative error {error:.2e}, tolerance {tolerance:.0e}"
        return Accuracy(error, problem=problem)
    ulp, equal = outside_one_ulp(y, expected, scale, bias)
    problem = "" if ulp <= 1.0 else f"{ulp:.2f} ulp, tolerance 1"
    if not problem and equal < EQUAL_SHARE and y.size >= ELEMENTS and y.shape[-1] >= 4:
        problem = f"{equal:.4f} of the elements are equal, fewer than {EQUAL_SHARE}"
    return Accuracy(error, ulp, equal, problem)
