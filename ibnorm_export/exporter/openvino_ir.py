"""The format of OpenVINO: openvino_model.xml, and its weights in openvino_model.bin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.runtime_versions import RuntimeName
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ExportError, shortened
from ibnorm_export.exporter.converted_folder import Converter
from ibnorm_export.optional_packages import import_package

__all__ = ["OPENVINO_IR"]

#: The names that Hugging Face's folders for OpenVINO have.
_GRAPH: Final = "openvino_model.xml"
_WEIGHTS: Final = "openvino_model.bin"

#: The numbers are checked in float32. By default OpenVINO computes in bfloat16 on processors that can.
_PRECISION: Final = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def _runner(compiled: Any, exported: ExportedModel) -> Callable[[Arrays], Arrays]:
    request = compiled.create_infer_request()
    inputs = [tensor.name for tensor in exported.inputs]
    outputs = [tensor.name for tensor in exported.outputs]
    types = [port.element_type.to_dtype() for port in compiled.inputs]

    def run(arrays: Arrays) -> Arrays:
        feeds = {
            index: np.ascontiguousarray(arrays[name].astype(dtype, copy=False))
            for index, (name, dtype) in enumerate(zip(inputs, types, strict=True))
        }
        results = request.infer(feeds)
        return {name: np.array(results[index]) for index, name in enumerate(outputs)}

    return run


def _convert(exported: ExportedModel, folder: Path, _: DType) -> Callable[[Arrays], Arrays]:
    openvino = import_package("openvino", extra="openvino", purpose="--target openvino")
    try:
        openvino.save_model(openvino.convert_model(exported.path), folder / _GRAPH, compress_to_fp16=False)
        compiled = openvino.Core().compile_model(folder / _GRAPH, "CPU", _PRECISION)
    except RuntimeError as error:
        raise ExportError(
            f"OpenVINO {openvino.__version__} cannot convert the model: {shortened(str(error))}"
        ) from error
    return _runner(compiled, exported)


OPENVINO_IR: Final = Converter(RuntimeName.OPENVINO, "OpenVINO", files=(_GRAPH, _WEIGHTS), convert=_convert)
