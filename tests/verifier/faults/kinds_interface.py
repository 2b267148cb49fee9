"""Faults in what callers rely on: names and types of axes, and the files that readers of a folder take."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from tests.verifier.faults.edit import Edit
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS"]

_TEXT: Final = ("llama", "llama decoder", "llama int8", "llama web", "gpt2 decoder")
_IMAGES: Final = ("vit", "resnet", "vit web")
_FOLDERS: Final = ("llama decoder", "llama genai", "llama web")
_WEB: Final = ("llama web", "vit web")


def _axes(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def _exchange_axes(e: Edit) -> None:
    first, second = _axes(e.proto.graph.input[0])[:2]
    first.dim_param, second.dim_param = second.dim_param, first.dim_param


def _one_axis(e: Edit) -> None:
    """Both axes of the token ids have the name of the batch."""
    first, second = _axes(e.proto.graph.input[0])[:2]
    second.dim_param = first.dim_param


def _mask_axis(e: Edit) -> None:
    """The mask's axis, which grows with the cache, has the name of the new tokens'."""
    mask = next(value for value in e.proto.graph.input if value.name == "attention_mask")
    _axes(mask)[1].dim_param = _axes(e.proto.graph.input[0])[1].dim_param


def _no_shape(e: Edit) -> None:
    e.proto.graph.input[0].type.tensor_type.ClearField("shape")


def _free_axis(position: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        axis = _axes(e.proto.graph.input[0])[position]
        axis.Clear()
        axis.dim_param = "free"

    return plant


def _exchange_output_axes(e: Edit) -> None:
    first, second = _axes(e.proto.graph.output[0])[:2]
    first.dim_param, second.dim_param = second.dim_param, first.dim_param


def _output_of_one_row(e: Edit) -> None:
    axis = _axes(e.proto.graph.output[0])[0]
    axis.Clear()
    axis.dim_value = 1


def _other_heads(e: Edit) -> None:
    axis = _axes(next(o for o in e.proto.graph.output if o.name.startswith("present")))[1]
    axis.Clear()
    axis.dim_value = 7


def _input_type(part: str, kind: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        value = next(v for v in e.proto.graph.input if part in v.name)
        value.type.tensor_type.elem_type = kind
        e.splice(value.name, lambda n, x: n("Cast", x, to=onnx.TensorProto.FLOAT))

    return plant


def _output_type(part: str, kind: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        value = next(v for v in e.proto.graph.output if part in v.name)
        value.type.tensor_type.elem_type = kind
        e.splice(value.name, lambda n, x: n("Cast", x, to=kind))

    return plant


# ---- functions and stored data ----


def _default_lambda(stated: bool) -> Callable[[Edit], None]:
    """A function has a default for lambda, which no definition has; a norm may rely on it."""

    def plant(e: Edit) -> None:
        node = e.norms[0]
        function = next(f for f in e.proto.functions if f.domain == node.domain and f.name == node.op_type)
        function.attribute.remove("lambd")
        function.attribute_proto.append(onnx.helper.make_attribute("lambd", 7.0))
        if not stated:
            kept = [a for a in node.attribute if a.name != "lambd"]
            del node.attribute[:]
            node.attribute.extend(kept)

    return plant


def _whole_lambda(e: Edit) -> None:
    node = e.norms[0]
    number = next(a.f for a in node.attribute if a.name == "lambd")
    kept = [a for a in node.attribute if a.name != "lambd"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("lambd", int(number))])


def _other_modules(e: Edit) -> None:
    """Two norms have each other's path."""
    entries = [next(p for p in node.metadata_props if p.key == "module") for node in e.norms[:2]]
    entries[0].value, entries[1].value = entries[1].value, entries[0].value


def _changed(e: Edit) -> Any:
    array = e.values(e.matrix()).copy()
    array.reshape(-1)[7] *= np.float32(1.01)
    return array


def _number_list(e: Edit) -> None:
    """A weight is a list of numbers, one of which differs."""
    tensor, array = e.tensor(e.matrix()), _changed(e)
    tensor.ClearField("raw_data")
    tensor.float_data.extend(array.reshape(-1).tolist())


def _sparse(e: Edit) -> None:
    tensor, array = e.tensor(e.matrix()), _changed(e)
    values = onnx.numpy_helper.from_array(array.reshape(-1), tensor.name)
    places = onnx.numpy_helper.from_array(np.arange(array.size, dtype=np.int64))
    e.proto.graph.initializer.remove(tensor)
    e.proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, list(array.shape)))


def _constant_node(e: Edit) -> None:
    tensor, array = e.tensor(e.matrix()), _changed(e)
    e.proto.graph.initializer.remove(tensor)
    value = onnx.numpy_helper.from_array(array)
    e.proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=value))


# ---- folders ----


def _json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Edit], None]:
    return lambda e: e.edit_json(file, change)


def _set(file: str, **values: Any) -> Callable[[Edit], None]:
    return _json(file, lambda content: content.update(values))


def _key_twice(file: str, key: str, value: Any) -> Callable[[Edit], None]:
    """A key is given before the one that Python's reader takes."""

    def plant(e: Edit) -> None:
        place = e.folder / file
        place.write_text(place.read_text().replace("{", f"{{{json.dumps(key)}: {json.dumps(value)},", 1))

    return plant


def _new(file: str, text: str) -> Callable[[Edit], None]:
    return lambda e: (e.folder / file).write_text(text)


