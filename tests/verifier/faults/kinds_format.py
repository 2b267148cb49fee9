"""Faults in what a reader of ONNX files makes of one: order, types, names, versions, functions and stored data."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ibnorm_export.op import onnx_functions
from tests.verifier.faults.edit import Edit
from tests.verifier.faults.kind import QUANTISED, Kind

__all__ = ["KINDS"]

_ONE: Final = ("llama genai",)
_FOLDERS: Final = ("llama decoder", "llama genai")


def _wrong_function_first(e: Edit) -> None:
    """Two functions have one name: a wrong one, and after it the right one."""
    right = [f for f in e.proto.functions if f.domain == "ai.ibnorm"]
    opset = next(o.version for o in e.proto.opset_import if o.domain == "")
    name = right[0].name
    other = onnx_functions.functions(opset)[name[:-1] + ("T" if name[-1] != "T" else "S")]
    wrong = onnx.FunctionProto()
    wrong.CopyFrom(other)
    wrong.name = name
    kept = list(e.proto.functions)
    del e.proto.functions[:]
    e.proto.functions.extend([wrong, *kept])


def _wrong_function_last(e: Edit) -> None:
    _wrong_function_first(e)
    kept = list(e.proto.functions)
    del e.proto.functions[:]
    e.proto.functions.extend([*kept[1:], kept[0]])


def _own_operator(name: str) -> Callable[[Edit], None]:
    """A local function has the name of a standard operator, and does nothing."""

    def plant(e: Edit) -> None:
        nodes = [onnx.helper.make_node("Identity", ["x"], ["y"])]
        opset = [o for o in e.proto.opset_import if o.domain == ""]
        e.proto.functions.append(onnx.helper.make_function("", name, ["x"], ["y"], nodes, opset))

    return plant


def _second_attribute(e: Edit) -> None:
    """A norm states lambda twice."""
    node = e.norms[0]
    first = next(a for a in node.attribute if a.name == "lambd")
    node.attribute.insert(0, onnx.helper.make_attribute("lambd", first.f * 1.5))


def _out_of_order(e: Edit) -> None:
    """A comparison of sizes comes after the node that reads it."""
    e.splice("logits", lambda n, x: n("Where", n("Not", "planted.above"), x, n("Neg", x)))
    n = onnx.helper.make_node
    e.proto.graph.node.extend(
        [
            n("Greater", ["planted.rows", "planted.limit"], ["planted.above"]),
            n("Shape", [e.model_input], ["planted.limit"], start=1, end=2),
            n("Shape", [e.model_input], ["planted.rows"], start=0, end=1),
        ]
    )


def _outputs_turned(e: Edit) -> None:
    kept = list(e.proto.graph.output)
    del e.proto.graph.output[:]
    e.proto.graph.output.extend(kept[::-1])


def _inputs_turned(e: Edit) -> None:
    kept = list(e.proto.graph.input)
    del e.proto.graph.input[:]
    e.proto.graph.input.extend(kept[::-1])


def _more_input(e: Edit) -> None:
    e.proto.graph.input.append(onnx.helper.make_tensor_value_info("temperature", onnx.TensorProto.FLOAT, [1]))


def _narrow_ids(e: Edit) -> None:
    """Token ids are int32."""
    value = next(v for v in e.proto.graph.input if v.name == "input_ids")
    value.type.tensor_type.elem_type = onnx.TensorProto.INT32
    e.splice("input_ids", lambda n, x: n("Cast", x, to=onnx.TensorProto.INT64))


def _declared_output(e: Edit) -> None:
    shape = e.proto.graph.output[0].type.tensor_type.shape
    shape.dim[-1].dim_value = shape.dim[-1].dim_value - 1


def _opset(domain: str, version: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        next(o for o in e.proto.opset_import if o.domain == domain).version = version

    return plant


def _opset_of_functions(e: Edit) -> None:
    for function in e.proto.functions:
        next(o for o in function.opset_import if o.domain == "").version = 13


def _no_opset(e: Edit) -> None:
    kept = [o for o in e.proto.opset_import if o.domain != "ai.ibnorm"]
    del e.proto.opset_import[:]
    e.proto.opset_import.extend(kept)


def _ir_version(version: int) -> Callable[[Edit], None]:
    return lambda e: setattr(e.proto, "ir_version", version)


def _stated_type(e: Edit) -> None:
    """A value in the middle is declared to have another type."""
    name = e.head_input
    kept = [v for v in e.proto.graph.value_info if v.name != name]
    del e.proto.graph.value_info[:]
    e.proto.graph.value_info.extend([*kept, onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None)])


def _quantised_input(position: int, value: Callable[[int, int], Any]) -> Callable[[Edit], None]:
    """An optional input of a product of blocks: an order of columns (4) or a bias (5)."""

    def plant(e: Edit) -> None:
        node = e.node("MatMulNBits", "up_proj")
        sizes = {a.name: a.i for a in node.attribute}
        while len(node.input) <= position:
            node.input.append("")
        node.input[position] = e.constant(value(sizes["K"], sizes["N"]))

    return plant


# ---- stored data ----


def _external(change: Callable[[list[onnx.TensorProto]], object]) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        change([t for t in e.proto.graph.initializer if t.external_data])

    return plant


def _entry(tensor: onnx.TensorProto, key: str) -> onnx.StringStringEntryProto:
    return next(entry for entry in tensor.external_data if entry.key == key)


def _swap_offsets(tensors: list[onnx.TensorProto]) -> None:
    """Two matrices of one shape read each other's place."""
    pairs = [(a, b) for i, a in enumerate(tensors) for b in tensors[i + 1 :] if a.dims == b.dims and len(a.dims) == 2]
    first, second = (_entry(tensor, "offset") for tensor in pairs[-1])
    first.value, second.value = second.value, first.value


