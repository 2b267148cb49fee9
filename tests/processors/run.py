"""Run a command as on an older x86-64 processor, at full speed: newer instruction sets are hidden from it.

    python -m tests.processors.run avx2 COMMAND...
    python -m tests.processors.run --possible

masked_cpuid.cc explains how. What is hidden is not forbidden: a program that uses such instructions without asking for
them is only stopped by an emulator, which is ten times slower (`make test-qemu`).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "masked_cpuid.cc"
LIBRARY = Path(__file__).resolve().parents[2] / "build" / "processors" / "masked_cpuid.so"

_NO_AVX512 = ("AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "AVX512CD", "AVX512ER", "AVX512PF")
_NO_AVX = (*_NO_AVX512, "AVX2", "AVX", "FMA", "BMI1", "BMI2", "LZCNT")


@dataclass(frozen=True)
class Processor:
    """An older processor, by its newest instruction set.

    Args:
        torch: PyTorch's name for the instruction set that it uses there.
        kernels: the name that the fused CPU kernels have for theirs.
        hidden: the instruction sets that the C library must not use either. It asks for them before any library can
            hide them, so it takes them from its own setting (GLIBC_TUNABLES, glibc.cpu.hwcaps).
    """

    torch: str
    kernels: str
    hidden: tuple[str, ...]

    def difference(self) -> str | None:
        """Return in what this process differs from the processor, or None if libraries here see the processor."""
        import torch

        from ibnorm_export.op import native

        seen = torch.backends.cpu.get_cpu_capability()
        if seen != self.torch:
            return f"PyTorch uses {seen} in this process, not {self.torch}"
        library = native.availability()
        if library and library.instruction_set != self.kernels:
            return f"the CPU kernels use {library.instruction_set} in this process, not {self.kernels}"
        return None


#: By the value of MASKED_CPUID.
PROCESSORS = {
    "avx2": Processor("AVX2", "avx2", _NO_AVX512),
    "sse4.2": Processor("DEFAULT", "generic", _NO_AVX),
}


def obstacle() -> str | None:
    """Return why instruction sets cannot be hidden on this machine, or None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"CPUID can be masked on Linux x86-64 only, and this is {sys.platform} {platform.machine()}"
    if "cpuid_fault" not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        return "this processor cannot make CPUID fault (/proc/cpuinfo has no flag cpuid_fault)"
    if shutil.which("g++") is None:
        return "g++ is not installed (Debian: g++)"
    return None


def compile_mask(library: Path = LIBRARY) -> Path:
    """Compile the library that masks CPUID, unless it is newer than its source."""
    if library.exists() and library.stat().st_mtime_ns > SOURCE.stat().st_mtime_ns:
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    new = library.with_name(f"new.{os.getpid()}")  # several processes may do this at once
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]
    subprocess.run(["g++", *flags, "-fPIC", "-shared", SOURCE, "-o", new, "-ldl", "-Wl,--as-needed"], check=True)
    return new.replace(library)


def variables(name: str, environment: Mapping[str, str], *, library: Path) -> dict[str, str]:
    """Return an environment in which every process sees only the processor `name`.

    What torch.compile compiled on another processor is not used: its folder names a library by its source, so that a
    library with vectors of another length would be taken.
    """
    hidden = ",".join(f"-{instructions}" for instructions in PROCESSORS[name].hidden)
    return {
        **environment,
        "MASKED_CPUID": name,
        "LD_PRELOAD": str(library),
        "GLIBC_TUNABLES": f"glibc.cpu.hwcaps={hidden}",
        "TORCHINDUCTOR_CACHE_DIR": str(library.parent / f"torch-compile-{name}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a command as on an older x86-64 processor.")
    parser.add_argument("--possible", action="store_true", help="only print why it is impossible here, and exit with 1")
    parser.add_argument("processor", nargs="?", choices=PROCESSORS, help="newest instruction set that stays visible")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    problem = obstacle()
    if problem:
        sys.exit(f"tests.processors.run: {problem}")
    if arguments.possible:
        return
    if not arguments.command:
        parser.error("name a processor and a command")
    environment = variables(arguments.processor, os.environ, library=compile_mask())
    os.execvpe(arguments.command[0], arguments.command, environment)


if __name__ == "__main__":
    main()
