from __future__ import annotations

import tracemalloc
from pathlib import Path

import onnx
import pytest

from ibnorm_export.artifacts.onnx_file import is_onnx

MODEL = onnx.helper.make_model(
    onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    ),
    producer_name="another tool",
    functions=[onnx.helper.make_function("d", "f", ["a"], ["b"], [onnx.helper.make_node("Relu", ["a"], ["b"])], [])],
).SerializeToString()


def test_a_model_is_known_without_reading_its_graph(tmp_path: Path) -> None:
    path, graph_bytes = tmp_path / "large.onnx", 1 << 31
    size = [graph_bytes >> shift & 0x7F | 0x80 for shift in (0, 7, 14, 21)] + [graph_bytes >> 28]
    outer = onnx.ModelProto(ir_version=10, opset_import=[onnx.helper.make_opsetid("", 23)]).SerializeToString()
    with path.open("wb") as stream:
        stream.write(outer + bytes([onnx.ModelProto.GRAPH_FIELD_NUMBER << 3 | 2, *size]))
        stream.truncate(stream.tell() + graph_bytes)  # a hole, which takes no space
    tracemalloc.start()
    try:
        assert is_onnx(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with path.open("ab") as stream:
        stream.truncate(path.stat().st_size - 1)
    assert not is_onnx(path)


def test_a_part_of_a_model_is_none(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    whole = []
    for length in range(len(MODEL) + 1):
        path.write_bytes(MODEL[:length])
        if is_onnx(path):
            whole.append(length)
    without_functions = onnx.ModelProto.FromString(MODEL)
    without_functions.ClearField("functions")
    assert whole == [without_functions.ByteSize(), len(MODEL)]  # functions are the last field, and may be missing


@pytest.mark.parametrize(
    "content",
    [b"", b"notes of a user", b"PK\x03\x04" * 100, b"{}", bytes(10_000_000), b"\x08\x00" * 10, b"\xff" * 100],
    ids=["empty", "text", "zip", "json", "zeros", "one field again", "a number without an end"],
)
def test_other_files_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert not is_onnx(tmp_path / "m.onnx")
