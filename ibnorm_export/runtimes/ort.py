"""ONNX Runtime on the CPU as a runner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ibnorm_export.artifacts.exported_model import CAPACITY
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError

if TYPE_CHECKING:  # it needs torch
    pass

__all__ = ["LEVELS", "OrtError", "OrtRunner", "first_line", "open_session", "read_profile", "session_options"]

#: Everything that ONNX Runtime raises of its own.
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

#: Optimisation levels, lowest first; the last is what is served.
LEVELS: Final = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}

#: Tokens behind those of a cache in place, and what is in them: results must not depend on it.
_SPARE: Final = 3
_UNUSED: Final = 100.0


def session_options(threads: int | None, profile: Path | None) -> ort.SessionOptions:
    """Options of a session: threads (None is the runtime's default), and prefix of its profile, where it writes one."""
    options = ort.SessionOptions()
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
) -> ort.InferenceSession:
    """A session of a file or a serialised model.

    Raises:
        ModelFileError: the runtime cannot load it; its own words follow.
    """
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them
    label = "the model" if isinstance(source, bytes) else str(source)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=list(providers)
        )
    except OrtError as error:
        raise ModelFileError(f"{label}: ONNX Runtime cannot load it: {first_line(error)}") from error


class OrtRunner:
    """An ONNX Runtime session on the CPU.

    A cache that the model keeps in place is given and returned as one that grows, copied into a buffer and out of it:
    `ort_text` binds the buffer itself.

    Args:
        source: a file, or a serialised model.
        threads: of the session; None is the runtime's default.
        library: fused kernels to register; None runs the norms as functions.
        profile: prefix of a file that the session writes its profile to when `end_profile` is called.
        level: of optimisation, a key of `LEVELS`; the default is what is served.

    Raises:
        ModelFileError: the runtime cannot load the model; its own words follow.
    """

    name = "ort-cpu"

    def __init__(
        self,
        source: Path | bytes,
        threads: int | None = None,
        *,
        library: Path | None = None,
        profile: Path | None = None,
        level: str = "all",
    ) -> None:
        options = session_options(threads, profile)
        self._session = open_session(source, options, library=library, providers=["CPUExecutionProvider"], level=level)
        self._types = {i.name: _NUMPY_TYPES.get(i.type) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._in_place = frozenset(i.name for i in self._session.get_inputs() if CAPACITY in i.shape)

    def run(self, inputs: Arrays) -> Arrays:
        if not self._in_place:
            return self._run(inputs)
        total = inputs["attention_mask"].shape[1]
        outputs = self._run({n: _with_room(a, total) if n in self._in_place else a for n, a in inputs.items()})
        return {name: a[:, :, :total] if name.startswith("present.") else a for name, a in outputs.items()}

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
        """Events of the session so far, as ONNX Runtime wrote them; ends the profile."""
        return read_profile(self._session)


def _with_room(cache: NDArray[Any], total: int) -> NDArray[Any]:
    """A cache (batch, heads, past, head) in a buffer of `total` tokens and some more, which count for nothing."""
    batch, heads, past, head = cache.shape
    buffer = np.full((batch, heads, total + _SPARE, head), _UNUSED, dtype=cache.dtype)
    buffer[:, :, :past] = cache
    return buffer


def read_profile(session: ort.InferenceSession) -> list[dict[str, Any]]:
    """Events of a session that profiles, which ends with this."""
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without the places in its source."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
