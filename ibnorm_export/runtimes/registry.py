"""The table of backends, and how to open a runner by a backend's name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.runtime_versions import ONNX_RUNTIME, check_installed
from ibnorm_export.errors import BackendUnavailable, IBNormError, quoted
from ibnorm_export.op import native
from ibnorm_export.optional_packages import demand_package
from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels, Runner

__all__ = ["BACKENDS", "BackendInfo", "RunnerRequest", "check_backend", "fused_library", "open_runner"]


@dataclass(frozen=True, slots=True)
class RunnerRequest:
    """What a backend's opener receives.

    Args:
        model: the model to run.
        threads: number of threads; None is the runtime's default.
        library: fused kernels to register; None runs the norms as functions.
        endpoint: the running server, for Triton.
        engine: an existing engine of `model`, for TensorRT; None builds one.
        provider: an execution provider of ONNX Runtime; None is the backend's own.
        npm: the folder given to `npm install --prefix`; None looks where Node does.
        spins: whether threads without work spin for a while, on the CPU, as they do where a model is served.
        maps_weights: whether ONNX Runtime on the CPU holds no copy of external weights, which is slower.
    """

    model: ExportedModel
    threads: int | None = None
    _: KW_ONLY
    library: Path | None = None
    endpoint: Endpoint | None = None
    engine: Path | None = None
    provider: str | None = None
    npm: Path | None = None
    spins: bool = True
    maps_weights: bool = False


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One row of the table.

    Args:
        backend: the backend.
        description: what it is, in a few words.
        extra: extra of this package that installs it, as in `pip install 'ibnorm-export[EXTRA]'`.
        opener: opens a runner; imports the runtime only when it is called.
        runs_fused_kernels: whether it can use the fused kernels for ONNX Runtime.
        takes_engine: whether it can run an existing engine.
        needs_endpoint: whether it needs the address of a running server.
        takes_provider: whether it can use a chosen execution provider.
        takes_npm: whether it runs an npm package in Node.
        rounds: whether it computes a half-precision file in that type, not in float32 without rounding between nodes.
        module: the Python module that it imports; None where it has more than one name, or is always there.
    """

    backend: Backend
    description: str
    _: KW_ONLY
    extra: str
    opener: Callable[[RunnerRequest], Runner]
    runs_fused_kernels: bool = False
    takes_engine: bool = False
    needs_endpoint: bool = False
    takes_provider: bool = False
    takes_npm: bool = False
    rounds: bool = True
    module: str | None = None


def _open_ort_cpu(request: RunnerRequest) -> Runner:
    from ibnorm_export.runtimes.ort import OrtRunner

    check_installed(request.model, ONNX_RUNTIME)
    return OrtRunner(
        request.model.path,
        request.threads,
        library=request.library,
        data_folder=request.model.data_folder,
        spins=request.spins,
        maps_weights=request.maps_weights,
        provider=request.provider,
    )


def _open_ort_cuda(request: RunnerRequest) -> Runner:
    from ibnorm_export.runtimes.ort_cuda import OrtCudaRunner

    check_installed(request.model, ONNX_RUNTIME)
    return OrtCudaRunner(request.model.path, request.threads, library=request.library)


def _open_node(backend: Backend, request: RunnerRequest) -> Runner:
    from ibnorm_export.runtimes.node.runner import NodeRunner

    return NodeRunner(backend, request.model, threads=request.threads, npm=request.npm)


def _open_tensorrt(request: RunnerRequest) -> Runner:
    from ibnorm_export.runtimes.tensorrt.runner import TrtRunner

    return TrtRunner(Backend.TENSORRT, request.model, engine=request.engine)


def _open_tensorrt_rtx(request: RunnerRequest) -> Runner:
    from ibnorm_export.runtimes.tensorrt.runner import TrtRunner

    return TrtRunner(Backend.TENSORRT_RTX, request.model, engine=request.engine)


def _open_triton(request: RunnerRequest) -> Runner:
    if request.endpoint is None:
        raise IBNormError(
            f"backend {Backend.TRITON} needs the running server of {request.model.path}: add --url HOST:PORT, and "
            "--name MODEL if it serves several models"
        )
    from ibnorm_export.runtimes.triton import TritonRunner

    return TritonRunner(request.model, request.endpoint)


def _open_openvino(request: RunnerRequest) -> Runner:
    from ibnorm_export.runtimes.openvino import OpenVinoRunner

    return OpenVinoRunner(request.model, request.threads)


def _open_reference(request: RunnerRequest) -> Runner:
    from ibnorm_export.runtimes.reference import ReferenceRunner

    return ReferenceRunner(request.model)


