"""Matrices that are quantised when they are written give the bytes of a model that is quantised as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from ibnorm_export.errors import ExportError
from ibnorm_export.graph import streamed_quantization
from ibnorm_export.graph.model_writer import write_model
from ibnorm_export.graph.quantization import Quantization, quantize
from ibnorm_export.graph.streamed_quantization import quantize_when_written

HIDDEN, INNER, WORDS = 40, 72, 500


def _model() -> onnx.ModelProto:
    """An embedding, a product, a Gemm, and a head of more than 64 KiB; sizes that blocks do not divide."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (WORDS, HIDDEN), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN), "head": (HIDDEN, WORDS)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights["bias"] = rng.standard_normal(HIDDEN).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Gather", ["embed", "ids"], ["x"], "gather"),
        onnx.helper.make_node("MatMul", ["x", "up"], ["inner"], "up_product"),
        onnx.helper.make_node("Gemm", ["inner", "down", "bias"], ["y"], "gemm"),
        onnx.helper.make_node("MatMul", ["y", "head"], ["logits"], "head_product"),
    ]
    nodes[2].metadata_props.add(key="module", value="mlp")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "model",
        [info("ids", onnx.TensorProto.INT64, ["n"])],
        [info("logits", onnx.TensorProto.FLOAT, ["n", WORDS])],
        [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    "wanted", [Quantization(4, 32, 8), Quantization(8, 16, None), Quantization(4, 128, 4)], ids=str
)
def test_the_bytes_are_those_of_a_whole_quantisation(tmp_path: Path, wanted: Quantization) -> None:
    whole = ir.serde.deserialize_model(quantize(_model(), wanted))
    streamed = quantize_when_written(ir.serde.deserialize_model(_model()), wanted)
    for name, model in (("whole", whole), ("streamed", streamed)):
        write_model(model, tmp_path / name)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_each_matrix_is_quantised_once_and_only_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    quantize_matrix = streamed_quantization.quantize_matrix

    def counted(weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]], *, bits: int, block_size: int) -> object:
        made.append(weight.shape)
        return quantize_matrix(weight, bits=bits, block_size=block_size)

    monkeypatch.setattr(streamed_quantization, "quantize_matrix", counted)
    streamed = quantize_when_written(ir.serde.deserialize_model(_model()), Quantization(4, 32, 8))
    assert not made
    write_model(streamed, tmp_path / "model.onnx")
    assert sorted(made) == [(HIDDEN, INNER), (HIDDEN, WORDS), (INNER, HIDDEN)]


def test_a_file_with_external_data_has_the_same_values(tmp_path: Path) -> None:
    wanted = Quantization(4, 32, 8)
    streamed = quantize_when_written(ir.serde.deserialize_model(_model()), wanted)
    ir.save(streamed, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert (tmp_path / "model.onnx.data").stat().st_size > 0
    found = onnx.load(tmp_path / "model.onnx")
    whole = quantize(_model(), wanted)
    assert [node.name for node in found.graph.node] == [node.name for node in whole.graph.node]
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    assert set(values) == {tensor.name for tensor in whole.graph.initializer}
    for tensor in whole.graph.initializer:
        np.testing.assert_array_equal(values[tensor.name], onnx.numpy_helper.to_array(tensor), strict=True)


def test_a_transposed_view_is_quantised_in_its_own_order(tmp_path: Path) -> None:
    built = ir.serde.deserialize_model(_model())
    head = built.graph.initializers["head"]
    assert head.const_value is not None
    head.const_value = ir.Tensor(np.asfortranarray(head.const_value.numpy()), name="head")
    write_model(quantize_when_written(built, Quantization(4, 32, 8)), tmp_path / "view")
    write_model(ir.serde.deserialize_model(quantize(_model(), Quantization(4, 32, 8))), tmp_path / "whole")
    assert (tmp_path / "view").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_model_without_matrices_is_refused() -> None:
    model = _model()
    del model.graph.node[1:]
    model.graph.node[0].output[0] = "logits"
    with pytest.raises(ExportError, match="no constant matrices"):
        quantize_when_written(ir.serde.deserialize_model(model), Quantization(4))
