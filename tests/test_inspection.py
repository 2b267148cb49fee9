"""What `inspect` reports about files of other tools, and about what a checkpoint states."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx.helper
import pytest

from ibnorm_export import IBNormSpec
from ibnorm_export.inspection import inspect_checkpoint, inspect_file
from tests.support.checkpoints import VIT, save_checkpoint


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


def test_lambda_is_also_shown_as_the_checkpoint_states_it(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "vit", VIT, IBNormSpec("L", 4.0, epsilon=1e-5))
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["ibnorm"] |= {"convention": "multiply", "lambda": 0.25, "epsilon": 16e-5}  # g(r / 4), as above
    path.write_text(json.dumps(config), encoding="utf-8")
    found = inspect_checkpoint(checkpoint).to_dict()
    assert (found["norms"][0]["lambda"], found["norms"][0]["epsilon"]) == (4.0, pytest.approx(1e-5))
    stated = found["stated"]
    assert (stated["convention"], stated["lambda"], stated["epsilon"]) == ("multiply", 0.25, 16e-5)
