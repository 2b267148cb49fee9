"""The interface of every runner, and the types with which a caller chooses one."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import IBNormError

__all__ = ["Backend", "DeviceRunner", "Endpoint", "Kernels", "NormImplementation", "Runner"]


class Backend(enum.StrEnum):
    """What runs a model; `registry.BACKENDS` describes each."""

    ORT_CPU = "ort-cpu"
    ORT_CUDA = "ort-cuda"
    ORT_WEB = "ort-web"
    ORT_NODE = "ort-node"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    TRITON = "triton"
    OPENVINO = "openvino"
    REFERENCE = "reference"


class Kernels(enum.StrEnum):
    """How the norms should run on a backend that has a choice."""

    AUTO = "auto"  # fused if the library is installed, otherwise the function
    FUSED = "fused"  # an error if the library is not installed
    FUNCTION = "function"  # standard operators, as on a machine without the library


class NormImplementation(enum.StrEnum):
    """How a norm ran."""

    FUSED = "fused"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model on a running Triton server.

    Args:
        url: HOST:PORT for HTTP, grpc://HOST:PORT for gRPC.
        model: the model's name on the server; may be empty if the server has only one model.

    Raises:
        IBNormError: the address has a user name or a password, which reports and messages would show.
    """

    url: str
    model: str = ""

    def __post_init__(self) -> None:
        if "@" in self.url:
            raise IBNormError(
                "the address of the Triton server (--url) has a user name or a password, which reports would show; it "
                "must be HOST:PORT (HTTP) or grpc://HOST:PORT"
            )


class Runner(Protocol):
    """Runs one model.

    Floating-point inputs may have any floating-point type; a runner converts them to the model's. Outputs have
    the type in which the model computes, or float32 if NumPy has no such type (bfloat16).
    """

    @property
    def name(self) -> str:
        """Name of the backend, e.g. "ort-cpu"."""

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs by name for `inputs` by name."""


@runtime_checkable
class DeviceRunner(Protocol):
    """A runner whose device has its own memory: copies to and from the host are not part of its time."""

    def timed(self, inputs: Arrays) -> Callable[[], float]:
        """Copy `inputs` to the device once, and return a function that runs one pass and returns its time in ms."""
