"""Planted kernel bugs, each with the test that must catch it.

python -m pytest tests/custom_ops/cuda/test_mutants.py --all-mutants
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cuda_emulator import DTYPES, MUTANT_FLAGS, ROOT, Emulator, build

KERNELS = "kernels/cuda"


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: `new` in place of every `old` in one file.

    Args:
        caught_by: file::test, with parameters if one case is enough.
        default: whether the bug is part of the default suite; --all-mutants plants all.
    """

    name: str
    file: str
    old: str
    new: str
    caught_by: str
    default: bool = False


_SWEEP = "test_emulated_kernels.py"
MUTANTS = (
    Mutant(
        "no barrier in a block's sum",
        f"{KERNELS}/reduce.cuh",
        "  __syncthreads();\n",
        "",
        f"{_SWEEP}::test_no_schedule_changes_a_bit[float32-8192]",
        default=True,
    ),
    Mutant(
        "one buffer for all three sums",
        f"{KERNELS}/row_kernels.cuh",
        "partial[pass]",
        "partial[0]",
        f"{_SWEEP}::test_no_schedule_changes_a_bit[float16-8192]",
    ),
    Mutant(
        "shuffle mask of half a warp",
        f"{KERNELS}/reduce.cuh",
        "0xffffffffU",
        "0x0000ffffU",
        f"{_SWEEP}::test_rows[float32-768-2]",
        default=True,
    ),
    Mutant(
        "butterfly without its last step",
        f"{KERNELS}/reduce.cuh",
        "offset > 0",
        "offset > 1",
        f"{_SWEEP}::test_sweep[float32-S-768]",
    ),
    Mutant(
        "block sum of whole warps only up to the second last",
        f"{KERNELS}/reduce.cuh",
        "lane < warps ?",
        "lane < warps - 1 ?",
        f"{_SWEEP}::test_sweep[float16-S-4096]",
    ),
    Mutant(
        "tail of the row not guarded",
        f"{KERNELS}/row_kernels.cuh",
        "return v < kVectors - kGuarded || lane + v * kWarpSize < vectors;",
        "return v < kVectors || vectors < 0;",
        f"{_SWEEP}::test_touches_nothing_outside[float32-plain-264]",
        default=True,
    ),
    Mutant(
        "one vector too few is guarded",
        f"{KERNELS}/row_kernels.cuh",
        "return v < kVectors - kGuarded ||",
        "return v < kVectors - kGuarded + 1 ||",
        f"{_SWEEP}::test_sweep[float16-L-264]",
    ),
    Mutant(
        "a row past the last",
        f"{KERNELS}/row_kernels.cuh",
        "row >= arguments.rows",
        "row > arguments.rows",
        f"{_SWEEP}::test_rows[float32-768-1]",
    ),
    Mutant(
        "warps of a block take too little of the row",
        f"{KERNELS}/launch.cuh",
        "(problem.cols / kElementsOf<kType> + warps - 1) / warps",
        "(problem.cols / kElementsOf<kType>) / warps",
        f"{_SWEEP}::test_sweep[float16-S-2056]",
    ),
    Mutant(
        "mean of c dropped",
        f"{KERNELS}/row_kernels.cuh",
        "        value[v][e] -= mean;\n",
        "",
        f"{_SWEEP}::test_sweep[float32-L-768]",
        default=True,
    ),
    Mutant(
        "row statistics of the sum before rounding",
        f"{KERNELS}/row_kernels.cuh",
        "    unpack(raw[v], value[v], T{});\n",
        """    unpack(raw[v], value[v], T{});
    if (kSkip && inside(v)) {
      float left[kElements];
      float right[kElements];
      unpack(x[v * kWarpSize], left, T{});
      unpack((static_cast<const uint4*>(arguments.skip) + first)[v * kWarpSize], right, T{});
      for (int e = 0; e < kElements; ++e) value[v][e] = left[e] + right[e];
    }
""",
        f"{_SWEEP}::test_sweep[bfloat16-L-768]",
        default=True,
    ),
    Mutant(
        "streamed statistics of the sum before rounding",
        f"{KERNELS}/row_kernels.cuh",
        "return Compress::of(fmaf(stored ? to_float(sum[i]) : rounded(i), factor, offset.rounded), offset.rest);",
        """float v = stored ? to_float(sum[i]) : rounded(i);
    if constexpr (kSkip) {
      if (arguments.y != arguments.x && !stored) v = to_float(x[i]) + to_float(skip[i]);
    }
    return Compress::of(fmaf(v, factor, offset.rounded), offset.rest);""",
        f"{_SWEEP}::test_sweep[bfloat16-L-1023]",
    ),
    Mutant(
        "streamed sum read from inputs that it has overwritten",
        f"{KERNELS}/row_kernels.cuh",
        "stored ? to_float(sum[i]) : rounded(i)",
        "rounded(i)",
        f"{_SWEEP}::test_in_place[float32-L-41]",
    ),
    Mutant(
        "epsilon not in the unit of a half type's logarithm",
        f"{KERNELS}/launch.cuh",
        "problem.epsilon * Compress::kUnit * Compress::kUnit",
        "problem.epsilon * 1.0",
        f"{_SWEEP}::test_worst_errors_of_the_instructions[float16-L-760]",
    ),
    Mutant(
        "no rule for equal values",
        f"{KERNELS}/row_kernels.cuh",
        "variance < mean * mean * 0x1p-40F",
        "false && mean > variance",
        f"{_SWEEP}::test_equal_values_give_bias[float32-L-1023]",
    ),
    Mutant(
        "nearly equal values taken for equal ones",
        f"{KERNELS}/row_kernels.cuh",
        "0x1p-40F",
        "0x1p-4F",
        f"{_SWEEP}::test_nearly_equal_values_keep_their_spread[float32-L-768]",
    ),
    Mutant(
        "addresses of y not checked for alignment",
        f"{KERNELS}/plan.h",
        "problem.bias, problem.y, problem.sum}",
        "problem.bias, problem.bias, problem.sum}",
        f"{_SWEEP}::test_unaligned_pointers[float32-4-768]",
    ),
    Mutant(
        "float parameters of a half row from the wrong vector",
        f"{KERNELS}/elements.cuh",
        "reinterpret_cast<const uint4*>(from) + index * kVectors",
        "reinterpret_cast<const uint4*>(from) + index",
        f"{_SWEEP}::test_sweep[float16-S-768]",
    ),
    Mutant(
        "mean good to one float",
        f"{KERNELS}/row_kernels.cuh",
        "fmaf(-mean, factor, -rounded) - mean_rest * factor",
        "0.0F * mean_rest",
        f"{_SWEEP}::test_mean_of_ten_deviations[float16-T-768]",
    ),
    Mutant(
        "warps of a block added up in one float",
        f"{KERNELS}/reduce.cuh",
        "(sum.rest + other_rest) + lost",
        "0.0F * (other_rest + lost)",
        f"{_SWEEP}::test_mean_of_ten_deviations[float16-L-16384]",
    ),
    Mutant(
        "logarithm of the rounded 1 + a",
        "include/ibnorm/compress.h",
        "fmaf(a, scale, scale - 1.0F)",
        "(1.0F + a) * scale - 1.0F",
        "test_compress.py::test_float32_logarithm[0]",
    ),
    Mutant(
        "no polynomial for small values of a half type",
        "include/ibnorm/compress.h",
        "a < 0.0625F ? near : far",
        "a < 0.0F ? near : far",
        f"{_SWEEP}::test_worst_errors_of_the_instructions[float16-L-760]",
    ),
)


