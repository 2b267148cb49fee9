#!/usr/bin/env python3
"""Planted kernel bugs: each must make tests/native/test_kernels.py fail.

    python tests/native/mutants.py [--only NAME]

For every mutant the kernel sources are copied, one line is changed, the test library is built from
the copy (AVX-512 where the machine has it, else AVX2, else the plain path, beside unchanged others
left out for speed), and the tests run against it. Exit status 0 when every mutant is caught and the
unchanged copy passes.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU = Path("kernels/cpu")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str


ROWS, SIMD, LOG, DISPATCH = "row_kernels.cc", "simd.h", "compress_simd.h", "dispatch.cc"
MUTANTS = [
    Mutant("population variance becomes sample variance", ROWS,
           "square_sum / count -", "square_sum / (count - 1.0F) -"),
    Mutant("residual of the mean ignored", ROWS,
           "const float residual = residual_sum / count;", "const float residual = 0.0F;"),
    Mutant("mean of c forgotten", ROWS, "mean_c = sums[0] / count;", "mean_c = 0.0F * sums[0];"),
    Mutant("low part of the mean dropped", ROWS, "mean) - mean_low) * inverse_lambd", "mean)) * inverse_lambd"),
    Mutant("epsilon outside the root", ROWS,
           "__builtin_sqrtf(variance + epsilon)", "(__builtin_sqrtf(variance) + epsilon)"),
    Mutant("divided by lambda twice", ROWS,
           "rows.inverse_lambd = 1.0F / p.lambd", "rows.inverse_lambd = 1.0F / (p.lambd * p.lambd)"),
    Mutant("tail lanes counted", ROWS, "lanes == kWidth ? c : keep(c, lanes)", "c"),
    Mutant("last partial vector not written", ROWS, "if (i < cols) write(", "if (i + 1 < cols) write("),
    Mutant("skip sum not rounded", ROWS, "return T::round(load<T>(p.x, i, lanes) + load<T>(p.skip, i, lanes));",
           "return load<T>(p.x, i, lanes) + load<T>(p.skip, i, lanes);"),
    Mutant("wide skip rows read x after sum replaced it", ROWS,
           "if (at.sum != nullptr) return load<T>(at.sum, i, lanes);", "if (false) return load<T>(at.sum, i, lanes);"),
    Mutant("row range ignored", ROWS, "rows.next = place(row_begin);", "rows.next = place(0);"),
    Mutant("next row staged over this one", ROWS, "r % 2 != 0 ?", "r % 2 > 2 ?"),
    Mutant("bias read with the stride of x", ROWS, "load<A>(bias, i, lanes)", "load<T>(bias, i, lanes)"),
    Mutant("aligned stream store without looking at the pointer", ROWS,
           "return places % static_cast<std::uintptr_t>(T::kStreamAlign) == 0;", "return places != 0;"),
    Mutant("one block too few in a long sum", ROWS, "block += kBlock)", "block += kBlock + kWidth)"),
    Mutant("NaN turned into the limit", SIMD, "_mm512_min_ps(splat(limit), a)", "_mm512_min_ps(a, splat(limit))"),
    Mutant("bfloat16 truncated", SIMD, "(all + 0x7FFFU + ((all >> 16) & 1U)) >> 16;", "all >> 16;"),
    Mutant("bfloat16 ties away from even", SIMD,
           "(all + 0x7FFFU + ((all >> 16) & 1U)) >> 16;", "(all + 0x8000U) >> 16;"),
    Mutant("sign lost", LOG, "with_sign(log1p_positive(magnitude(t)), t)", "log1p_positive(magnitude(t))"),
    Mutant("log of 1 + a", LOG, "fma(a, scale, scale - 1.0F)", "((a + 1.0F) * scale - 1.0F)"),
    Mutant("one log coefficient off by a part in 1e3", LOG, "0x1.555506p-2F", "0x1.556506p-2F"),
    Mutant("tanh saturates early", LOG, "clamp_above(a, 9.02F)", "clamp_above(a, 5.0F)"),
    Mutant("low part of ln 2 forgotten", LOG, "r = fma(n, splat(-0x1.7f7d1cp-20F), r);", "r = r + 0.0F * n;"),
    Mutant("NaN lambda accepted", DISPATCH, "!(p.lambd > 0.0F && p.lambd <= kLargest)", "p.lambd <= 0.0F"),
    Mutant("sum without skip accepted", DISPATCH, "return p.skip != nullptr || p.sum == nullptr;", "return true;"),
]  # fmt: skip


def instruction_set() -> tuple[str, list[str]]:
    flags = ""
    if platform.machine() == "x86_64":
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if "avx512bw" in flags and "avx512vl" in flags and "avx512dq" in flags:
        return "avx512", ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    return "generic", []


def build(source: Path, target: Path, isa: str, flags: list[str]) -> None:
    """The test library with one real kernel set; the other names lead to it too."""
    dispatch = source / CPU / "only.cc"
    text = (source / CPU / DISPATCH).read_text(encoding="utf-8")
    if isa != "generic":
        text = text.replace("RowKernel kernel = generic::run;", f"RowKernel kernel = {isa}::run;")
        text = text.replace("kernel = avx2::run;", f"kernel = {isa}::run;")
    dispatch.write_text(text, encoding="utf-8")
    common = ["g++", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w", f"-I{source / 'include'}"]
    define = ["-DIBNORM_X86"] if isa != "generic" else []
    rows = target.with_suffix(".rows.o")
    subprocess.run(
        [*common, *define, *flags, "-O1", f"-DIBNORM_ISA={isa}", "-c", str(source / CPU / ROWS), "-o", str(rows)],
        check=True,
    )
    subprocess.run(
        [*common, *define, "-O1", f"-I{source / CPU}", "-shared", str(rows), str(dispatch),
         str(source / "testing" / "kernels_test.cc"), "-pthread", "-o", str(target)], check=True,
    )  # fmt: skip


def tests_fail(library: Path) -> tuple[bool, str]:
    """A crash counts as a failure too."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=line",
               str(ROOT / "tests/native/test_kernels.py"), f"--ibnorm-kernels={library}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode != 0, lines[0].split(" - ")[0] if lines else f"exit status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Every planted kernel bug must be caught.")
    parser.add_argument("--only", default="", help="mutants whose name holds this")
    options = parser.parse_args()
    isa, flags = instruction_set()
    survivors = []
    chosen = [m for m in MUTANTS if options.only in m.name]
    with tempfile.TemporaryDirectory() as scratch:
        for mutant in [None, *chosen]:
            name = mutant.name if mutant else "(unchanged)"
            source = Path(scratch) / "custom_ops"
            shutil.rmtree(source, ignore_errors=True)
            shutil.copytree(ROOT / "custom_ops", source)
            if mutant:
                file = source / CPU / mutant.file
                text = file.read_text(encoding="utf-8")
                if mutant.old not in text:
                    print(f"stale    {name}: '{mutant.old}' is not in {mutant.file}", flush=True)
                    survivors.append(name)
                    continue
                file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            library = Path(scratch) / f"libmutant{len(survivors)}_{abs(hash(name))}.so"
            build(source, library, isa, flags)
            failed, where = tests_fail(library)
            if failed != bool(mutant):
                survivors.append(name)
            print(f"{'caught  ' if failed else 'passes  '} {name}{': ' + where if failed else ''}", flush=True)
    print(f"{len(chosen) - sum(s != '(unchanged)' for s in survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