def _templates(e: Edit) -> None:
    (e.folder / "additional_chat_templates").mkdir()
    (e.folder / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")


def _section(section: Any) -> Callable[[Edit], None]:
    return _json("config.json", lambda content: content.update({"transformers.js_config": section}))


_SPACES: Final = {"type": "Whitespace"}
_SHORTENED: Final = {"max_length": 4, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
_REFUSED: Final = "the runtime refuses other sizes itself"

KINDS: Final = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "interface": (
            ("axes of the token ids exchanged", _TEXT, _exchange_axes, ""),
            ("both axes of the token ids are the batch", _TEXT, _one_axis, ""),
            ("the mask's axis is that of the new tokens", ("llama decoder", "gpt2 decoder"), _mask_axis, ""),
            ("an input without a shape", ("llama", *_IMAGES), _no_shape, ""),
            ("the colours of an image are free", _IMAGES, _free_axis(1), _REFUSED),
            ("the height of an image is free", ("resnet",), _free_axis(2), _REFUSED),
            ("axes of the logits exchanged", ("llama", "llama decoder", "gpt2"), _exchange_output_axes, ""),
            ("logits are declared for one row", ("llama", "vit"), _output_of_one_row, ""),
            ("a cache is declared with other heads", ("llama decoder", "llama web"), _other_heads, ""),
            (
                "a cache is given in fp16",
                ("llama decoder", "llama static"),
                _input_type(".value", onnx.TensorProto.FLOAT16),
                "",
            ),
            (
                "a cache is returned in fp16",
                ("llama decoder", "llama static"),
                _output_type(".value", onnx.TensorProto.FLOAT16),
                "",
            ),
            ("logits in fp16", ("llama", "vit"), _output_type("logits", onnx.TensorProto.FLOAT16), ""),
            ("images in fp16", ("vit", "resnet"), _input_type("pixel", onnx.TensorProto.FLOAT16), ""),
            ("images in float64", ("vit", "resnet"), _input_type("pixel", onnx.TensorProto.DOUBLE), ""),
            ("images in bytes", ("vit", "resnet"), _input_type("pixel", onnx.TensorProto.UINT8), ""),
        ),
        "stored data": (
            ("a default for lambda in a function", ("llama", "vit"), _default_lambda(stated=False), ""),
            ("a default for lambda, which is stated too", ("llama", "vit"), _default_lambda(stated=True), ""),
            ("lambda is a whole number", ("llama", "vit"), _whole_lambda, ""),
            ("two norms have each other's path", ("llama", "vit"), _other_modules, ""),
            ("a weight as a list of numbers, one of them wrong", ("llama", "vit"), _number_list, ""),
            ("a sparse weight, one value of which is wrong", ("llama", "vit"), _sparse, ""),
            ("a weight as a Constant node, one value wrong", ("llama", "vit"), _constant_node, ""),
        ),
        "folder, further files": (
            ("a key twice in tokenizer.json", _FOLDERS, _key_twice("tokenizer.json", "truncation", _SHORTENED), ""),
            ("a key twice in config.json", _FOLDERS, _key_twice("config.json", "hidden_size", 7), ""),
            ("tokenizer: it lowers letters", _FOLDERS, _set("tokenizer.json", normalizer={"type": "Lowercase"}), ""),
            (
                "tokenizer: it splits at spaces",
                _FOLDERS,
                _set("tokenizer.json", pre_tokenizer=_SPACES),
                "",
            ),
            ("tokenizer: a merge", _FOLDERS, _json("tokenizer.json", lambda c: c["model"].update(merges=["a b"])), ""),
            ("tokenizer: another decoder", _FOLDERS, _set("tokenizer.json", decoder={"type": "Fuse"}), ""),
            ("tokenizer: texts end after 4 tokens", _FOLDERS, _set("tokenizer.json", truncation=_SHORTENED), ""),
            ("tokenizer: another length", _FOLDERS, _set("tokenizer_config.json", model_max_length=7), ""),
            ("tokenizer: a template", _FOLDERS, _set("tokenizer_config.json", chat_template="{{ 1 }}"), ""),
            ("generation: a shorter text", _FOLDERS, _set("generation_config.json", max_length=5), ""),
            (
                "generation: suppressed tokens",
                _FOLDERS,
                _set("generation_config.json", suppress_tokens=[5]),
                "",
            ),
            ("config: another head size", _FOLDERS, _set("config.json", head_dim=8), ""),
            ("config: true for 1", _FOLDERS, _set("config.json", num_hidden_layers=True), ""),
            ("further chat templates", _FOLDERS, _templates, ""),
            ("a template of processors", _FOLDERS, _new("chat_template.json", "{}"), ""),
            ("a list of words", _FOLDERS, _new("vocab.txt", "a"), ""),
            ("a preprocessor of a text", ("llama decoder", "llama web"), _new("preprocessor_config.json", "{}"), ""),
            ("a section for transformers.js elsewhere", ("llama decoder",), _section({"dtype": "q4"}), ""),
            ("transformers.js: weights that are not there", _WEB, _section({"dtype": "q4"}), ""),
            (
                "transformers.js: data that is not there",
                _WEB,
                _section({"use_external_data_format": {"model.onnx": 1}}),
                "",
            ),
            ("transformers.js: another cache", _WEB, _section({"kv_cache_dtype": {"fp32": "float16"}}), ""),
            ("images: another mean", ("vit web",), _set("preprocessor_config.json", image_mean=[0.4, 0.5, 0.5]), ""),
            (
                "images: another size",
                ("vit web",),
                _set("preprocessor_config.json", size={"height": 9, "width": 9}),
                "",
            ),
            ("images: labels", ("vit web",), _set("config.json", id2label={"0": "cat"}), ""),
            (
                "no preprocessor",
                ("vit web",),
                lambda e: (e.folder / "preprocessor_config.json").unlink(),
                "",
            ),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