def run_test(test: str, kernels: Path) -> subprocess.CompletedProcess[str]:
    """Run one test of this folder on other sources, in a separate process because a mutant may crash.

    It needs no fixture of the other tests, whose imports would take longer than the test.
    """
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--confcutdir={here}", f"--kernels={kernels}", str(here / test)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_caught(mutant: Mutant, emulator: Emulator, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not mutant.default and not request.config.getoption("--all-mutants", default=False):
        pytest.skip("runs with --all-mutants")
    sources = tmp_path / "custom_ops"
    shutil.copytree(ROOT / "custom_ops" / "include", sources / "include")
    shutil.copytree(ROOT / "custom_ops" / "kernels" / "cuda", sources / "kernels" / "cuda")
    file = sources / mutant.file
    text = file.read_text()
    assert mutant.old in text, "the kernels have changed: adapt this mutant"
    file.write_text(text.replace(mutant.old, mutant.new))
    # It must compile, so that a test is what fails. A test with a data type in its parameters runs no other kernels.
    types = tuple(name for name in DTYPES if f"[{name}-" in mutant.caught_by) or tuple(DTYPES)
    build(sources / "built", sources, extra=MUTANT_FLAGS, types=types)
    done = run_test(mutant.caught_by, sources)
    assert done.returncode not in (0, 2, 4, 5), f"{mutant.caught_by} passed or did not run:\n{done.stdout[-2000:]}"


def test_the_named_tests_pass_on_the_real_kernels(emulator: Emulator, request: pytest.FixtureRequest) -> None:
    """If they failed there too, catching a mutant would prove nothing."""
    if not request.config.getoption("--all-mutants", default=False):
        pytest.skip("runs with --all-mutants; the default suite runs these tests anyway")
    for test in sorted({m.caught_by for m in MUTANTS}):
        done = run_test(test, ROOT / "custom_ops")
        assert done.returncode == 0, f"{test}:\n{done.stdout[-2000:]}"
