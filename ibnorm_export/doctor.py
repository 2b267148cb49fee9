"""What works on this machine, what does not, and what to install."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ibnorm_export.environment import environment, version_of
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.op import native
from ibnorm_export.op.spec import SCHEMA
from ibnorm_export.runtimes.tensorrt.bindings import bindings
from ibnorm_export.runtimes.tensorrt.options import Runtime
from ibnorm_export.serving.triton.binary import find_triton

__all__ = ["Check", "Diagnosis", "diagnose"]

#: What an extra brings: its modules with their distributions, and what for.
_EXTRAS: Final = (
    ("genai", "GenAI (--target ort-genai, generate, serve)", {"onnxruntime_genai": "onnxruntime-genai"}),
    ("serve", "text endpoint (serve GENAI_DIR)", {"fastapi": "fastapi", "uvicorn": "uvicorn"}),
    ("serve", "Triton's clients (verify --backend triton)", {"tritonclient.http": "tritonclient"}),
    ("vision", "checkpoints of timm", {"timm": "timm"}),
)


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
        needed = {"PyTorch", "ONNX Runtime"}
        return needed <= {check.name for check in self.checks if check.works}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"works": bool(self), **asdict(self)}


def _imported(modules: Sequence[str]) -> str:
    """Why one of them cannot be imported, or nothing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except (ImportError, OSError, RuntimeError) as error:  # of a native library, or of another build than torch's
            return f"{module} is installed, but does not load: {' '.join(str(error).split())}"
    return ""


def _torch() -> list[Check]:
    if why := _imported(["torch"]):
        return [Check("PyTorch", False, why, "pip install torch, from the index of your CPU or CUDA build")]
    import torch

    check = Check("PyTorch", True, torch.__version__)
    if torch.cuda.is_available():
        return [check, Check("GPU", True, f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")]
    if torch.version.cuda is None:
        why, remedy = "torch is a CPU build", "only needed for GPU backends: install torch with CUDA"
    else:
        why, remedy = f"torch is built for CUDA {torch.version.cuda}, but no device answers", "check the NVIDIA driver"
    return [check, Check("GPU", False, why, remedy)]


def _extras() -> list[Check]:
    checks = []
    for extra, name, packages in _EXTRAS:
        why = _imported(list(packages))
        found = ", ".join(f"{package} {version_of(package)}" for package in packages.values())
        checks.append(Check(name, not why, why or found, f"pip install 'ibnorm-export[{extra}]'" if why else ""))
    return checks


def _triton() -> Check:
    try:
        binary = find_triton()
    except BackendUnavailable as missing:
        found, _, remedy = str(missing).partition(": ")
        return Check("Triton (serve)", False, found, remedy)
    return Check("Triton (serve)", True, str(binary.path))


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
    torch, *gpu = _torch()
    checks = [
        torch,
        *_onnxruntime(),
        _fused_kernels(),
        Check("onnx.reference", True, f"onnx {version_of('onnx')}"),
        _compiler(),
        *_extras(),
        _triton(),
        *gpu,
        *_tensorrt(),
    ]
    return Diagnosis(tuple(checks), environment())
