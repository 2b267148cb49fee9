"""What works on this machine, what does not, and what to install."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ibnorm_export import native
from ibnorm_export.engine import bindings
from ibnorm_export.engine_options import Runtime
from ibnorm_export.environment import environment, version_of
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.spec import SCHEMA

__all__ = ["Check", "Diagnosis", "diagnose"]


@dataclass(frozen=True, slots=True)
class Check:
    """One capability: whether it works, what was found, and what to do where it does not."""

    name: str
    works: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All checks; true when the main job (export, verify, bench on the CPU) works."""

    checks: tuple[Check, ...]
    environment: dict[str, Any]

    def __bool__(self) -> bool:
        return any(c.name == "ONNX Runtime" and c.works for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"works": bool(self), **asdict(self)}


def _onnxruntime() -> list[Check]:
    try:
        import onnxruntime as ort
    except ImportError as error:
        return [
            Check(
                "ONNX Runtime",
                False,
                f"not installed ({error})",
                "pip install 'ibnorm-export[cpu]', or 'ibnorm-export[gpu]' with an NVIDIA GPU, never both",
            )
        ]
    providers = ort.get_available_providers()
    both = version_of("onnxruntime") is not None and version_of("onnxruntime-gpu") is not None
    remedy = "uninstall onnxruntime and onnxruntime-gpu, then install one: they are the same module" if both else ""
    return [Check("ONNX Runtime", not both, f"{ort.__version__}, providers {', '.join(providers)}", remedy)]


def _fused_kernels() -> Check:
    library = native.availability()
    if library:
        return Check("Fused kernels for ONNX Runtime", True, f"{library}, schema version {SCHEMA['version']}")
    return Check("Fused kernels for ONNX Runtime", False, library.problem, library.remedy)


def _compiler() -> Check:
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    return Check(
        "torch.compile (bench --against torch.compile)",
        compiler is not None,
        f"compiler {compiler}" if compiler else "no C++ compiler on PATH",
        "" if compiler else "install g++ or clang++",
    )


def _gpu() -> Check:
    if torch.cuda.is_available():
        return Check("GPU", True, f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    built = torch.version.cuda
    if built is None:
        return Check("GPU", False, "torch is a CPU build", "only needed for GPU backends: install torch with CUDA")
    return Check("GPU", False, f"torch is built for CUDA {built}, but no device answers", "check the NVIDIA driver")


def _tensorrt() -> list[Check]:
    checks = []
    for runtime in Runtime:
        try:
            version = str(bindings(runtime).__version__)
        except BackendUnavailable as missing:
            found, _, remedy = str(missing).partition(": ")
            checks.append(Check(runtime.value, False, found, remedy))
            continue
        checks.append(Check(runtime.value, True, version))
        if runtime is Runtime.TENSORRT and (problem := native.plugin_problem(version)):
            checks.append(Check("TensorRT plugin library", False, problem))
            return checks
    try:
        checks.append(Check("TensorRT plugin library", True, f"{native.trt_library()}, version {SCHEMA['version']}"))
    except BackendUnavailable as missing:
        found, _, remedy = str(missing).partition("; ")
        checks.append(Check("TensorRT plugin library", False, found, remedy))
    return checks


def diagnose() -> Diagnosis:
    """Look at this machine; nothing is downloaded or changed."""
    checks = [
        Check("PyTorch", True, torch.__version__),
        *_onnxruntime(),
        _fused_kernels(),
        Check("onnx.reference", True, f"onnx {version_of('onnx')}"),
        _compiler(),
        _gpu(),
        *_tensorrt(),
    ]
    return Diagnosis(tuple(checks), environment())
