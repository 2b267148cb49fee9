"""What every runner offers, and the way from a backend's name to a runner."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable, IBNormError
from ibnorm_export.op import native

__all__ = ["BACKENDS", "DeviceRunner", "Endpoint", "Kernels", "NormExecution", "Runner", "fused_library", "open_runner"]

#: Backend names of the command line, and what they are.
BACKENDS: Final = {
    "ort-cpu": "ONNX Runtime on the CPU, all optimisations on",
    "ort-cuda": "ONNX Runtime on an NVIDIA GPU, inputs and outputs bound, passes replayed as CUDA graphs",
    "tensorrt": "TensorRT on an NVIDIA GPU",
    "tensorrt-rtx": "TensorRT-RTX on an NVIDIA GPU",
    "triton": "a running Triton server, at --url",
    "reference": "onnx.reference, the standard's own evaluator (slow)",
}


class Kernels(enum.StrEnum):
    """How the norms run where a backend has a choice."""

    AUTO = "auto"  # fused where the library is installed, else the function
    FUSED = "fused"  # an error where the library is not installed
    FUNCTION = "function"  # standard operators, as on a machine without the library


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model on a running server.

    Args:
        url: HOST:PORT for HTTP, grpc://HOST:PORT for gRPC.
        model: its name there; empty where the server has one model.
    """

    url: str
    model: str = ""


class Runner(Protocol):
    """Runs one model.

    Floating inputs may be of any floating type; a runner converts them to the model's. Outputs are
    in the type that the model computes, or float32 where NumPy lacks it (bfloat16).
    """

    @property
    def name(self) -> str:
        """Of the backend, e.g. "ort-cpu"."""

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for `inputs` by name."""


@runtime_checkable
class DeviceRunner(Protocol):
    """A runner on a device of its own: what `run` moves to and from the host is not part of its time."""

    def timed(self, inputs: Arrays) -> Callable[[], float]:
        """A pass over `inputs`, put on the device once: each call runs it and gives its time in ms."""


@dataclass(frozen=True, slots=True)
class NormExecution:
    """What ran for one norm.

    Args:
        module: path of the norm in the checkpoint.
        op_type: of its node.
        implementation: "fused" or "function".
        provider: the execution provider that ran it; empty for a function.
        expected: the provider that the backend is named for; empty accepts any.
        copies: between host and device, directly at its inputs and outputs.
    """

    module: str
    op_type: str
    implementation: str
    provider: str
    expected: str = ""
    copies: int = 0

    @property
    def problem(self) -> str:
        """Why this does not count as fused; empty where it does."""
        if self.implementation != "fused":
            return "ran as a function, not as a fused kernel"
        if self.expected and self.provider != self.expected:
            return f"ran on {self.provider}, not on {self.expected}"
        if self.copies:
            return f"ran fused, with {self.copies} memory copies between host and device beside it"
        return ""


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

            return OrtRunner(model.path, threads, fused_library(backend, kernels))
        if backend == "ort-cuda":
            from ibnorm_export.runtimes.ort_cuda import OrtCudaRunner

            return OrtCudaRunner(model.path, threads, fused_library(backend, kernels))
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

            return TrtRunner(backend, model, engine)
    except ModuleNotFoundError as error:
        extra = {"ort-cuda": "gpu", "triton": "serve"}.get(backend, "cpu")
        raise BackendUnavailable(
            f"backend {backend} needs the package {error.name}, which is not installed: "
            f"pip install 'ibnorm-export[{extra}]'"
        ) from error
    raise IBNormError(f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}")
