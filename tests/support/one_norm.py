"""A model of one norm whose first two axes are dynamic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import IBNormSpec

__all__ = ["TYPES", "one_norm"]

#: Data types by the names of `export --dtype`.
TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
_OPSET = 22


def one_norm(
    path: Path,
    spec: IBNormSpec,
    dtype: str,
    skip: bool,
    scale: NDArray[np.floating],  # (width,)
    bias: NDArray[np.floating],  # (width,)
) -> ExportedModel:
    """Write a model of one operator and its function: X (and skip) of (batch, sequence, width) to Y (and sum).

    Args:
        path: the file to write.
        dtype: a key of `TYPES`.
        skip: whether it is the skip form.
    """
    kind, width = TYPES[dtype], len(scale)
    node = (
        onnx_op.skip_node("X", "skip", scale="scale", bias="bias", y="Y", total="sum", spec=spec, name="the_norm")
        if skip
        else onnx_op.node("X", "scale", bias="bias", y="Y", spec=spec, name="the_norm")
    )
    info = onnx.helper.make_tensor_value_info
    shape = ["batch_size", "sequence_length", width]
    inputs = [info(name, kind, shape) for name in node.input if name in ("X", "skip")]
    outputs = [info(name, kind, shape) for name in node.output]
    weights = [
        onnx.helper.make_tensor(name, kind, [width], values.tolist())
        for name, values in (("scale", scale), ("bias", bias))
    ]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs, weights)
    made = onnx.helper.make_model(
        graph,
        opset_imports=onnx_op.opset_imports(_OPSET),
        ir_version=10,
        functions=[onnx_op.functions(_OPSET)[node.op_type]],
    )
    onnx.save(made, path)
    return ExportedModel(path)
