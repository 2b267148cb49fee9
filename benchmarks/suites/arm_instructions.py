"""Instructions of the CPU kernels for each element on arm64, over the same source without what NEON adds.

There is no arm64 machine, and an emulator gives no time, so qemu counts the instructions of the whole program for two
numbers of rows. What the program takes to read and write the tensors is counted by the same requests with a lambda that
the kernels refuse. "Plain C++" is the source as it is for a machine without intrinsics: vectors of four floats in the
compiler's own form, two of them at a time, and conversions of half types by integer arithmetic. "Scalar C++" is a loop
over the elements with the functions of the C library.

Limit: the plain form has vectors of four floats too, so only what it says in several instructions can become fewer:
conversions, multiply-adds, signs, maxima. IBNorm-S in float32 takes 79 instructions for 16 values. About 24 of them are
loads and stores, and 35 are additions and multiply-adds that a machine with vectors of this width must do.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from ibnorm_export.op.spec import Compression

SOURCES = Path(__file__).resolve().parents[2] / "custom_ops"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
COLUMNS = 768
ROWS = (4, 12)
TYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))  # in the order of their codes
MOST_OVER_PLAIN = 0.4

#: As `ibnorm::cpu::generic::run`, for float32 without a skip.
_SCALAR = """
#include <cmath>
#include "ibnorm/problem.h"
#include "variants.h"
namespace ibnorm::cpu::generic {
void run(const Problem& p, std::int64_t begin, std::int64_t end) noexcept {
  const auto *x = static_cast<const float*>(p.x), *scale = static_cast<const float*>(p.scale);
  const auto *bias = static_cast<const float*>(p.bias);
  auto* y = static_cast<float*>(p.y);
  for (std::int64_t r = begin; r < end; ++r) {
    const float* row = x + r * p.cols;
    float* out = y + r * p.cols;
    double mean = 0, c_mean = 0, square = 0;
    for (std::int64_t i = 0; i < p.cols; ++i) mean += row[i];
    mean /= static_cast<double>(p.cols);
    for (std::int64_t i = 0; i < p.cols; ++i) {
      const float t = (row[i] - static_cast<float>(mean)) / p.lambd;
      float c = t;
      if (p.compression == Compression::kLogarithmic) c = std::copysign(std::log1p(std::fabs(t)), t);
      if (p.compression == Compression::kTanh) c = std::tanh(t);
      out[i] = c;
      c_mean += c;
      square += c * c;
    }
    c_mean /= static_cast<double>(p.cols);
    const double variance = square / static_cast<double>(p.cols) - c_mean * c_mean;
    const float inverse = static_cast<float>(1 / std::sqrt(variance + static_cast<double>(p.epsilon)));
    for (std::int64_t i = 0; i < p.cols; ++i)
      out[i] = scale[i] * ((out[i] - static_cast<float>(c_mean)) * inverse) + bias[i];
  }
}
}  // namespace ibnorm::cpu::generic
"""


def _program(folder: Path, name: str, source: Path, *flags: str) -> Path:
    """A static program that runs the kernels of `source` on what it reads."""
    common = [COMPILER, "-std=c++17", "-O2", "-DNDEBUG", f"-I{SOURCES}/include", f"-I{SOURCES}/kernels/cpu"]
    kernels, program = folder / f"{name}.o", folder / name
    options = ["-ffp-contract=off", "-Wno-maybe-uninitialized", "-DIBNORM_ISA=generic", *flags]
    subprocess.run([*common, *options, "-c", source, "-o", kernels], check=True)
    others = [SOURCES / "kernels/cpu/dispatch.cc", SOURCES / "testing/kernels_pipe.cc"]
    subprocess.run([*common, "-static", *others, kernels, "-o", program], check=True)
    return program


def _count(program: Path, kind: Compression, dtype: np.dtype[np.generic], *, rows: int, lambd: float) -> int:
    """The instructions of a program that normalises `rows` rows once."""
    x = np.random.default_rng(0).standard_normal((rows, COLUMNS)).astype(dtype)
    affine = np.ones(COLUMNS, dtype)
    code = TYPES.index(dtype)
    request = struct.pack("<7i2f", 0, code, code, list(Compression).index(kind), 0, rows, COLUMNS, lambd, 1e-5)
    # With one instruction in each block, every line of the trace is an instruction.
    command = [EMULATOR, "-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout", str(program)]
    data = request + x.tobytes() + 2 * affine.tobytes()
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout.count(b"Trace ")


def _for_each_element(program: Path, kind: Compression, dtype: np.dtype[np.generic]) -> float:
    counts = {(rows, lambd): _count(program, kind, dtype, rows=rows, lambd=lambd) for rows in ROWS for lambd in (0, 4)}
    kernels = [counts[rows, 4] - counts[rows, 0] for rows in ROWS]
    return (kernels[1] - kernels[0]) / ((ROWS[1] - ROWS[0]) * COLUMNS)


def add_options(parser: argparse.ArgumentParser) -> None:
    del parser


def measure(options: argparse.Namespace, report: Report) -> None:
    """Compile and count."""
    del options
    if not all(map(shutil.which, (COMPILER, EMULATOR))):
        raise Unavailable(f"{COMPILER} or {EMULATOR} is missing (Debian: g++-aarch64-linux-gnu, qemu-user)")
    with tempfile.TemporaryDirectory() as place:
        folder, kernels = Path(place), SOURCES / "kernels/cpu/row_kernels.cc"
        (folder / "scalar.cc").write_text(_SCALAR, encoding="ascii")
        neon = _program(folder, "neon", kernels)
        plain = _program(folder, "plain", kernels, "-U__aarch64__", "-U__ARM_NEON")
        scalar = _program(folder, "scalar", folder / "scalar.cc")
        for dtype in TYPES:
            for kind in Compression:
                ours, before = (_for_each_element(program, kind, dtype) for program in (neon, plain))
                figures = {"over plain C++": Figure(ours / before), "NEON": Figure(ours), "plain C++": Figure(before)}
                if dtype == TYPES[0]:
                    figures["scalar C++"] = Figure(_for_each_element(scalar, kind, dtype))
                target = Target("over plain C++", MOST_OVER_PLAIN)
                report.add(Row(f"IBNorm{kind} {dtype}, instructions for each element", figures, targets=(target,)))
