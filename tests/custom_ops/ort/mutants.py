#!/usr/bin/env python3
"""Planted kernel bugs: each must make tests/custom_ops/ort/test_kernels.py fail.

    python -m tests.custom_ops.ort.mutants [--only NAME] [--record FILE]

For every mutant the script copies the kernel sources, changes one line, builds the test library from the copy, and
runs the tests against it. To save time the library holds the kernels of one instruction set: AVX-512 where the machine
has it, else AVX2, else the generic one. The exit status is 0 if every mutant is caught and the unchanged copy passes.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ibnorm_export.environment import environment

ROOT = Path(__file__).resolve().parents[3]
CPU = Path("kernels/cpu")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str


ROWS, SIMD, STORAGE, COMPRESS, DISPATCH = (
    "row_kernels.cc",
    "simd.h",
    "storage.h",
    "compress_simd.h",
    "dispatch.cc",
)
MUTANTS = [
    Mutant(
        "population variance becomes sample variance",
        ROWS,
        "squares.total() / count -",
        "squares.total() / (count - 1) -",
    ),
    Mutant(
        "mean of c forgotten",
        ROWS,
        "static_cast<float>(-c_mean * inverse);",
        "static_cast<float>(0.0 * inverse);",
    ),
    Mutant("low part of the mean dropped", ROWS, "factor, -row.mean_rest)", "factor, 0.0F * row.mean_rest)"),
    Mutant("squares around 0 though the mean is large", ROWS, "if (c_mean * c_mean > variance) {", "if (count < 0) {"),
    Mutant(
        "what the mean of c lacks forgotten where it is large",
        ROWS,
        "c_mean = rest.total() / count;",
        "c_mean = 0.0 * rest.total();",
    ),
    Mutant(
        "values of a half type kept by columns, not by lanes",
        ROWS,
        "Float32::store(row.c + i * 4, c, kHalf ? kPack : n);",
        "Float32::store(row.c + i * 4, c, n);",
    ),
    Mutant("floats kept in a y of half the size", ROWS, "T::kSize == 4 && !stream;", "T::kSize == 4 || !stream;"),
    Mutant(
        "epsilon outside the root", ROWS, "__builtin_sqrt(variance + epsilon)", "(__builtin_sqrt(variance) + epsilon)"
    ),
    Mutant(
        "tail lanes counted",
        ROWS,
        "keep_columns(compressed(row, source(row, i, n)), n);",
        "compressed(row, source(row, i, n));",
    ),
    Mutant(
        "last partial pack left out",
        ROWS,
        "if (left > 0 && left < kPack) body(i, left);",
        "if (left > 1 && left < kPack) body(i, left);",
    ),
    Mutant(
        "skip sum not rounded",
        ROWS,
        "return T::round(add(x, T::load(row.skip + i * T::kSize, n)));",
        "return add(x, T::load(row.skip + i * T::kSize, n));",
    ),
    Mutant(
        "wide skip rows read x after sum replaced it",
        ROWS,
        "if (row.sum != nullptr) return T::load(row.sum",
        "if (row.x == nullptr) return T::load(row.sum",
    ),
    Mutant("row range ignored", ROWS, "Row row = place(row_begin);", "Row row = place(0);"),
    Mutant(
        "the last row's values read after this row's replaced them",
        ROWS,
        "if (kFits && next.x != nullptr) total.add(",
        "if (kFits && last.x != nullptr) finish(last, load_c(last, i, n), i, n);"
        "if (kFits && next.x != nullptr) total.add(",
    ),
    Mutant("last row not written", ROWS, "if (!kFits || r + 1 == row_end)", "if (!kFits)"),
    Mutant(
        "bias read with the stride of x",
        ROWS,
        "affine(bias, i, n)), n);",
        "affine(bias, own_affine ? i : i / 2 / kPack * kPack, n)), n);",
    ),
    Mutant(
        "aligned stream store without looking at the pointer",
        ROWS,
        "return places % static_cast<std::uintptr_t>(T::kStreamAlign) == 0;",
        "return places != 0;",
    ),
    Mutant("NaN row comes out as numbers", ROWS, "mean - mean == 0.0 ?", "true ?"),
    Mutant(
        "NaN of scale keeps bits that rounding carries",
        STORAGE,
        "return v == v ? v : splat(",
        "return true ? v : splat(",
    ),
    Mutant(
        "partial packs of a converted scale shortened",
        ROWS,
        "Float32::store(to + i * 4, kernel.affine(from, i, n));",
        "Float32::store(to + i * 4, kernel.affine(from, i, n), n);",
    ),
    Mutant(
        "bias converted from scale", ROWS, "convert(kernel.bias, converted[1])", "convert(kernel.scale, converted[1])"
    ),
    Mutant("bfloat16 truncated", STORAGE, "all + 0x7FFFU + ((all >> 16) & 1U);", "all;"),
    Mutant("bfloat16 ties away from even", STORAGE, "all + 0x7FFFU + ((all >> 16) & 1U);", "all + 0x8000U;"),
    Mutant(
        "float scale in the order of memory beside bfloat16",
        ROWS,
        "return T::order(Float32::load(p + i * 4, n));",
        "return Float32::load(p + i * 4, n);",
    ),
    Mutant("sign lost", COMPRESS, "return with_sign(v, s);", "return v + 0.0F * s;"),
    Mutant("one log coefficient off by a part in 250", COMPRESS, "0x1.5554fap-2F", "0x1.56aa00p-2F"),
    Mutant("one coefficient of the near log off by a part in 1e4", COMPRESS, "0x1.3418ep-1F", "0x1.3420c4p-1F"),
    Mutant("one coefficient of the near tanh off by a part in 1e4", COMPRESS, "0x1.c63c88p-2F", "0x1.c64828p-2F"),
    Mutant("tanh saturates early", COMPRESS, "9.02F", "5.0F"),
    Mutant("log's near form used too far out", COMPRESS, "kNearLog = 2.0F", "kNearLog = 40.0F"),
    Mutant("tanh's near form used too far out", COMPRESS, "kNearTanh = 1.5F", "kNearTanh = 6.0F"),
    Mutant(
        "only the first vector of a pack asked for its range",
        SIMD,
        "for (int half = kVectors / 2; half > 0; half /= 2)\n    for (int u = 0; u < half; ++u) a.v[u] = larger(",
        "for (int half = 0; half > 0; half /= 2)\n    for (int u = 0; u < half; ++u) a.v[u] = larger(",
    ),
    Mutant(
        "rough quotient not corrected",
        SIMD,
        "return fma(fma(-quotient, b, a), reciprocal, quotient);",
        "return quotient;",
    ),
    Mutant("NaN lambda accepted", DISPATCH, "!(p.lambd > 0.0F && p.lambd <= kLargest)", "p.lambd <= 0.0F"),
    Mutant("sum without skip accepted", DISPATCH, "return p.skip != nullptr || p.sum == nullptr;", "return true;"),
]


def instruction_set() -> tuple[str, list[str]]:
    """The widest instruction set of this processor that the kernels know, and the compiler's flags for it."""
    known = {
        "avx512": ({"avx512f", "avx512bw", "avx512dq", "avx512vl"}, ["-mprefer-vector-width=512"]),
        "avx2": ({"avx2", "fma", "f16c"}, []),
    }
    if platform.machine() == "x86_64":
        features = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        for name, (needed, options) in known.items():
            if needed <= features:
                return name, [*(f"-m{feature}" for feature in sorted(needed)), *options]
    return "generic", []


