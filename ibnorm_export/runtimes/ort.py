"""ONNX Runtime on the CPU as a runner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ibnorm_export.artifacts.axes import CAPACITY
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable, ModelFileError, quoted
from ibnorm_export.runtimes.in_place import CachePasser
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.usable_cores import default_threads

__all__ = [
    "CPU_PROVIDER",
    "LEVELS",
    "MissingKernelError",
    "OrtError",
    "OrtRunner",
    "first_line",
    "open_session",
    "read_profile",
    "session_options",
]

#: Every exception class of ONNX Runtime.
OrtError = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoModel,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    state.EPFail,
)

CPU_PROVIDER: Final = "CPUExecutionProvider"

#: Optimisation levels, lowest first; models are served at the last one.
LEVELS: Final = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

#: The largest constant that a session with mapped weights computes when it is opened, in bytes.
_MOST_FOLDED: Final = 1 << 16

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class MissingKernelError(ModelFileError):
    """The types of a model agree, but the runtime has no kernel for an operator in one of them."""


def session_options(
    threads: int | None, profile: Path | None, *, spins: bool = True, prepacks: bool = True, maps_weights: bool = False
) -> ort.SessionOptions:
    """Make the options of a session.

    Args:
        threads: number of threads; None is the runtime's default, or fewer where the process may use fewer cores.
        profile: prefix of the profile that the session writes; None writes no profile.
        spins: whether threads without work spin for a while, which is fast and takes processor time from others.
        prepacks: whether weights are copied into the layout that the kernels prefer, which is fast and takes memory.
        maps_weights: whether the session holds no copy of weights that are external data: they stay mapped, and what
            the graph computes from them is computed anew in every pass. It is slower.
    """
    options = ort.SessionOptions()
    if maps_weights:
        prepacks = False
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(_MOST_FOLDED))
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # both keep memory between uses
    if not spins:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepacks:
        options.add_session_config_entry("session.disable_prepacking", "1")
    threads = default_threads() if threads is None else threads
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def open_session(
    source: Path | bytes,
    options: ort.SessionOptions,
    *,
    library: Path | None,
    providers: Sequence[Any],
    level: str = "all",
    data_folder: Path | None = None,
) -> ort.InferenceSession:
    """Open a session.

    Args:
        source: a file, or a serialised model.
        options: options from `session_options`; the level and the library are added to them.
        library: fused kernels to register; None runs the norms as functions.
        providers: execution providers, as ONNX Runtime takes them.
        level: optimisation level, a key of `LEVELS`.
        data_folder: folder of the external data; None is that of the file.

    Raises:
        MissingKernelError: the runtime has no kernel for an operator, e.g. in bfloat16 on a CPU.
        ModelFileError: the runtime cannot load the model; the message quotes the runtime's own.
    """
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4  # errors are raised as exceptions; the log would repeat them
    label = "the model" if isinstance(source, bytes) else str(source)
    if isinstance(source, Path) and data_folder not in (None, source.parent):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data_folder))
        source = source.read_bytes()  # of a file itself, the runtime takes data from its own folder only
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=list(providers)
        )
    except OrtError as error:
        kind = MissingKernelError if isinstance(error, state.NotImplemented) else ModelFileError
        raise kind(f"{label}: ONNX Runtime cannot load it: {first_line(error)}") from error


class OrtRunner:
    """An ONNX Runtime session on the CPU.

    A static cache is passed and returned like a dynamic one: each pass copies it into a buffer and out again.
    `generation.ort_session` binds the buffer instead.

    Args:
        source: a file, or a serialised model.
        threads: number of threads; None is the runtime's default.
        library: fused kernels to register; None runs the norms as functions.
        data_folder: as in `open_session`.
        profile: prefix of the file to which `end_profile` writes the session's profile; None writes no profile.
        level: optimisation level, a key of `LEVELS`; models are served at the default.
        spins, prepacks, maps_weights: as in `session_options`.
        provider: an execution provider to use where it can run a node, e.g. "OpenVINOExecutionProvider"; the others run
            on the CPU.

    Raises:
        BackendUnavailable: the installed runtime does not have the provider.
        ModelFileError: the runtime cannot load the model; the message quotes the runtime's own.
    """

    name: str = Backend.ORT_CPU

    def __init__(
        self,
        source: Path | bytes,
        threads: int | None = None,
        *,
        library: Path | None = None,
        data_folder: Path | None = None,
        profile: Path | None = None,
        level: str = "all",
        spins: bool = True,
        prepacks: bool = True,
        maps_weights: bool = False,
        provider: str | None = None,
    ) -> None:
        options = session_options(threads, profile, spins=spins, prepacks=prepacks, maps_weights=maps_weights)
        self._session = open_session(
            source, options, library=library, providers=_providers(provider), level=level, data_folder=data_folder
        )
        if provider is not None and provider not in self._session.get_providers():  # the runtime only warns
            raise BackendUnavailable(
                f"ONNX Runtime {ort.__version__} cannot start {provider}, and would run everything on the CPU: a "
                "library or device that it needs is missing"
            )
        self._types = {i.name: _NUMPY_TYPES.get(i.type) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._cache = CachePasser(frozenset(i.name for i in self._session.get_inputs() if CAPACITY in i.shape))

    def run(self, inputs: Arrays) -> Arrays:
        return self._cache.run(self._run, inputs)

    def _run(self, inputs: Arrays) -> Arrays:
        converted = {
            name: np.ascontiguousarray(array.astype(self._types.get(name) or array.dtype, copy=False))
            for name, array in inputs.items()
        }
        try:
            outputs = self._session.run(None, converted)
        except OrtError as error:
            raise ModelFileError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def end_profile(self) -> list[dict[str, Any]]:
        """End the profile and return its events as ONNX Runtime wrote them."""
        return read_profile(self._session)


def _providers(provider: str | None) -> list[str]:
    """The execution providers of a session.

    Raises:
        BackendUnavailable: the installed runtime does not have the provider.
    """
    available = ort.get_available_providers()
    if provider is not None and provider not in available:
        raise BackendUnavailable(
            f"ONNX Runtime {ort.__version__} has no execution provider {quoted(provider)}; it has "
            f"{', '.join(available)}. Others come with other packages, e.g. pip install onnxruntime-openvino in place "
            "of onnxruntime"
        )
    return list(dict.fromkeys(filter(None, (provider, CPU_PROVIDER))))


def read_profile(session: ort.InferenceSession) -> list[dict[str, Any]]:
    """End the profile of a session and return its events."""
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: the rest is a list of places in ONNX Runtime's source.

    Where an input has a wrong shape, the lines that follow name the axis and both sizes, and are joined to it.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    axes = [line for line in lines[1:] if line.startswith("index:")] if lines[0].endswith("indices") else []
    return ", ".join([lines[0], *axes])
