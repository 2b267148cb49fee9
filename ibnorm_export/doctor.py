"""What works on this machine, what does not, and what to install."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Final

from ibnorm_export.artifacts.runtime_versions import newest_opset, version_numbers
from ibnorm_export.environment import environment, version_of
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op import native
from ibnorm_export.op.onnx_functions import OPSETS
from ibnorm_export.op.spec import SCHEMA
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.node.packages import PACKAGES, find_node, find_package
from ibnorm_export.runtimes.tensorrt.bindings import bindings
from ibnorm_export.runtimes.tensorrt.options import Runtime
from ibnorm_export.serving.triton.binary import find_triton
from ibnorm_export.serving.triton.containers import server_runtime
from ibnorm_export.text_report import Report

__all__ = ["Check", "Diagnosis", "diagnose"]

#: Without these, neither export nor verify nor bench works.
_REQUIRED: Final = frozenset({"PyTorch", "ONNX Runtime"})


@dataclass(frozen=True, slots=True)
class Check:
    """One capability.

    Args:
        name: what it is, and which command needs it.
        works: whether it can be used.
        found: the version or path that was found, or why it cannot be used.
        remedy: what to do if it cannot be used.
        code: the finding's code; None if nothing is missing.
    """

    name: str
    works: bool
    _: KW_ONLY
    found: str
    remedy: str = ""
    code: FindingCode | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis(Report):
    """All checks; true if export, verify and bench work on the CPU.

    Args:
        checks: each part, and whether it works.
        environment: machine and package versions.
    """

    checks: tuple[Check, ...]
    environment: dict[str, Any]

    def __bool__(self) -> bool:
        return {check.name for check in self.checks if check.works} >= _REQUIRED

    @property
    def code(self) -> FindingCode | None:
        """The code of what keeps export, verify and bench from working; None if they work."""
        return next((check.code for check in self.checks if check.name in _REQUIRED and not check.works), None)

    def to_dict(self) -> dict[str, Any]:
        """Return what `doctor --json` prints."""
        return {"works": bool(self), **asdict(self)}

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            lines.append(f"{'ok     ' if check.works else 'missing'} {check.name}: {check.found}")
            if check.remedy:
                lines.append(f"        {check.remedy}{f' [{check.code}]' if check.code else ''}")
        about = self.environment
        lines.append(
            f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, Python {about['python']}"
        )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Optional:
    """An optional part of this package.

    Args:
        name: what it is for.
        extra: extra that installs it.
        packages: its packages, by the module to import.
    """

    name: str
    extra: str
    packages: dict[str, str]

    def check(self) -> Check:
        """Import its modules."""
        problem = _import_problem(list(self.packages))
        found = ", ".join(f"{package} {version_of(package)}" for package in self.packages.values())
        remedy = f"pip install 'ibnorm-export[{self.extra}]'" if problem else ""
        code = FindingCode.NO_OPTIONAL_PACKAGE if problem else None
        return Check(self.name, not problem, found=problem or found, remedy=remedy, code=code)


_OPTIONAL: Final = (
    _Optional(
        "GenAI (export --target ort-genai, generate, serve)", "genai", {"onnxruntime_genai": "onnxruntime-genai"}
    ),
    _Optional("OpenVINO (--backend openvino)", "openvino", {"openvino": "openvino"}),
    _Optional("text endpoint (serve GENAI_DIR)", "serve", {"fastapi": "fastapi", "uvicorn": "uvicorn"}),
    _Optional("Triton's clients (verify --backend triton)", "serve", {"tritonclient.http": "tritonclient"}),
    _Optional("checkpoints of timm", "vision", {"timm": "timm"}),
    _Optional("plots in HTML reports (--report)", "plots", {"matplotlib": "matplotlib"}),
    _Optional("demo", "demo", {"sklearn": "scikit-learn"}),
)


def diagnose(*, progress: Progress = silent) -> Diagnosis:
    """Check this machine, without downloading or changing anything.

    Args:
        progress: receives the progress of the work.
    """
    steps: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("PyTorch", _torch),
        ("ONNX Runtime", _onnxruntime),
        ("fused kernels", lambda: [_fused_kernels()]),
        ("onnx", lambda: [Check("onnx.reference", True, found=f"onnx {version_of('onnx')}")]),
        *((part.name, lambda part=part: [part.check()]) for part in _OPTIONAL),
        ("Node", _node),
        ("Triton", lambda: [_triton()]),
        ("compilers", _compilers),
        ("TensorRT", _tensorrt),
    ]
    found: dict[str, list[Check]] = {}
    for done, (name, check) in enumerate(steps):
        progress(f"checking {name}", done, len(steps))
        found[name] = list(check())
    torch, *gpu = found.pop("PyTorch")
    tensorrt = found.pop("TensorRT")
    checks = [torch, *(one for group in found.values() for one in group), *gpu, *tensorrt]
    return Diagnosis(tuple(checks), environment())


def _import_problem(modules: Sequence[str]) -> str:
    """Return why one of the modules cannot be imported; empty if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except (ImportError, OSError, RuntimeError) as error:  # a native library is missing, or needs another torch
            return f"{module} is installed, but does not load: {' '.join(str(error).split())}"
    return ""


