"""ONNX Runtime as a runner: the one module that imports it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ibnorm_export.artifact import ExportedModel
from ibnorm_export.errors import ModelFileError
from ibnorm_export.loaded import Arrays

__all__ = ["OrtError", "OrtRunner"]

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

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OrtRunner:
    """An ONNX Runtime session on the CPU, at the optimisation level that is served (ORT_ENABLE_ALL).

    Args:
        source: a file, or a serialised model.
        threads: of the session; None is the runtime's default.

    Raises:
        ModelFileError: the runtime cannot load the model; its own words follow.
    """

    name = "ort-cpu"

    def __init__(self, source: Path | bytes, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them
        if threads is not None:
            options.intra_op_num_threads = threads
        label = "the model" if isinstance(source, bytes) else str(source)
        try:
            self._session = ort.InferenceSession(
                source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
            )
        except OrtError as error:
            raise ModelFileError(f"{label}: ONNX Runtime cannot load it: {_first_line(error)}") from error
        self._types = {i.name: _NUMPY_TYPES.get(i.type) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]

    @classmethod
    def from_file(cls, model: ExportedModel, threads: int | None = None) -> OrtRunner:
        """A session on the file as it is."""
        return cls(model.path, threads)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, threads: int | None = None) -> OrtRunner:
        """A session on a model in memory."""
        return cls(proto.SerializeToString(), threads)

    def run(self, inputs: Arrays) -> Arrays:
        converted = {
            name: np.ascontiguousarray(array.astype(self._types.get(name) or array.dtype, copy=False))
            for name, array in inputs.items()
        }
        try:
            outputs = self._session.run(None, converted)
        except OrtError as error:
            raise ModelFileError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
