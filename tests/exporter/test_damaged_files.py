"""Files that `export` did not write, or that were damaged."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.metadata import ModelMetadata
from ibnorm_export.errors import ModelFileError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "truncated or is not an ONNX file"),
        (b"\x00" * 100, "not an ONNX file"),
        (b"PK\x03\x04 a zip, perhaps", "not an ONNX file"),
        (b"{}", "not an ONNX file"),
        (b"Das ist kein Modell.\n" * 50, "not an ONNX file"),
    ],
)
def test_not_onnx(tmp_path: Path, text: bytes, expected: str) -> None:
    (tmp_path / "m.onnx").write_bytes(text)
    with pytest.raises(ModelFileError, match=expected):
        ExportedModel(tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_truncated(exported_vit: ExportedModel, tmp_path: Path, share: float) -> None:
    whole = exported_vit.path.read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelFileError, match="truncated or is not an ONNX file"):
        ExportedModel(tmp_path / "m.onnx")


def test_paths_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        ExportedModel(tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="is a folder"):
        ExportedModel(tmp_path)


def test_a_file_from_another_tool(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, ["n"])], [value("y", 1, ["n"])]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    found = ExportedModel(tmp_path / "m.onnx")
    assert (found.metadata, found.norms, found.dtype) == (ModelMetadata.empty(), (), "fp32")
    with pytest.raises(ModelFileError, match="has no ibnorm metadata"):
        found.require_metadata()


@pytest.mark.parametrize(
    ("key", "value", "expected"), [("ibnorm.format", '"99"', "'99'"), ("ibnorm.format", "{", "not valid JSON")]
)
def test_metadata_of_another_format(
    exported_vit: ExportedModel, tmp_path: Path, key: str, value: str, expected: str
) -> None:
    proto = onnx.load(exported_vit.path)
    next(p for p in proto.metadata_props if p.key == key).value = value
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=expected):
        ExportedModel(tmp_path / "m.onnx").require_metadata()


@pytest.mark.parametrize(
    "change",
    [{"ref_attr_name": "lambd"}, {"type": onnx.AttributeProto.UNDEFINED}],
    ids=["a reference outside a function", "no type"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_an_attribute_without_a_value(
    exported_vit: ExportedModel, tmp_path: Path, change: dict[str, object], nested: bool
) -> None:
    proto = onnx.load(exported_vit.path)
    node = next(node for node in proto.graph.node if node.attribute)
    if nested:
        outer = proto.graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        node = outer.g.node.add(op_type="Add")
        node.attribute.add(name="a", i=1, type=onnx.AttributeProto.INT)
    for key, value in change.items():
        setattr(node.attribute[0], key, value)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="has no value: the file is damaged"):
        ExportedModel(tmp_path / "m.onnx")


@pytest.mark.parametrize("where", ["initializer", "attribute", "function"])
def test_an_element_type_that_does_not_exist(exported_vit: ExportedModel, tmp_path: Path, where: str) -> None:
    proto = onnx.load(exported_vit.path)
    body = proto.functions[0] if where == "function" else proto.graph
    if where == "initializer":
        tensor = proto.graph.initializer[0]
    else:
        tensor = body.node.add(op_type="Constant").attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
    tensor.data_type = 2**31 - 1
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="has element type 2147483647"):
        ExportedModel(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["q_num_heads", "kv_num_heads", "group"])
@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("where", ["graph", "branch", "function"])
def test_an_attribute_by_which_no_runtime_can_divide(
    exported_vit: ExportedModel, tmp_path: Path, name: str, value: int, where: str
) -> None:
    """ONNX Runtime 1.31 divides by them unchecked, and its process ends with SIGFPE."""
    proto = onnx.load(exported_vit.path)
    nodes = proto.functions[0].node if where == "function" else proto.graph.node
    if where == "branch":
        outer = proto.graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        nodes = outer.g.node
    nodes.add(op_type="Attention").attribute.add(name=name, i=value, type=onnx.AttributeProto.INT)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=f"{name} of the node '' is {value}; it must be 1 or more"):
        ExportedModel(tmp_path / "m.onnx")


@pytest.mark.parametrize("where", ["metadata", "node", "output", "initializer", "attribute"])
def test_a_text_that_is_not_utf_8(exported_vit: ExportedModel, tmp_path: Path, where: str) -> None:
    proto, mark = onnx.load(exported_vit.path), "MARKED-TEXT"
    if where == "metadata":
        proto.metadata_props.add(key="ibnorm.note", value=mark)
    elif where == "node":
        proto.graph.node[0].name = mark
    elif where == "output":
        proto.graph.output[0].name = mark
    elif where == "initializer":
        proto.graph.initializer[0].name = mark
    else:
        proto.graph.node[0].attribute.add(name=mark, i=1, type=onnx.AttributeProto.INT)
    content = proto.SerializeToString()
    assert content.count(mark.encode()) == 1
    (tmp_path / "m.onnx").write_bytes(content.replace(mark.encode(), b"\xff" * len(mark)))
    with pytest.raises(ModelFileError, match="is not UTF-8: it is damaged"):
        ExportedModel(tmp_path / "m.onnx")
