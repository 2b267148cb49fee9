"""onnx.reference, the ONNX standard's own evaluator, as a runner."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import onnx.reference

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.onnx_file import read_tensor
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError
from ibnorm_export.runtimes.runner import Backend

__all__ = ["ReferenceRunner"]


class ReferenceRunner:
    """Evaluates the nodes one by one in NumPy.

    Raises:
        ModelFileError: the evaluator does not support the model.
    """

    name: str = Backend.REFERENCE

    def __init__(self, model: ExportedModel) -> None:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        for tensor in onnx.external_data_helper._get_all_tensors(proto):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.CopyFrom(onnx.numpy_helper.from_array(read_tensor(tensor, model.path), tensor.name))
        self._types = {
            v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in proto.graph.input
        }
        self._outputs = [v.name for v in proto.graph.output]
        try:
            self._evaluator = onnx.reference.ReferenceEvaluator(proto)
        except (NotImplementedError, RuntimeError) as error:
            raise ModelFileError(f"{model.path}: onnx.reference cannot evaluate it: {error}") from error

    def run(self, inputs: Arrays) -> Arrays:
        converted = {name: array.astype(self._types[name], copy=False) for name, array in inputs.items()}
        with np.errstate(all="ignore"):
            outputs = self._evaluator.run(None, converted)
        return dict(zip(self._outputs, (np.asarray(o) for o in outputs), strict=True))
