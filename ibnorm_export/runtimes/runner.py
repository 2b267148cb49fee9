"""What every runner offers, and the way from a backend's name to a runner."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ibnorm_export.artifacts.tensors import Arrays

__all__ = ["DeviceRunner", "Endpoint", "Kernels", "Runner"]


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
