"""Models are written without a second copy of their weights, with the bytes that onnx.save writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from ibnorm_export.artifacts.mapped_pages import release_pages
from ibnorm_export.graph.model_writer import without_weights, write_model
from ibnorm_export.graph.weight_tensors import WeightTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _model(weight: ir.TensorProtocol) -> ir.Model:
    """x @ weight, and an Add of a small initializer and of one that is computed when it is written."""
    shape = weight.shape.numpy()
    kind = ir.TensorType(weight.dtype)
    x = ir.Value(name="x", shape=ir.Shape(["n", shape[0]]), type=kind)
    ones = np.ones((shape[0], shape[1]), dtype=np.float32).astype(weight.dtype.numpy())
    lazy = ir.LazyTensor(lambda: ir.Tensor(ones, name="b"), dtype=weight.dtype, shape=ir.Shape(shape), name="b")
    small = ir.Tensor(ones[0], name="c")
    values = [ir.Value(name=tensor.name, const_value=tensor) for tensor in (weight, lazy, small)]
    nodes = [ir.node("Add", values[:2], name="sum")]
    nodes.append(ir.node("MatMul", [x, nodes[0].outputs[0]], name="product"))
    nodes.append(ir.node("Add", [nodes[1].outputs[0], values[2]], name="shifted"))
    for node, name in zip(nodes, ("w", "p", "y"), strict=True):
        node.outputs[0].name = name
    y = nodes[2].outputs[0]
    y.shape, y.type = ir.Shape(["n", shape[1]]), kind
    graph = ir.Graph([x], [y], nodes=nodes, initializers=values, name="g", opset_imports={"": 22})
    model = ir.Model(graph, ir_version=10)
    model.metadata_props["key"] = "value"
    model.producer_name = "test"
    return model


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_of_onnx(tmp_path: Path, dtype: torch.dtype, transposed: bool) -> None:
    source = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    built = _model(WeightTensor(source, dtype, name="a", transposed=transposed))
    message = write_model(built, tmp_path / "streamed.onnx")

    expected = (source.t() if transposed else source).to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    whole = ir.serde.serialize_model(built)
    assert whole.graph.initializer[0].raw_data == expected
    onnx.save(whole, tmp_path / "whole.onnx")
    assert (tmp_path / "streamed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()

    assert message.ByteSize() < 10_000, "the weights are not in the message that is checked"
    onnx.checker.check_model(without_weights(message), full_check=True)


def test_what_is_checked_has_the_types_of_the_weights(tmp_path: Path) -> None:
    built = _model(WeightTensor(torch.zeros(300, 400), torch.float32, name="a"))
    message = without_weights(write_model(built, tmp_path / "model.onnx"))
    assert [value.name for value in message.graph.input] == ["x", "a", "b"]
    message.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 299
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(message, full_check=True)


def test_external_data_has_the_same_values(tmp_path: Path) -> None:
    source = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    ir.save(_model(WeightTensor(source, torch.float32, name="a")), tmp_path / "m.onnx", external_data="m.data")
    assert (tmp_path / "m.data").read_bytes().startswith(source.numpy().tobytes())


def test_released_pages_keep_their_values(tmp_path: Path) -> None:
    save_file({"w": torch.arange(1 << 20, dtype=torch.float32)}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")["w"]
    release_pages(mapped)
    assert torch.equal(mapped, torch.arange(1 << 20, dtype=torch.float32))
    mapped[5000] = -1  # a private copy of this page, which the file does not have
    release_pages(mapped)
    assert mapped[5000] == -1


def test_pages_that_no_file_has_are_kept() -> None:
    tensor = torch.ones(1 << 20)
    release_pages(tensor)
    assert bool((tensor == 1).all())
