"""Matrices that are quantised when they are written give the bytes of a model that is quantised as a whole."""

from __future__ import annotations

import tracemalloc
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


def _chain(shapes: dict[str, tuple[int, ...]], order: str) -> onnx.ModelProto:
    """Products of `x` with the matrices that `order` names, the last of which gives the logits."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    names = ["x", *(f"y{number}" for number in range(len(order) - 1)), "logits"]
    nodes = [
        onnx.helper.make_node("MatMul", [names[number], matrix], [names[number + 1]], f"product{number}")
        for number, matrix in enumerate(order)
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "model",
        [info("x", onnx.TensorProto.FLOAT, [1, "n", shapes[order[0]][-2]])],
        [info("logits", onnx.TensorProto.FLOAT, [1, "n", shapes[order[-1]][-1]])],
        [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_one_quantised_matrix_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Also where the scales and zero points are so small that they could be part of the message."""
    names, size = "abcdefgh", 512
    built = ir.serde.deserialize_model(_chain(dict.fromkeys(names, (size, size)), names))
    streamed = quantize_when_written(built, Quantization(4, 32, 4))
    one = size * size // 2 + size * (size // 32) * 4 + size * (size // 64)  # bytes of values, scales and zero points
    tracemalloc.start()
    try:
        write_model(streamed, tmp_path / "model.onnx")
        assert tracemalloc.get_traced_memory()[1] < size * size * 4 + 2 * one, "a matrix in float32, and its parts"
    finally:
        tracemalloc.stop()
    assert (tmp_path / "model.onnx").stat().st_size > len(names) * one


def test_parts_that_are_read_in_any_order_have_the_same_values() -> None:
    wanted = Quantization(4, 32, 8)
    streamed = quantize_when_written(ir.serde.deserialize_model(_model()), wanted).graph.initializers
    whole = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in quantize(_model(), wanted).graph.initializer}
    for name in (*sorted(whole), *sorted(whole, key=lambda name: whole[name].nbytes)):
        stored = streamed[name].const_value
        assert stored is not None
        np.testing.assert_array_equal(stored.numpy(), whole[name], strict=True)


def test_a_constant_of_three_axes_is_not_quantised(tmp_path: Path) -> None:
    """ONNX Runtime would quantise it. It has more than 64 KiB, so the quantizer does not see its values."""
    shapes = {"a": (40, 40), "b": (1, 40, 500), "c": (500, 40)}
    wanted = Quantization(4, 32, 8)
    whole = ir.serde.deserialize_model(quantize(_chain(shapes, "abc"), wanted))
    streamed = quantize_when_written(ir.serde.deserialize_model(_chain(shapes, "abc")), wanted)
    for name, model in (("whole", whole), ("streamed", streamed)):
        write_model(model, tmp_path / name)
        assert [node.op_type for node in model.graph] == ["MatMulNBits", "MatMul", "MatMulNBits"]
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_matrix_that_the_logits_share_is_stored_once_with_their_bits(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")  # the extra "cpu"
    shapes = {"a": (48, 48), "b": (48, 48)}
    streamed = quantize_when_written(ir.serde.deserialize_model(_chain(shapes, "bab")), Quantization(4, 32, 8))
    write_model(streamed, tmp_path / "model.onnx")
    assert [node.inputs[1].name for node in streamed.graph if node.inputs[1] is not None] == ["b_Q8", "a_Q4", "b_Q8"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": np.ones((1, 2, 48), dtype=np.float32)})
    assert logits.shape == (1, 2, 48)


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
