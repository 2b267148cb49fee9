"""From a backend's name to a runner."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import BackendUnavailable, IBNormError
from ibnorm_export.op import native
from ibnorm_export.runtimes.runner import Endpoint, Kernels, Runner

__all__ = ["BACKENDS", "fused_library", "open_runner"]


#: Backend names of the command line, and what they are.
BACKENDS: Final = {
    "ort-cpu": "ONNX Runtime on the CPU, all optimisations on",
    "ort-cuda": "ONNX Runtime on an NVIDIA GPU, inputs and outputs bound, passes replayed as CUDA graphs",
    "tensorrt": "TensorRT on an NVIDIA GPU",
    "tensorrt-rtx": "TensorRT-RTX on an NVIDIA GPU",
    "triton": "a running Triton server, at --url",
    "reference": "onnx.reference, the standard's own evaluator (slow)",
}


def fused_library(backend: str, kernels: Kernels) -> Path | None:
    """The library of fused kernels that a backend is given, or None for functions.

    Raises:
        BackendUnavailable: fused kernels are demanded and cannot be used here.
        IBNormError: they are demanded of a backend that has none.
    """
    if not backend.startswith("ort-"):
        if kernels is Kernels.FUSED:
            raise IBNormError(
                f"fused kernels are ONNX Runtime's, and backend {backend} has none: leave --kernels fused out, or take "
                "--backend ort-cpu"
            )
        return None
    if kernels is Kernels.FUNCTION:
        return None
    if kernels is Kernels.FUSED:
        return native.ort_library()
    return native.availability().path if native.availability() else None


def open_runner(
    backend: str,
    model: ExportedModel,
    *,
    threads: int | None = None,
    kernels: Kernels = Kernels.AUTO,
    endpoint: Endpoint | None = None,
    engine: Path | None = None,
) -> Runner:
    """A runner for `model` on the named backend.

    Args:
        backend: a key of `BACKENDS`.
        model: what to run.
        threads: of the runtime; None is its default.
        kernels: how the norms run.
        endpoint: of the server, for backend "triton".
        engine: built from `model` before, for TensorRT; None builds one.

    Raises:
        IBNormError: there is no such backend, it needs an endpoint, or takes no engine.
        EngineError: the engine is not one of this file, runtime, version and GPU.
        BackendUnavailable: the runtime is not installed here.
        ModelFileError: the runtime cannot load the model.
    """
    if engine is not None and backend not in ("tensorrt", "tensorrt-rtx"):
        raise IBNormError(f"backend {backend} takes no engine: use --backend tensorrt or tensorrt-rtx with --engine")
    try:
        if backend == "ort-cpu":
            from ibnorm_export.runtimes.ort import OrtRunner

            return OrtRunner(model.path, threads, library=fused_library(backend, kernels))
        if backend == "ort-cuda":
            from ibnorm_export.runtimes.ort_cuda import OrtCudaRunner

            return OrtCudaRunner(model.path, threads, library=fused_library(backend, kernels))
        if backend == "reference":
            from ibnorm_export.runtimes.reference import ReferenceRunner

            return ReferenceRunner(model)
        if backend == "triton":
            if endpoint is None:
                raise IBNormError(
                    "backend triton needs a running server: ibnorm-export verify MODEL CHECKPOINT --backend triton "
                    "--url HOST:PORT"
                )
            from ibnorm_export.runtimes.triton import TritonRunner

            return TritonRunner(model, endpoint)
        if backend in ("tensorrt", "tensorrt-rtx"):
            from ibnorm_export.runtimes.tensorrt.runner import TrtRunner

            return TrtRunner(backend, model, engine=engine)
    except ModuleNotFoundError as error:
        extra = {"ort-cuda": "gpu", "triton": "serve"}.get(backend, "cpu")
        raise BackendUnavailable(
            f"backend {backend} needs the package {error.name}, which is not installed: "
            f"pip install 'ibnorm-export[{extra}]'"
        ) from error
    raise IBNormError(f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}")
