"""Registers, spills, access widths, issue slots and size of the compiled CUDA kernels.

Needs nvcc. The parts that read SASS also need cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm). No GPU is needed, and nothing is measured on one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable

__all__ = [
    "ARCHITECTURES",
    "H200",
    "TYPES",
    "Device",
    "Kernel",
    "ToolMissingError",
    "compile_library",
    "compile_ptx",
    "nvcc",
    "read_kernels",
    "slots_used",
    "tool",
]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "custom_ops" / "kernels" / "cuda"
INCLUDE = ROOT / "custom_ops" / "include"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TYPES = ("float32", "float16", "bfloat16")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ROW = re.compile(r"row_kernelILNS_5DTypeE(\d)ELS2_(\d)ELNS_11CompressionE(\d)ELb([01])ELi(\d+)ELi(\d+)ELb([01])E")
_STREAM = re.compile(r"stream_kernelILNS_5DTypeE(\d)ELS2_(\d)ELNS_11CompressionE(\d)ELb([01])E")


class ToolMissingError(Unavailable):
    """A tool is not installed; the message names it and explains where to get it."""


@dataclass(frozen=True, slots=True)
class Device:
    """Properties of a GPU that an estimate assumes.

    Args:
        gigahertz: a sustained clock, below the highest one.
        terabytes_per_s: the memory's nominal bandwidth, above what any copy reaches.
    """

    name: str
    multiprocessors: int
    gigahertz: float
    terabytes_per_s: float

    def slots_per_element(self, bytes_per_element: float) -> float:
        """Thread instructions that can issue in the time the memory takes for one element."""
        issue = self.multiprocessors * 4 * 32 * self.gigahertz * 1e9
        return issue * bytes_per_element / (self.terabytes_per_s * 1e12)


#: Both figures are on the pessimistic side: 1.755 GHz of at most 1.98, 4.8 TB/s nominal.
H200 = Device("H200", 132, 1.755, 4.8)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel."""

    name: str
    method: str  # warp, block or stream
    dtype: str
    affine: str
    compression: str
    skip: bool
    vectors: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    #: The rest is 0 or empty if no cuobjdump is installed.
    instructions: int
    opcodes: dict[str, int]
    access_bits: dict[str, dict[int, int]]  # load, store -> width in bits -> number

    @property
    def elements(self) -> int:
        """Elements of one thread."""
        return self.vectors * 16 // _BYTES[self.dtype]

    @property
    def bytes_per_element(self) -> int:
        """Read and written in global memory, without parameters, which stay in the cache."""
        return _BYTES[self.dtype] * (4 if self.skip else 2)