def _torch() -> list[Check]:
    if problem := _import_problem(["torch"]):
        remedy = "pip install torch, from the index for your CPU or CUDA version"
        return [Check("PyTorch", False, found=problem, remedy=remedy, code=FindingCode.NO_PYTORCH)]
    import torch

    check = Check("PyTorch", True, found=torch.__version__)
    if torch.cuda.is_available():
        return [check, Check("GPU", True, found=f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")]
    found, remedy = "torch is a CPU build", "for GPU backends, install torch with CUDA"
    if torch.version.cuda is not None:
        found = f"torch is built for CUDA {torch.version.cuda}, but finds no GPU"
        remedy = "check the NVIDIA driver with nvidia-smi"
    return [check, Check("GPU", False, found=found, remedy=remedy, code=FindingCode.NO_GPU)]


def _onnxruntime() -> list[Check]:
    name = "ONNX Runtime"
    if problem := _import_problem(["onnxruntime"]):
        remedy = "pip install 'ibnorm-export[cpu]', or 'ibnorm-export[gpu]' with an NVIDIA GPU, but not both"
        return [Check(name, False, found=problem, remedy=remedy, code=FindingCode.NO_ONNXRUNTIME)]
    import onnxruntime as ort

    found = f"{ort.__version__}, providers {', '.join(ort.get_available_providers())}"
    if version_of("onnxruntime") is not None and version_of("onnxruntime-gpu") is not None:
        remedy = "onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall both, then install one of them"
        return [Check(name, False, found=found, remedy=remedy, code=FindingCode.TWO_ONNXRUNTIMES)]
    limit = _opset_limit(ort.__version__)
    return [Check(name, True, found=found, remedy=limit, code=FindingCode.OLD_ONNXRUNTIME if limit else None)]


def _opset_limit(version: str) -> str:
    """What an old ONNX Runtime does not run; empty if it runs every file."""
    numbers = version_numbers(version)
    newest = newest_opset(numbers)
    if newest >= OPSETS.stop - 1:
        return ""
    if newest == 0:  # no file is exported for it
        return "it is older than any that files were tried on; pip install -U onnxruntime"
    oldest = ".".join(map(str, numbers[:2]))
    return f"it runs files up to opset {newest}; pip install -U onnxruntime, or export with --for 'ort>={oldest}'"


def _fused_kernels() -> Check:
    library = native.availability()
    name = "fused kernels for ONNX Runtime"
    if library:
        return Check(name, True, found=f"{library}, schema version {SCHEMA['version']}")
    return Check(name, False, found=library.problem, remedy=library.remedy, code=FindingCode.NO_FUSED_KERNELS)


def _node() -> Iterator[Check]:
    """Look for Node, and for its packages where the backends do without --npm."""
    for backend, package in PACKAGES.items():
        name = f"{package} (--backend {backend})"
        try:
            find_node(backend)
            found = find_package(backend)
        except BackendUnavailable as error:
            problem, _, remedy = str(error).partition(": ")
            yield Check(name, False, found=problem, remedy=remedy, code=FindingCode.NO_NODE_PACKAGE)
        else:
            yield Check(name, True, found=f"{found.version} in {found.folder}")


def _triton() -> Check:
    try:
        binary = find_triton()
    except BackendUnavailable as error:
        found, _, remedy = str(error).partition(": ")
        return Check("Triton server (serve)", False, found=found, remedy=remedy, code=FindingCode.NO_TRITON)
    runtime = server_runtime(binary)
    found = f"{binary.path}, ONNX Runtime {runtime}" if runtime else str(binary.path)
    return Check("Triton server (serve)", True, found=found)


def _compilers() -> list[Check]:
    """Look for what torch.compile and a build of the native libraries need."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    found = f"compiler {compiler}" if compiler else "no C++ compiler on PATH"
    remedy = "" if compiler else "install g++ or clang++ with your system's package manager"
    return [
        Check(
            "torch.compile (bench --against torch.compile)",
            compiler is not None,
            found=found,
            remedy=remedy,
            code=None if compiler else FindingCode.NO_COMPILER,
        ),
        _tool("cmake", "CMake (make native)", remedy="pip install cmake"),
        _tool(
            "nvcc", "CUDA compiler (make native-cuda)", remedy="install the CUDA toolkit; only needed for GPU kernels"
        ),
    ]


def _tool(command: str, name: str, *, remedy: str) -> Check:
    path = shutil.which(command)
    if path is not None:
        return Check(name, True, found=path)
    return Check(name, False, found=f"no {command} on PATH", remedy=remedy, code=FindingCode.NO_COMPILER)


def _tensorrt() -> list[Check]:
    checks = []
    for runtime in Runtime:
        try:
            version = str(bindings(runtime).__version__)
        except BackendUnavailable as error:
            found, _, remedy = str(error).partition(": ")
            checks.append(Check(runtime.value, False, found=found, remedy=remedy, code=FindingCode.NO_TENSORRT))
            continue
        checks.append(Check(runtime.value, True, found=version))
        if runtime is Runtime.TENSORRT and (problem := native.plugin_problem(version)):
            checks.append(Check("TensorRT plugin library", False, found=problem, code=FindingCode.NO_TENSORRT_PLUGIN))
            return checks
    return [*checks, _plugin()]


def _plugin() -> Check:
    try:
        library = native.trt_library()
    except BackendUnavailable as error:
        found, _, remedy = str(error).partition("; ")
        code = FindingCode.NO_TENSORRT_PLUGIN
        return Check("TensorRT plugin library", False, found=found, remedy=remedy, code=code)
    return Check("TensorRT plugin library", True, found=f"{library}, version {SCHEMA['version']}")
