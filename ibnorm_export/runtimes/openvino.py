"""OpenVINO on the CPU as a runner."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.inliner
import openvino
from openvino.preprocess import PrePostProcessor

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError, shortened
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.usable_cores import default_threads

__all__ = ["OpenVinoRunner", "settings"]

_DEVICE: Final = "CPU"


def settings(threads: int | None) -> dict[str, str]:
    """Return the settings of a compiled model: float32 arithmetic, and one pass at a time.

    The precision is stated because the default depends on the processor: with AMX or AVX-512 it is bfloat16, also for a
    float32 file. Half-precision files compute in float32 too, as in ONNX Runtime on a CPU: at bfloat16 or float16
    OpenVINO also rounds inside the norms, where the file asks for float32, and IBNorm-L then gives NaN. Activations of
    quantised matrices stay in float32, and keys and values are stored as the file says.

    Args:
        threads: number of threads; None is the runtime's default, or fewer where the process may use fewer cores.
    """
    threads = default_threads() if threads is None else threads
    fixed = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
    }
    return fixed if threads is None else {**fixed, "INFERENCE_NUM_THREADS": str(threads)}


class OpenVinoRunner:
    """A model that OpenVINO compiled for the CPU. Functions, which OpenVINO does not read, are expanded first.

    Args:
        model: the file.
        threads: number of threads; None is the runtime's default.

    Raises:
        ModelFileError: OpenVINO cannot read or compile the model; the message quotes its own.
    """

    name: str = Backend.OPENVINO

    def __init__(self, model: ExportedModel, threads: int | None = None) -> None:
        core = openvino.Core()
        try:
            graph = _with_numpy_types(_read(core, model))
            self._compiled = core.compile_model(graph, _DEVICE, settings(threads))
        except RuntimeError as error:
            raise ModelFileError(
                f"{model.path}: OpenVINO {openvino.__version__.partition('-')[0]} cannot load it: {_reason(error)}; "
                "export it again with --for openvino, or with --dtype fp32"
            ) from error
        self._request = self._compiled.create_infer_request()
        self._inputs = [tensor.name for tensor in model.inputs]
        self._outputs = [tensor.name for tensor in model.outputs]
        self._types = [port.element_type.to_dtype() for port in self._compiled.inputs]

    def run(self, inputs: Arrays) -> Arrays:
        converted: dict[int, Any] = {
            index: np.ascontiguousarray(inputs[name].astype(dtype, copy=False))
            for index, (name, dtype) in enumerate(zip(self._inputs, self._types, strict=True))
        }
        try:
            outputs = self._request.infer(converted, share_inputs=True)
        except RuntimeError as error:
            raise ModelFileError(f"OpenVINO cannot run the model: {_reason(error)}") from error
        return {name: np.array(outputs[index]) for index, name in enumerate(self._outputs)}


def _read(core: openvino.Core, model: ExportedModel) -> Any:
    """Read a file, or a copy of it without functions.

    The copy is beside hard links to the external data (OpenVINO refuses symbolic ones), or copies on another file
    system. OpenVINO keeps the data mapped, so the folder may go.
    """
    if not model.proto.functions:
        return core.read_model(model.path)
    inlined = onnx.inliner.inline_local_functions(model.proto)
    if not model.external_files:
        return core.read_model(inlined.SerializeToString())
    with tempfile.TemporaryDirectory() as folder:
        for file in model.external_files:
            link = Path(folder) / file.relative_to(model.path.parent)
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.hardlink_to(file.resolve())
            except OSError:
                shutil.copyfile(file, link)
        onnx.save(inlined, Path(folder) / "inlined.onnx")
        return core.read_model(Path(folder) / "inlined.onnx")


def _with_numpy_types(graph: Any) -> Any:
    """The graph with inputs and outputs in float32 where they are bfloat16, which NumPy does not have."""
    half = openvino.Type.bf16
    if not any(port.element_type == half for port in (*graph.inputs, *graph.outputs)):
        return graph
    conversion = PrePostProcessor(graph)
    for index, port in enumerate(graph.inputs):
        if port.element_type == half:
            conversion.input(index).tensor().set_element_type(openvino.Type.f32)
    for index, port in enumerate(graph.outputs):
        if port.element_type == half:
            conversion.output(index).tensor().set_element_type(openvino.Type.f32)
    return conversion.build()


def _reason(error: Exception) -> str:
    """What OpenVINO says is wrong, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API", "Summary:"))]
    return shortened(" ".join(told or lines or [type(error).__name__]))