def tool(name: str) -> str:
    """Path of a CUDA tool: PATH, CUDA_HOME, or the PyPI packages of this environment.

    Raises:
        ToolMissingError: it is in none of them.
    """
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    places += [Path(p) / "nvidia" / f"cu{v}" / "bin" for p in sys.path for v in (13, 12)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    found = shutil.which(name, path=path)
    if found is None:
        package = {"nvcc": "the CUDA toolkit 12 or newer"}.get(
            name, f"nvidia-cuda-{name} from PyPI or the CUDA toolkit"
        )
        raise ToolMissingError(f"{name} is not installed: take {package}")
    return found


def nvcc(arguments: list[str]) -> str:
    """Run nvcc with the kernels' headers and return its standard error.

    Raises:
        ToolMissingError: it is not installed.
        RuntimeError: it fails.
    """
    command = [tool("nvcc"), "-std=c++17", "-O3", f"-I{INCLUDE}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stderr


def compile_ptx(dtype: str, arch: str, to: Path) -> None:
    """PTX of all kernels of one data type."""
    nvcc([f"-arch={arch}", "-ptx", str(SOURCES / f"{dtype}.cu"), "-o", str(to)])


def _sass(cubin: Path) -> str:
    cuobjdump = Path(tool("cuobjdump"))
    disassembler = Path(tool("nvdisasm")).parent
    environment = {**os.environ, "PATH": f"{disassembler}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [str(cuobjdump), "-sass", str(cubin)], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def _read_sass(text: str) -> dict[str, list[str]]:
    """Opcodes of each function, in order, up to its last EXIT."""
    functions: dict[str, list[str]] = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        codes = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", body)
        end = max(i for i, code in enumerate(codes) if code == "EXIT")
        functions[name.strip()] = codes[: end + 1]
    return functions


def _access_bits(codes: list[str]) -> dict[str, dict[int, int]]:
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for code in codes:
        head, *rest = code.split(".")
        if head not in ("LDG", "STG", "LD", "ST"):
            continue
        bits = next((int(r) for r in rest if r in ("64", "128")), None)
        if bits is None:
            bits = next((int(r[1:]) for r in rest if re.fullmatch(r"[US](8|16)", r)), 32)
        widths["load" if head.startswith("L") else "store"][bits] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in widths.items()}


def read_kernels(dtype: str, arch: str, folder: Path, *, sass: bool = True) -> list[Kernel]:
    """Compile one data type for one architecture and describe its kernels.

    Raises:
        ToolMissingError: nvcc, or with `sass` cuobjdump or nvdisasm, is not installed.
    """
    cubin = folder / f"{dtype}-{arch}.cubin"
    report = nvcc([f"-arch={arch}", "-Xptxas", "-v", "-cubin", str(SOURCES / f"{dtype}.cu"), "-o", str(cubin)])
    codes = _read_sass(_sass(cubin)) if sass else {}
    kernels = []
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, stack, stores, loads, registers in pattern.findall(report):
        row, stream = _ROW.search(name), _STREAM.search(name)
        found = row or stream
        if found is None:
            raise RuntimeError(f"unknown kernel {name}")
        own = codes.get(name, [])
        kernels.append(
            Kernel(
                name=name,
                method="stream" if row is None else "block" if row.group(7) == "1" else "warp",
                dtype=TYPES[int(found.group(1))],
                affine=TYPES[int(found.group(2))],
                compression="SLT"[int(found.group(3))],
                skip=found.group(4) == "1",
                vectors=0 if row is None else int(row.group(5)),
                registers=int(registers),
                stack_bytes=int(stack),
                spill_bytes=int(stores) + int(loads),
                instructions=len(own),
                opcodes=dict(Counter(code.split(".")[0] for code in own).most_common()),
                access_bits=_access_bits(own),
            )
        )
    return kernels


#: Lanes per clock and scheduler of the units that take longer than one clock for a warp
#: (arithmetic throughput table of the CUDA programming guide, compute capability 9.0).
_SLOW_UNITS = {
    "special function": (4, ("MUFU",)),
    "integer and compare": (
        16,
        ("LOP3", "SHF", "FSETP", "FSEL", "FMNMX", "IADD3", "ISETP", "LEA", "PRMT", "SEL", "F2FP", "I2FP"),
    ),
    "shuffle and memory": (8, ("SHFL", "LDG", "STG", "LDS", "STS")),
}


def slots_used(kernel: Kernel, device: Device) -> dict[str, float]:
    """Fraction of the clocks, at full nominal bandwidth, in which a row kernel keeps each unit busy.

    Row kernels are unrolled and have no loop, so every instruction runs once for a full row; the
    count is an upper bound for a thread's own elements.
    """
    available = device.slots_per_element(kernel.bytes_per_element)
    used = {"issue": kernel.instructions / kernel.elements / available}
    for unit, (lanes, codes) in _SLOW_UNITS.items():
        clocks = sum(kernel.opcodes.get(code, 0) for code in codes) * 32 / lanes
        used[unit] = clocks / kernel.elements / available
    return used


def compile_library(
    architectures: tuple[str, ...],
    folder: Path,
    *,
    extra: tuple[Path, ...] = (),
    kernels: tuple[Path, ...] = (),
) -> tuple[int, float]:
    """Build folder/libkernels.so with every kernel and what `extra` sources export.

    Args:
        architectures: sm_90 and the like.
        folder: receives the library.
        extra: more sources.
        kernels: objects of the kernels that are there already; without them the kernels are compiled.

    Returns:
        Its bytes, stripped, and the seconds that two processes took.
    """
    started = time.monotonic()
    codes = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]

    def one(source: Path) -> Path:
        object_file = folder / f"{source.stem}.o"
        flags = ["-Xfatbin", "-compress-all", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        nvcc([*codes, *flags, "-c", str(source), "-o", str(object_file)])
        return object_file

    with ThreadPoolExecutor(2) as pool:
        compiled = () if kernels else tuple(SOURCES / f"{name}.cu" for name in (*TYPES, "run"))
        objects = [*kernels, *pool.map(one, (*compiled, *extra))]
    library = folder / "libkernels.so"
    link = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", *map(str, objects)]
    nvcc([*codes[:1], *link, "-o", str(library)])
    subprocess.run(["strip", str(library)], check=False)
    return library.stat().st_size, time.monotonic() - started


def _estimates(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """The variants that the bandwidth target names: 1024 to 8192 columns, parameters of the data's type."""
    rows = []
    for cols in (1024, 2048, 4096, 8192):
        for kernel in kernels:
            capacity = kernel.elements * 32
            block = kernel.method == "block" and cols > 2048
            wanted = capacity == cols if kernel.method == "warp" else block
            if wanted and kernel.affine == kernel.dtype:
                used = {unit: round(part, 3) for unit, part in slots_used(kernel, H200).items()}
                rows.append(
                    {
                        "cols": cols,
                        "dtype": kernel.dtype,
                        "compression": kernel.compression,
                        "skip": kernel.skip,
                        "method": kernel.method,
                        "registers": kernel.registers,
                        "instructions_per_element": round(kernel.instructions / kernel.elements, 2),
                        "used": used,
                    }
                )
    return rows


def _row(arch: str, kernels: list[Kernel], seconds: float) -> Row:
    """One architecture: the row kernels must not spill, and must only make accesses of 128 bits."""
    row = [k for k in kernels if k.method != "stream"]
    widths = sorted({b for k in row for counts in k.access_bits.values() for b in counts})
    figures = {
        "spills of all kernels": Figure(sum(k.spill_bytes for k in kernels), "bytes"),
        "row kernels' narrowest access": Figure(min(widths, default=0), "bits"),
        "kernels": Figure(len(kernels)),
        "row kernels": Figure(len(row)),
        "stack of all kernels": Figure(sum(k.stack_bytes for k in kernels), "bytes"),
        "compilation": Figure(round(seconds, 1), "s"),
    }
    for method in ("warp", "block", "stream"):
        figures[f"most registers, {method}"] = Figure(max(k.registers for k in kernels if k.method == method))
    targets = (Target("spills of all kernels", 0), Target("row kernels' narrowest access", 128, at_least=True))
    return Row(arch, figures, targets=targets)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", action="append", help="sm_NN, repeatable (default: all that the package ships).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Compile for every architecture and report on the kernels."""
    architectures = tuple(options.arch or ARCHITECTURES)
    version = re.search(r"release (\S+),", subprocess.check_output([tool("nvcc"), "--version"], text=True))
    report.facts |= {"nvcc": version.group(1) if version else "unknown"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for arch in architectures:
            started = time.monotonic()
            with ThreadPoolExecutor(2) as pool:
                read = pool.map(lambda dtype, a=arch: read_kernels(dtype, a, folder), TYPES)
                kernels = [k for found in read for k in found]
            report.add(_row(arch, kernels, time.monotonic() - started))
            if arch == "sm_90":
                report.facts["issue_slots"] = {
                    "assumptions": asdict(H200),
                    "meaning": "fraction of each unit's clocks used at the nominal bandwidth; below 1 memory is the "
                    "limit",
                    "variants": _estimates(kernels),
                }
        size, seconds = compile_library(architectures, folder)
    figures = {"size": Figure(size / 1e6, "MB"), "build with 2 processes": Figure(round(seconds, 1), "s")}
    report.add(Row("library of all architectures", figures))
