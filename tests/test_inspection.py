"""What `inspect` reports about files that this package did not write."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.helper

from ibnorm_export.inspection import inspect_file


def test_a_file_of_another_tool_is_called_that(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [value("x", onnx.TensorProto.FLOAT, [1])],
        [value("y", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "relu.onnx")
    found = inspect_file(tmp_path / "relu.onnx")
    assert found.format == "ONNX, written by another tool"
    assert (found.metadata, found.norms, found.operators) == ({}, (), {"Relu": 1})
