"""The check for GPU machines, run on the emulator, where it measures nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import run
from benchmarks.suites import gpu_check, gpu_machine, gpu_parts
from benchmarks.suites.gpu_machine import Machine
from ibnorm_export.op import native
from ibnorm_export.op.spec import IBNormSpec
from tests.support import trt_plugin

#: A warp per row, the quickest to emulate, and the streaming kernel.
WIDTH = (768, 1023)
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, trt_headers: Path) -> Machine:
    return gpu_machine.emulator(tmp_path_factory.mktemp("emulator"))


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["gpu_check", "--record", str(tmp_path / "r.json")]) == 3
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("gpu_check: ")
    assert not (tmp_path / "r.json").exists()


def test_every_part_on_the_emulator(tmp_path: Path, trt_headers: Path) -> None:
    """What can run passes, the other parts report why they did not run, and nothing is timed."""
    library = native.availability()
    if not library:
        pytest.skip(str(library))
    file = tmp_path / "r.json"
    widths = map(str, WIDTH)
    done = run.main(
        ["gpu_check", "--emulate", "--width", *widths, "--ort-library", str(library.path), "--record", str(file)]
    )
    text = file.read_text()
    report = json.loads(text)
    assert done == 0, text
    assert report["device"] == "CPU emulator, no GPU"
    rows = {row["name"]: row for row in report["rows"]}
    met = {name: row["met"] for name, row in rows.items()}
    assert met == {"kernels": True, "plugin": True, "bandwidth": None, "onnxruntime": True}
    assert rows["bandwidth"]["note"] == "not run: no GPU"
    assert len(rows["kernels"]["details"]["figures"]) == 9 + 6  # half types have their parameters in float32 too
    assert len(rows["plugin"]["details"]["figures"]) == 18
    assert {figure["how"] for figure in rows["onnxruntime"]["details"]["figures"]} == {"function", "fused"}
    for measured in ("_ms", "gigabytes", "microseconds"):
        assert measured not in text


def test_a_wrong_kernel_fails(machine: Machine) -> None:
    class Wrong:
        """epsilon is lost in the plain form."""

        def op_cuda_run(self, pointers: Any, *rest: Any) -> int:
            *first, epsilon, stream = rest
            lost = 0.0 if pointers[1] is None else epsilon
            return int(machine.kernels.op_cuda_run(pointers, *first, lost, stream))

    part = gpu_check.check_kernels(dataclasses.replace(machine, kernels=Wrong()), WIDTH)
    assert part.verdict == "fail"
    assert any("ulp, tolerance 1" in failure for failure in part.failures)
    assert any("not the plain form of the sum" in failure for failure in part.failures)


def test_a_wrong_plugin_fails(machine: Machine, trt_headers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tensorrt"
    shutil.copytree(trt_plugin.PLUGIN, folder)
    source = (folder / "plugin.cc").read_text()
    planted = source.replace("problem.lambd = attributes_.lambd;", "problem.lambd = 4.0F;")
    assert planted != source
    (folder / "plugin.cc").write_text(planted)
    wrong = trt_plugin.build_plugin(trt_headers, folder)
    part = gpu_check.check_plugin(dataclasses.replace(machine, plugin=wrong), WIDTH)
    assert part.verdict == "fail"
    assert any("IBNormT" in failure and "not the bits of the kernel" in failure for failure in part.failures)
    assert part.row().met is False


def test_a_part_without_figures_does_not_pass(machine: Machine) -> None:
    assert gpu_parts.Part("kernels").row().met is False
    missing = dataclasses.replace(machine, plugin=None, missing=gpu_machine.NO_HEADERS)
    part = gpu_check.check_plugin(missing, WIDTH)
    assert (part.verdict, part.not_run) == ("not run", gpu_machine.NO_HEADERS)
    assert part.row().met is None


def test_nvcc_builds_plugin_and_harness(trt_headers: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The kernels are replaced by a stub, because they take minutes to compile: the result loads and answers."""
    try:
        gpu_machine.nvcc(["--version"])
    except gpu_machine.ToolMissingError as missing:
        pytest.skip(str(missing))
    stub = tmp_path / "stub.cu"
    stub.write_text(
        '#include "ibnorm/kernels.h"\n'
        "namespace ibnorm::cuda { Status run(const Problem&, void*) noexcept { return Status::kUnsupported; } }\n"
    )
    gpu_machine.nvcc(["-Xcompiler", "-fPIC", "-c", str(stub), "-o", str(tmp_path / "stub.o")])
    library = gpu_machine.link_plugin(tmp_path, trt_headers, [tmp_path / "stub.o"])
    harness = gpu_machine.link_harness(tmp_path, trt_headers)
    assert ctypes.CDLL(str(harness)).harness_tensorrt_major() >= 10
    plugin = trt_plugin.Plugin(harness, library, "IBNormL", trt_plugin.fields_of(IBNormSpec("L")))
    x, ones = np.zeros((2, 8), np.float32), np.ones(8, np.float32)
    assert plugin.run([x, ones, ones], [x]) == 1
    plugin.close()
    assert "holds no kernel for the device" in capfd.readouterr().err
