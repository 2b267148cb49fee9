"""How an engine is to be built."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ibnorm_export.errors import EngineError
from ibnorm_export.runtimes.tensorrt.profiles import Range

__all__ = ["EngineOptions", "NormRoute", "Runtime"]


class Runtime(enum.StrEnum):
    """Which TensorRT an engine is for."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class NormRoute(enum.StrEnum):
    """What runs a norm."""

    FUNCTION = "function"
    PLUGIN = "plugin"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to build.

    Args:
        runtime: which TensorRT.
        norm: how the norms run.
        ranges: sizes of dynamic axes; the others get defaults.
        workspace_bytes: most scratch memory of a layer, or None for the runtime's default.
        timing_cache: file to read and write measured times, or None. TensorRT alone: TensorRT-RTX measures nothing.
        embed_plugin: put the plugin library into the plan. TensorRT alone.
        compute_capabilities: GPUs to build for, as "sm_89"; empty is the runtime's default. TensorRT-RTX alone.
    """

    runtime: Runtime = Runtime.TENSORRT
    norm: NormRoute = NormRoute.AUTO
    _: KW_ONLY
    ranges: Sequence[Range] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    embed_plugin: bool = False
    compute_capabilities: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.runtime is Runtime.TENSORRT_RTX:
            if self.norm is NormRoute.PLUGIN or self.embed_plugin:
                raise EngineError("TensorRT-RTX runs no plugins: use --norm function, or --runtime tensorrt")
            if self.timing_cache is not None:
                raise EngineError("TensorRT-RTX measures nothing while it builds: leave out --timing-cache")
        elif self.compute_capabilities:
            raise EngineError(
                "TensorRT builds for the GPU at hand: leave out --compute-capability, or use tensorrt-rtx"
            )
        elif self.embed_plugin and self.norm is not NormRoute.PLUGIN:
            raise EngineError("--embed-plugin needs --norm plugin")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise EngineError(f"workspace is {self.workspace_bytes} bytes; it must be at least 1")
