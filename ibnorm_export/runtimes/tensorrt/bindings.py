"""The Python modules of TensorRT and TensorRT-RTX, and the logger that collects their errors."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final

from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.runtimes.tensorrt.options import Runtime

__all__ = ["bindings", "last_error", "logger"]

_MODULES: Final = {
    Runtime.TENSORRT: ("tensorrt", "tensorrt_bindings"),
    Runtime.TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


def bindings(runtime: Runtime) -> Any:
    """Import the Python module of a runtime.

    Raises:
        BackendUnavailable: it is not installed, or does not load.
    """
    for name in _MODULES[runtime]:
        try:
            module = importlib.import_module(name)
            if hasattr(module, "__version__"):  # a folder of that name on the path imports as an empty package
                return module
        except ModuleNotFoundError as error:
            if error.name != name:
                raise BackendUnavailable(f"{name} is installed, but the package {error.name} is missing") from error
        except (ImportError, OSError) as error:
            raise BackendUnavailable(f"{name} is installed, but does not load: {error}") from error
    raise BackendUnavailable(f"{runtime.value} is not installed: pip install 'ibnorm-export[{runtime.value}]'")


@functools.cache
def logger(trt: Any) -> Any:
    """Return the only logger of this process: TensorRT keeps the first one that it receives."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # a C++ module without types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Collector()


def last_error(trt: Any) -> str:
    """Return the last error that TensorRT logged."""
    errors = logger(trt).errors
    return str(errors[-1]) if errors else "TensorRT gives no reason"