_ROWS: Final = (
    BackendInfo(
        Backend.ORT_CPU,
        "ONNX Runtime on the CPU with all optimisations",
        extra="cpu",
        opener=_open_ort_cpu,
        module="onnxruntime",
        runs_fused_kernels=True,
        takes_provider=True,
        rounds=False,
    ),
    BackendInfo(
        Backend.ORT_CUDA,
        "ONNX Runtime on an NVIDIA GPU with bound inputs and outputs and CUDA graphs",
        extra="gpu",
        opener=_open_ort_cuda,
        module="onnxruntime",
        runs_fused_kernels=True,
    ),
    BackendInfo(
        Backend.ORT_WEB,
        "ONNX Runtime in WebAssembly, as in a browser, in Node",
        extra="cpu",
        opener=functools.partial(_open_node, Backend.ORT_WEB),
        takes_npm=True,
        rounds=False,
    ),
    BackendInfo(
        Backend.ORT_NODE,
        "ONNX Runtime for Node",
        extra="cpu",
        opener=functools.partial(_open_node, Backend.ORT_NODE),
        takes_npm=True,
        rounds=False,
    ),
    BackendInfo(
        Backend.TENSORRT, "TensorRT on an NVIDIA GPU", extra="tensorrt", opener=_open_tensorrt, takes_engine=True
    ),
    BackendInfo(
        Backend.TENSORRT_RTX,
        "TensorRT-RTX on an NVIDIA GPU",
        extra="tensorrt-rtx",
        opener=_open_tensorrt_rtx,
        takes_engine=True,
    ),
    BackendInfo(
        Backend.TRITON,
        "a running Triton server, at --url",
        extra="serve",
        opener=_open_triton,
        needs_endpoint=True,
        module="tritonclient",
    ),
    BackendInfo(
        Backend.OPENVINO,
        "OpenVINO on the CPU, in float32",
        extra="openvino",
        opener=_open_openvino,
        rounds=False,
        module="openvino",
    ),
    BackendInfo(
        Backend.REFERENCE, "onnx.reference, the standard's own evaluator (slow)", extra="cpu", opener=_open_reference
    ),
)

#: Every backend by its name on the command line.
BACKENDS: Final[Mapping[str, BackendInfo]] = {row.backend: row for row in _ROWS}


def _row(backend: str) -> BackendInfo:
    if backend not in BACKENDS:
        raise IBNormError(f"there is no backend {quoted(backend)}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[backend]


def fused_library(backend: str, kernels: Kernels, *, provider: str | None = None) -> Path | None:
    """Return the library of fused kernels that a backend should register, or None to run the norms as functions.

    With a chosen execution provider the norms run there, as functions.

    Raises:
        BackendUnavailable: fused kernels are required but cannot be used on this machine.
        IBNormError: there is no such backend, or fused kernels are required and it cannot run them.
    """
    if not _row(backend).runs_fused_kernels:
        if kernels is Kernels.FUSED:
            raise IBNormError(
                f"backend {backend} cannot run the fused kernels, which are for ONNX Runtime: leave out "
                "--kernels fused, or use --backend ort-cpu"
            )
        return None
    if provider is not None and kernels is Kernels.FUSED:
        raise IBNormError(f"the fused kernels do not run on {provider}: leave out --kernels fused, or --provider")
    if kernels is Kernels.FUNCTION or provider is not None:
        return None
    if kernels is Kernels.FUSED:
        return native.ort_library()
    return native.availability().path if native.availability() else None


def check_backend(
    backend: str, *, engine: Path | None = None, provider: str | None = None, npm: Path | None = None
) -> None:
    """Raise the errors of `open_runner` that need no model, before long work.

    Args:
        backend: a `Backend` or its name.
        engine, provider, npm: as in `open_runner`.

    Raises:
        IBNormError: there is no such backend, or it does not take one of the arguments.
        BackendUnavailable: a package or program that it runs is not installed.
    """
    row = _row(backend)
    if engine is not None and not row.takes_engine:
        raise IBNormError(f"backend {backend} takes no engine: use --backend tensorrt or tensorrt-rtx with --engine")
    if provider is not None and not row.takes_provider:
        raise IBNormError(f"backend {backend} takes no execution provider: use --backend ort-cpu with --provider")
    if npm is not None and not row.takes_npm:
        raise IBNormError(f"backend {backend} runs no npm package: use --backend ort-web or ort-node with --npm")
    if row.module is not None:
        demand_package(row.module, extra=row.extra, purpose=f"backend {backend}")
    if row.takes_engine:
        from ibnorm_export.runtimes.tensorrt.bindings import bindings
        from ibnorm_export.runtimes.tensorrt.options import Runtime

        bindings(Runtime(backend))
    if row.takes_npm:
        from ibnorm_export.runtimes.node.packages import find_node, find_package

        find_node(backend)
        find_package(row.backend, npm)


def open_runner(
    backend: str,
    model: ExportedModel,
    *,
    threads: int | None = None,
    kernels: Kernels = Kernels.AUTO,
    endpoint: Endpoint | None = None,
    engine: Path | None = None,
    provider: str | None = None,
    npm: Path | None = None,
    spins: bool = True,
    maps_weights: bool = False,
) -> Runner:
    """Open a runner for `model` on a backend.

    Args:
        backend: a `Backend` or its name.
        model: the model to run.
        threads: number of threads of the runtime; None is its default.
        kernels: how the norms should run.
        endpoint: the running server, for backend "triton".
        engine: an existing engine of `model`, for TensorRT; None builds one.
        provider: an execution provider of the installed ONNX Runtime, for "ort-cpu", e.g. "WebGpuExecutionProvider".
        npm: the folder given to `npm install --prefix`, for "ort-web" and "ort-node"; None looks where Node does.
        spins, maps_weights: as in `RunnerRequest`.

    Raises:
        IBNormError: there is no such backend, it needs an endpoint, or it does not take one of the arguments.
        EngineError: the engine was built for another file, runtime, version or GPU.
        BackendUnavailable: the runtime is not installed, or too old for the file.
        ModelFileError: the runtime cannot load the model.
    """
    check_backend(backend, engine=engine, provider=provider, npm=npm)
    row = _row(backend)
    request = RunnerRequest(
        model,
        threads,
        library=fused_library(backend, kernels, provider=provider),
        endpoint=endpoint,
        engine=engine,
        provider=provider,
        npm=npm,
        spins=spins,
        maps_weights=maps_weights,
    )
    try:
        return row.opener(request)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"backend {backend} needs the package {error.name}, which is not installed: "
            f"pip install 'ibnorm-export[{row.extra}]'"
        ) from error
