"""ONNX Runtime as a runner: the one module that imports it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ibnorm_export.artifact import ExportedModel
from ibnorm_export.errors import ModelFileError
from ibnorm_export.loaded import Arrays
from ibnorm_export.runners.base import NormExecution

__all__ = ["OrtError", "OrtRunner", "norm_executions"]

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
        library: fused kernels to register; None runs the norms as functions.
        profile: prefix of a file that the session writes its profile to when `end_profile` is called.

    Raises:
        ModelFileError: the runtime cannot load the model; its own words follow.
    """

    name = "ort-cpu"

    def __init__(
        self,
        source: Path | bytes,
        threads: int | None = None,
        library: Path | None = None,
        profile: Path | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        label = "the model" if isinstance(source, bytes) else str(source)
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            self._session = ort.InferenceSession(
                source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
            )
        except OrtError as error:
            raise ModelFileError(f"{label}: ONNX Runtime cannot load it: {_first_line(error)}") from error
        self._types = {i.name: _NUMPY_TYPES.get(i.type) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]

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

    def end_profile(self) -> list[dict[str, Any]]:
        """Events of the session so far, as ONNX Runtime wrote them; ends the profile."""
        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return events


def norm_executions(model: ExportedModel, inputs: Arrays, library: Path | None) -> tuple[NormExecution, ...]:
    """Which implementation ran for every norm of `model`, from the session's own profile of one pass.

    A fused kernel appears under the node's name and op type; a function has been expanded into other
    nodes, so neither does.
    """
    if not model.norms:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        runner = OrtRunner(model.path, library=library, profile=Path(folder) / "norms")
        runner.run(inputs)
        events = runner.end_profile()
    ran = {
        (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]): event["args"].get("provider", "")
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return tuple(
        NormExecution(n.module, n.op_type, "fused", ran[n.name, n.op_type])
        if (n.name, n.op_type) in ran
        else NormExecution(n.module, n.op_type, "function", "")
        for n in model.norms
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