def _shift(tensors: list[onnx.TensorProto]) -> None:
    offset = _entry(next(t for t in tensors if len(t.dims) == 2), "offset")
    offset.value = str(int(offset.value) + 4)


def _outside(tensors: list[onnx.TensorProto]) -> None:
    _entry(tensors[0], "location").value = "../model.onnx.data"


def _short_entry(tensors: list[onnx.TensorProto]) -> None:
    entry = _entry(tensors[-1], "length")
    entry.value = str(int(entry.value) - 4)


def _other_location(e: Edit) -> None:
    """One weight is read from another file, whose values differ."""
    content = bytearray((e.folder / "model.onnx.data").read_bytes())
    tensor = next(t for t in e.proto.graph.initializer if t.external_data and len(t.dims) == 2)
    start = int(_entry(tensor, "offset").value)
    content[start : start + 4] = np.float32(0.125).tobytes()
    (e.folder / "other.data").write_bytes(bytes(content))
    _entry(tensor, "location").value = "other.data"


# ---- folders ----


def _json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Edit], None]:
    return lambda e: e.edit_json(file, change)


def _new(file: str, content: str) -> Callable[[Edit], None]:
    return lambda e: (e.folder / file).write_text(content)


def _set(content: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def _genai(*path: str, value: Any) -> Callable[[Edit], None]:
    return _json("genai_config.json", lambda c: _set(c, path, value))


_VOCABULARY: Final = json.dumps({"<x>": 0, "a": 1})

KINDS: Final = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "format": (
            ("a wrong function before the right one", ("llama", "vit", "llama genai"), _wrong_function_first, ""),
            ("a wrong function after the right one", ("llama", "vit"), _wrong_function_last, ""),
            ("a local function called Tanh", ("vit", "gpt2"), _own_operator("Tanh"), ""),
            ("a local function called Abs", ("llama", "resnet"), _own_operator("Abs"), ""),
            ("a local function called Sigmoid", ("llama", "llama genai"), _own_operator("Sigmoid"), ""),
            ("lambda is stated twice", ("llama", "vit", "llama genai"), _second_attribute, ""),
            ("an attribute that norms do not have", ("llama", "vit"), lambda e: e.set(e.norms[0], mode=b"fast"), ""),
            ("nodes out of order", ("llama", "vit"), _out_of_order, ""),
            ("outputs in another order", ("llama decoder", "gpt2 decoder"), _outputs_turned, ""),
            (
                "inputs in another order",
                ("llama", "llama decoder"),
                _inputs_turned,
                "runtimes take inputs by name, so nothing changes",
            ),
            ("an input more", ("llama", "vit"), _more_input, ""),
            ("token ids of 32 bits", ("llama", "gpt2", "llama int8"), _narrow_ids, ""),
            ("an output is declared narrower", ("llama", "vit"), _declared_output, ""),
            ("version 99 of the norms", ("llama", "vit"), _opset("ai.ibnorm", 99), ""),
            ("opset 18 in a file of opset 23", ("llama", "gpt2"), _opset("", 18), ""),
            ("functions of opset 13", ("llama", "vit", "resnet"), _opset_of_functions, ""),
            ("no version of the norms", ("llama", "vit"), _no_opset, ""),
            ("a format that is too new", ("llama", "vit"), _ir_version(99), ""),
            ("a value is declared double", ("llama", "vit"), _stated_type, ""),
            (
                "an order of columns in a product of blocks",
                QUANTISED,
                _quantised_input(4, lambda k, n: np.arange(k, dtype=np.int32)[::-1] // 32),
                "",
            ),
            (
                "a bias in a product of blocks",
                QUANTISED,
                _quantised_input(5, lambda k, n: np.linspace(-1e-2, 1e-2, n, dtype=np.float32)),
                "",
            ),
        ),
        "folder of stored data": (
            ("two weights exchange their places", _ONE, _external(_swap_offsets), ""),
            ("a weight begins one number later", _ONE, _external(_shift), ""),
            ("weights outside the folder", _ONE, _external(_outside), ""),
            ("a weight is one number shorter", _ONE, _external(_short_entry), ""),
            ("a weight in another file", _ONE, _other_location, ""),
        ),
        "folder of a language model": (
            ("no generation_config.json", _FOLDERS, lambda e: (e.folder / "generation_config.json").unlink(), ""),
            ("no config.json", _FOLDERS, lambda e: (e.folder / "config.json").unlink(), ""),
            ("a vocabulary of the old kind", _FOLDERS, _new("vocab.json", _VOCABULARY), ""),
            ("merges of the old kind", _FOLDERS, _new("merges.txt", "a b"), ""),
            ("special tokens in a file of their own", _FOLDERS, _new("special_tokens_map.json", "{}"), ""),
            ("tokens in a file of their own", _FOLDERS, _new("added_tokens.json", '{"<x>": 3}'), ""),
            ("genai: another kind of model", _ONE, _genai("model", "type", value="gpt2"), ""),
            ("genai: another padding token", _ONE, _genai("model", "pad_token_id", value=9), ""),
            ("genai: another first token", _ONE, _genai("model", "bos_token_id", value=9), ""),
            ("genai: more layers", _ONE, _genai("model", "decoder", "num_hidden_layers", value=3), ""),
            ("genai: another hidden size", _ONE, _genai("model", "decoder", "hidden_size", value=32), ""),
            (
                "genai: another library",
                _ONE,
                _genai("model", "decoder", "session_options", "custom_ops_library", value="other.so"),
                "",
            ),
            (
                "genai: another output",
                _ONE,
                _genai("model", "decoder", "outputs", value={"logits": "scores"}),
                "",
            ),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
