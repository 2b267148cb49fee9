"""`doctor`: what works, what is missing or broken, and what to do about it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ibnorm_export import doctor
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.op import native
from ibnorm_export.runtimes.tensorrt.options import Runtime


def check_of(name: str) -> doctor.Check:
    return next(check for check in doctor.diagnose().checks if check.name.startswith(name))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("GenAI", "onnxruntime_genai", "genai"),
        ("text endpoint", "uvicorn", "serve"),
        ("Triton's clients", "tritonclient.http", "serve"),
        ("checkpoints of timm", "timm", "vision"),
        ("plots", "matplotlib", "plots"),
        ("demo", "sklearn", "demo"),
    ],
)
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    check = check_of(name)
    assert (check.works, check.found) == (False, f"{module} is not installed")
    assert check.remedy == f"pip install 'ibnorm-export[{extra}]'"


def test_a_broken_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime_genai.py").write_text('raise OSError("libcuda.so:\\n  cannot open")\n')
    monkeypatch.delitem(sys.modules, "onnxruntime_genai", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    check = check_of("GenAI")
    assert (check.works, check.found) == (
        False,
        "onnxruntime_genai is installed, but does not load: libcuda.so: cannot open",
    )


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("1.31.0", ""),
        ("1.22.1", "it runs files up to opset 22; pip install -U onnxruntime, or export with --for 'ort>=1.22'"),
        ("1.17.3", "it is older than any that files were tried on; pip install -U onnxruntime"),
    ],
)
def test_an_older_onnxruntime(version: str, remedy: str) -> None:
    assert doctor._opset_limit(version) == remedy


def test_without_torch_the_diagnosis_is_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    diagnosis = doctor.diagnose()
    assert not diagnosis
    assert [check.found for check in diagnosis.checks if check.name == "PyTorch"] == ["torch is not installed"]


def test_a_missing_triton_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BackendUnavailable("no tritonserver on PATH: get one")

    monkeypatch.setattr(doctor, "find_triton", none)
    check = check_of("Triton server")
    assert (check.works, check.found, check.remedy) == (False, "no tritonserver on PATH", "get one")


@pytest.mark.parametrize("version", ["10.14.1", "12.0.0"])
def test_tensorrt_and_its_plugin(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    def found(runtime: Runtime) -> Any:
        if runtime is Runtime.TENSORRT:
            return SimpleNamespace(__version__=version)
        raise BackendUnavailable("tensorrt-rtx is not installed: pip install it")

    monkeypatch.setattr(doctor, "bindings", found)
    checks = {check.name: check for check in doctor._tensorrt()}
    assert (checks["tensorrt"].works, checks["tensorrt"].found) == (True, version)
    plugin = checks["TensorRT plugin library"]
    if version.startswith("12"):
        assert (plugin.works, "it supports versions 10 and 11" in plugin.found) == (False, True)
    else:
        assert (checks["tensorrt-rtx"].works, checks["tensorrt-rtx"].remedy) == (False, "pip install it")
        assert plugin.works == plugin_is_installed()


def plugin_is_installed() -> bool:
    try:
        native.trt_library()
    except BackendUnavailable:
        return False
    return True
