"""Newer instruction sets are hidden from every library, and a process behaves as before otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processors.run import PROCESSORS, compile_mask, obstacle, variables

# What each library finds, one line each.
SEEN = """
import torch
from numpy._core._multiarray_umath import __cpu_features__ as numpy_features
from threading import Thread
print(torch.backends.cpu.get_cpu_capability())
print(*(name for name in ("AVX2", "FMA3", "AVX512F", "AVX512_SPR") if numpy_features[name]))
Thread(target=lambda: print(torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported())).start()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    problem = obstacle()
    if problem:
        pytest.skip(problem)
    return compile_mask(tmp_path_factory.mktemp("mask") / "masked_cpuid.so")


def run(command: list[str], *, library: Path, processor: str = "avx2") -> subprocess.CompletedProcess[str]:
    environment = variables(processor, os.environ, library=library)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [("avx2", ["AVX2", "AVX2 FMA3", "True False"]), ("sse4.2", ["DEFAULT", "", "False False"])],
)
def test_libraries_see_an_older_processor(library: Path, processor: str, expected: list[str]) -> None:
    seen = run([sys.executable, "-c", SEEN], library=library, processor=processor)
    assert seen.stdout.splitlines() == expected, seen.stderr


@pytest.mark.parametrize("processor", PROCESSORS)
def test_doctor_names_the_kernels_of_the_older_processor(library: Path, processor: str) -> None:
    """The variables are inherited: the kernels are those of a process that a shell starts."""
    command = ["sh", "-c", f"{sys.executable} -m ibnorm_export doctor"]
    report = run(command, library=library, processor=processor).stdout
    if "missing fused kernels" in report:
        pytest.skip("the native library is not built (make native)")
    assert f"CPU kernels {PROCESSORS[processor].kernels})" in report


def test_a_test_run_refuses_another_processor() -> None:
    """`--processor` ends a run in which nothing is hidden, or too little."""
    other = next(name for name, processor in PROCESSORS.items() if processor.difference())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--processor={other}",
        __file__,
        "-k",
        "nothing",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"not {PROCESSORS[other].torch}" in ended.stderr


def test_a_crash_still_ends_a_program(library: Path) -> None:
    command = [sys.executable, "-c", "import ctypes; ctypes.string_at(0)"]
    assert run(command, library=library).returncode == -signal.SIGSEGV


def test_a_crash_reaches_the_programs_own_handler(library: Path) -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", "import ctypes; ctypes.string_at(0)"]
    crash = run(command, library=library)
    assert crash.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in crash.stderr


def test_an_ignored_signal_stays_ignored(library: Path) -> None:
    code = "from signal import *; signal(SIGSEGV, SIG_IGN); raise_signal(SIGSEGV); print('goes on')"
    assert run([sys.executable, "-c", code], library=library).stdout == "goes on\n"


def test_an_unknown_processor_is_refused(library: Path) -> None:
    """A misspelt name must not run a program with everything visible."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "MASKED_CPUID": "avx3"}
    refused = subprocess.run(
        [sys.executable, "-c", "pass"], env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr == "masked_cpuid: MASKED_CPUID must be avx2 or sse4.2\n"
