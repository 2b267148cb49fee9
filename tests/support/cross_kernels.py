"""The CPU kernels for another processor, which two suites need and a compiler works on for half a minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cross_kernels(machine: str) -> Path:
    """Compile libibnorm_cpu.a for `machine` in build/native-MACHINE, by its cross compiler, unless it is up to date.

    Args:
        machine: as `platform.machine()` names it there, e.g. "aarch64".
    """
    cmake, folder = str(Path(sys.executable).with_name("cmake")), ROOT / "build" / f"native-{machine}"
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_CXX_COMPILER": f"{machine}-linux-gnu-g++",
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run([cmake, "-S", str(ROOT / "custom_ops"), "-B", str(folder), *defines], check=True)
    subprocess.run([cmake, "--build", str(folder), "--target", "ibnorm_cpu"], check=True)
    return folder / "libibnorm_cpu.a"
