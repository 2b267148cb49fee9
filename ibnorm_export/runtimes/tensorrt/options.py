"""Options for building an engine."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ibnorm_export.choices import choice, whole_number
from ibnorm_export.errors import EngineError
from ibnorm_export.runtimes.tensorrt.profiles import Range, parse_ranges

__all__ = ["EngineOptions", "NormRoute", "Runtime"]


class Runtime(enum.StrEnum):
    """The runtime that runs an engine."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class NormRoute(enum.StrEnum):
    """How the norms of an engine run."""

    FUNCTION = "function"  # fused by TensorRT's compiler
    PLUGIN = "plugin"  # the CUDA kernels of this project
    AUTO = "auto"  # chosen by this package, which takes the function


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of `build_engine`.

    Args:
        runtime: the runtime to build for.
        norm: how the norms run.
        ranges: sizes of dynamic axes, as `Range` or as text "[PROFILE:]AXIS=MINxOPTxMAX"; other axes get defaults.
        workspace_bytes: maximum scratch memory of a layer; None is the runtime's default.
        timing_cache: file from which measured times are read and to which they are written; None uses no file.
            TensorRT only: TensorRT-RTX measures nothing.
        embed_plugin: put the plugin library into the plan. TensorRT only.
        compute_capabilities: GPUs to build for, e.g. ("sm_89", "sm_120") or "sm_89,sm_120"; empty is the runtime's
            default. TensorRT-RTX only.

    Raises:
        EngineError: a value is outside its range, or the options do not fit together.
    """

    runtime: Runtime = Runtime.TENSORRT
    norm: NormRoute = NormRoute.AUTO
    _: KW_ONLY
    ranges: Sequence[Range | str] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    embed_plugin: bool = False
    compute_capabilities: Sequence[str] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "runtime", choice(Runtime, self.runtime, name="runtime", error=EngineError))
        object.__setattr__(self, "norm", choice(NormRoute, self.norm, name="norm", error=EngineError))
        if self.timing_cache is not None:
            object.__setattr__(self, "timing_cache", Path(self.timing_cache))
        object.__setattr__(self, "ranges", parse_ranges(self.ranges))
        if isinstance(self.compute_capabilities, str):
            names = (name.strip() for name in self.compute_capabilities.split(","))
            object.__setattr__(self, "compute_capabilities", tuple(name for name in names if name))
        self._check()

    def _check(self) -> None:
        if self.runtime is Runtime.TENSORRT_RTX:
            if self.norm is NormRoute.PLUGIN or self.embed_plugin:
                raise EngineError('TensorRT-RTX has no plugins: choose norm "function", or runtime "tensorrt"')
            if self.timing_cache is not None:
                raise EngineError("TensorRT-RTX measures nothing during a build: leave out the timing cache")
        elif self.compute_capabilities:
            raise EngineError(
                "TensorRT builds only for this machine's GPU: leave out the compute capabilities, or choose runtime "
                '"tensorrt-rtx"'
            )
        elif self.embed_plugin and self.norm is not NormRoute.PLUGIN:
            raise EngineError('embedding the plugin needs norm "plugin"')
        if self.workspace_bytes is not None:
            whole_number(self.workspace_bytes, name="workspace_bytes", least=1, error=EngineError)
