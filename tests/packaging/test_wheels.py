"""What a release publishes: its contents, its platforms, and each wheel installed where there is no compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.cross_kernels import cross_kernels

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARY = "ibnorm_export/lib/libibnorm_ort.so"
#: glibc 2.28 is that of Debian 10, RHEL 8 and Ubuntu 18.10.
NEWEST_GLIBC = 28
#: e_machine in the header of an ELF file.
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of distributions, with a wheel for aarch64 where its compiler is installed.

    With it, wheels link kernels that other suites use too: the same source with the same flags, compiled by CMake. The
    source distribution and the wheel without kernels are built in environments that have only what they ask for.
    """
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "scripts/build_wheels.py", "--out", str(folder), "--no-isolation"]
    if platform.machine() == "x86_64" and shutil.which("aarch64-linux-gnu-g++"):
        command += ["--cross", "aarch64", "--cpu-kernels", f"aarch64={cross_kernels('aarch64')}"]
        native = REPOSITORY / "build" / "native" / "libibnorm_cpu.a"
        command += ["--cpu-kernels", str(native)] if native.is_file() else []
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return folder


def wheel_for(folder: Path, platform_tag: str) -> Path:
    (wheel,) = folder.glob(f"*-py3-none-{platform_tag}.whl")
    return wheel


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_a_wheel_with_kernels_holds_the_library_of_its_machine(distributions: Path) -> None:
    wheels = list(distributions.glob("*manylinux*.whl"))
    assert wheels
    for wheel in wheels:
        tag = re.search(r"manylinux_2_(\d+)_(\w+)\.whl", wheel.name)
        assert tag, wheel.name
        assert int(tag[1]) <= NEWEST_GLIBC
        with zipfile.ZipFile(wheel) as archive:
            header = archive.read(LIBRARY)[:20]
        assert header[:4] == b"\x7fELF"
        assert int.from_bytes(header[18:20], "little") == ELF_MACHINES[tag[2]]


def test_the_wheel_without_kernels_has_the_same_modules(distributions: Path) -> None:
    pure = names(wheel_for(distributions, "any"))
    with_kernels = names(wheel_for(distributions, f"manylinux*_{platform.machine()}"))
    assert {name for name in with_kernels ^ pure if ".dist-info/" not in name} == {LIBRARY}


def test_every_module_of_the_repository_is_in_the_wheel(distributions: Path) -> None:
    pure = names(wheel_for(distributions, "any"))
    listed = subprocess.run(
        ["git", "ls-files", "ibnorm_export", "cli", "models"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    expected = {name if name.startswith("ibnorm_export/") else f"ibnorm_export/{name}" for name in listed}
    assert expected
    assert expected <= pure, sorted(expected - pure)


def test_the_source_distribution_builds_and_tests_itself(distributions: Path) -> None:
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "constraints.txt",
        "custom_ops/CMakeLists.txt",
        "custom_ops/kernels/cpu/row_kernels.cc",
        "scripts/fetch_headers.py",
        "tests/conftest.py",
        "docs/concepts/verdict.md",
        "examples/first_steps.py",
    } <= inside


def test_the_checksums_are_those_of_the_files(distributions: Path) -> None:
    lines = (distributions / "SHA256SUMS").read_text().splitlines()
    stated = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [path for path in distributions.iterdir() if path.name != "SHA256SUMS"]
    assert stated == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module", params=["kernels", "any"])
def installed(
    request: pytest.FixtureRequest, distributions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The kind of wheel, and the folder of commands of an environment in which it is installed from the built folder.

    The other packages come from this environment by a path, which does not bring its editable install along.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    index = tmp_path_factory.mktemp("index")
    tag = "any" if request.param == "any" else f"manylinux*_{platform.machine()}"
    shutil.copy2(wheel_for(distributions, tag), index)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--find-links", str(index), "--ignore-installed", "ibnorm-export"], check=True)
    return request.param, folder / "bin"


def test_an_installed_wheel_exports_and_verifies(
    installed: tuple[str, Path], llama_checkpoint: Path, tmp_path: Path
) -> None:
    kind, commands = installed

    def run(*arguments: str) -> str:
        """Without a PATH to a compiler, away from the repository."""
        environment = {**os.environ, "PATH": str(commands), "PYTHONPATH": ""}
        command = [str(commands / "ibnorm-export"), *arguments]
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    where = [str(commands / "python"), "-c", "import ibnorm_export; print(ibnorm_export.__file__)"]
    module = subprocess.run(where, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert Path(module.strip()).is_relative_to(commands.parent)
    run("export", str(llama_checkpoint), "-o", "llama.onnx")
    report = run("verify", "llama.onnx", str(llama_checkpoint), "--kernels", "auto")
    assert "verdict: pass" in report
    assert ("5 of 5 ran as fused kernels" in report) == (kind == "kernels"), report