def build(source: Path, target: Path, isa: str, flags: list[str]) -> None:
    """Build the test library with the kernels of one instruction set, which serve under every name."""
    dispatch = source / CPU / "only.cc"
    text = (source / CPU / DISPATCH).read_text(encoding="utf-8")
    text = re.sub(r"\b(generic|avx2|avx512)::run;", f"{isa}::run;", text)
    dispatch.write_text(text, encoding="utf-8")
    common = ["g++", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w", f"-I{source / 'include'}"]
    define = ["-DIBNORM_X86"] if isa != "generic" else []
    rows = target.with_suffix(".rows.o")
    subprocess.run(
        [*common, *define, *flags, "-O1", f"-DIBNORM_ISA={isa}", "-c", str(source / CPU / ROWS), "-o", str(rows)],
        check=True,
    )
    subprocess.run(
        [
            *common,
            *define,
            "-O1",
            f"-I{source / CPU}",
            "-shared",
            str(rows),
            str(dispatch),
            str(source / "testing" / "kernels_test.cc"),
            "-pthread",
            "-o",
            str(target),
        ],
        check=True,
    )


def tests_fail(library: Path) -> tuple[bool, str]:
    """Whether the tests fail against `library`, and the first that does. A crash is a failure too."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--tb=line",
        str(ROOT / "tests/custom_ops/ort/test_kernels.py"),
        f"--ibnorm-kernels={library}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode != 0, lines[0].split(" - ")[0] if lines else f"exit status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Every planted kernel bug must be caught.")
    parser.add_argument("--record", type=Path, help="file for the table, as JSON")
    parser.add_argument("--only", default="", help="only mutants whose name contains this")
    options = parser.parse_args()
    isa, flags = instruction_set()
    survivors = []
    table = []
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
            if mutant:
                table.append({"bug": name, "caught": failed, "by": where if failed else None})
            print(f"{'caught  ' if failed else 'passes  '} {name}{': ' + where if failed else ''}", flush=True)
    print(f"{len(chosen) - sum(s != '(unchanged)' for s in survivors)} of {len(chosen)} mutants caught")
    if options.record:
        report = {"benchmark": "mutants", "instruction_set": isa, "environment": environment(), "bugs": table}
        options.record.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
