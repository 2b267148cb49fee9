"""Faults in metadata, in the structure of a file and in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper

from ibnorm_export.artifacts.manifest import write_manifest
from tests.verifier.faults.edit import Edit
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS"]

_FOLDERS: Final = ("llama decoder", "llama genai")
_ONE: Final = ("llama genai",)
_LIBRARY: Final = "libibnorm_ort.so"


def _claim(key: str, value: Any) -> Callable[[Edit], None]:
    return lambda e: e.claim(key, value(e.claimed(key)) if callable(value) else value)


def _first_norm(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(norms: dict[str, Any]) -> dict[str, Any]:
        path = next(iter(norms))
        return {**norms, path: {**norms[path], **changes}}

    return change


def _rename_norm(norms: dict[str, Any]) -> dict[str, Any]:
    path = next(iter(norms))
    return {("other" if p == path else p): spec for p, spec in norms.items()}


def _forget_norm(norms: dict[str, Any]) -> dict[str, Any]:
    return dict(list(norms.items())[1:])


def _no_metadata(e: Edit) -> None:
    del e.proto.metadata_props[:]


def _second_entry(e: Edit) -> None:
    e.proto.metadata_props.add(key="ibnorm.max_positions", value="9")


def _no_output(e: Edit) -> None:
    del e.proto.graph.output[-1]


def _more_output(e: Edit) -> None:
    e.proto.graph.output.append(onnx.helper.make_tensor_value_info(e.head_input, e.float_type, None))


def _renamed_output(e: Edit) -> None:
    e.proto.graph.node.append(onnx.helper.make_node("Identity", ["logits"], ["scores"]))
    e.proto.graph.output[0].name = "scores"


def _renamed_input(e: Edit) -> None:
    name = e.proto.graph.input[0].name
    e.replace_reads(name, "data")
    e.proto.graph.input[0].name = "data"


def _constant_output(e: Edit) -> None:
    """The output is the same for every input."""
    e.splice("logits", lambda n, x: n("Expand", np.full((1, 1), 0.5, np.float32), n("Shape", x)))


def _weight_as_input(e: Edit) -> None:
    tensor = e.tensor(e.matrix())
    e.proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def _old_opset(e: Edit) -> None:
    next(o for o in e.proto.opset_import if o.domain == "").version = 12


def _unused(e: Edit) -> None:
    """Most numbers of the file are bfloat16, and no node reads them."""
    tensor = onnx.helper.make_tensor("unused", onnx.TensorProto.BFLOAT16, [10**6], np.zeros(10**6, np.float32))
    e.proto.graph.initializer.append(tensor)


def _fixed_batch(e: Edit) -> None:
    for value in (*e.proto.graph.input, *e.proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


# ---- folders ----


def _json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Edit], None]:
    return lambda e: e.edit_json(file, change)


def _remove(file: str) -> Callable[[Edit], None]:
    return lambda e: (e.folder / file).unlink()


def _write(file: str, text: str) -> Callable[[Edit], None]:
    return lambda e: (e.folder / file).write_text(text)


def _swap_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def _swap_special(content: dict[str, Any]) -> None:
    content["added_tokens"] = [{**token, "id": token["id"] ^ 1} for token in content.get("added_tokens", [])] or [
        {
            "id": 5,
            "content": "<x>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]


def _library(change: Callable[[bytes], bytes]) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        file = e.folder / _LIBRARY
        file.write_bytes(change(file.read_bytes()))

    return plant


def _foreign_library(e: Edit) -> None:
    """Another library, which the manifest lists with its own hash."""
    file = e.folder / _LIBRARY
    file.write_bytes(file.read_bytes()[:64] + b"something else")
    manifest = json.loads((e.folder / "manifest.json").read_text())
    (e.folder / "manifest.json").unlink()
    write_manifest(e.folder, {_LIBRARY: file}, content={"target": manifest["target"]})


def _more_library(e: Edit) -> None:
    (e.folder / "other.so").write_bytes((e.folder / _LIBRARY).read_bytes())


def _damaged_data(e: Edit) -> None:
    """The last bytes of the weights are zero."""
    file = e.folder / "model.onnx.data"
    content = file.read_bytes()
    file.write_bytes(content[:-64] + bytes(64))


def _short_data(e: Edit) -> None:
    file = e.folder / "model.onnx.data"
    file.write_bytes(file.read_bytes()[:-64])


def _genai(*path: str, value: Any) -> Callable[[Edit], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return _json("genai_config.json", change)


_METADATA: Final = ("llama", "vit bf16", "llama int8")

KINDS: Final = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "metadata": (
            ("a norm's lambda is stated wrongly", _METADATA, _claim("norms", _first_norm(**{"lambda": 7.0})), ""),
            ("a norm's epsilon is stated wrongly", _METADATA, _claim("norms", _first_norm(epsilon=0.5)), ""),
            ("a norm's kind is stated wrongly", _METADATA, _claim("norms", _first_norm(compression="S")), ""),
            ("a norm has another path", _METADATA, _claim("norms", _rename_norm), ""),
            ("a norm is not stated", _METADATA, _claim("norms", _forget_norm), ""),
            ("inlined is stated of norm nodes", _METADATA, _claim("inlined", True), ""),
            (
                "inlined is denied of expanded norms",
                ("vit inlined", "llama inlined"),
                _claim("inlined", False),
                "a note says that the norms are inlined, as tools do without changing the metadata",
            ),
            ("another family", _METADATA, _claim("family", "gpt2"), ""),
            (
                "another task",
                ("llama", "llama int8"),
                _claim("task", lambda t: "forward" if t != "forward" else "text-generation"),
                "",
            ),
            ("another length", ("llama", "llama decoder", "gpt2"), _claim("max_positions", 4096), ""),
            ("another dtype", ("llama", "vit fp16"), _claim("dtype", "bf16"), ""),
            (
                "another opset",
                ("llama", "vit"),
                _claim("opset", 18),
                "a note names it: tools convert files to other opsets",
            ),
            (
                "another kind of cache",
                ("llama decoder", "llama static"),
                _claim("cache", lambda c: "static" if c == "dynamic" else "dynamic"),
                "",
            ),
            ("another configuration", ("llama", "vit"), _claim("config", lambda c: {**c, "lambda": 9.0}), ""),
            ("a key of the metadata twice", ("llama", "vit"), _second_entry, ""),
            ("no metadata", ("llama",), _no_metadata, ""),
            ("another format", ("llama",), _claim("format", "99"), ""),
            (
                "packed names other matrices",
                ("llama genai",),
                _claim("packed", lambda p: {k: v[::-1] for k, v in p.items()}),
                "",
            ),
        ),
        "structure": (
            ("an output is missing", ("llama decoder", "gpt2 decoder"), _no_output, ""),
            ("an output more", ("llama", "vit"), _more_output, ""),
            ("logits have another name", ("llama", "vit"), _renamed_output, ""),
            ("an input has another name", ("llama", "vit"), _renamed_input, ""),
            ("a constant output", ("llama", "vit"), _constant_output, ""),
            ("a weight that callers may replace", ("llama",), _weight_as_input, "the caller replaces it, not the file"),
            ("an older opset", ("llama", "vit"), _old_opset, ""),
            ("an unused bf16 tensor", ("llama", "vit"), _unused, "no node reads it"),
            (
                "a fixed batch",
                ("vit", "llama"),
                _fixed_batch,
                "other sizes are refused by the runtime; a note names the size",
            ),
        ),
        "folder": (
            ("tokens are exchanged", _FOLDERS, _json("tokenizer.json", _swap_tokens), ""),
            ("special tokens are others", _FOLDERS, _json("tokenizer.json", _swap_special), ""),
            ("no tokenizer", _FOLDERS, _remove("tokenizer.json"), ""),
            ("a damaged tokenizer", _FOLDERS, _write("tokenizer.json", "{"), ""),
            (
                "another configuration of the tokenizer",
                _FOLDERS,
                _json("tokenizer_config.json", lambda c: c.update(add_bos_token=True)),
                "",
            ),
            ("another end token", _FOLDERS, _json("generation_config.json", lambda c: c.update(eos_token_id=9)), ""),
            (
                "another lambda in config.json",
                _FOLDERS,
                _json("config.json", lambda c: c["ibnorm"].update({"lambda": 2.0})),
                "",
            ),
            ("another base in config.json", _FOLDERS, _json("config.json", lambda c: c.update(rope_theta=5e5)), ""),
            ("a chat template", _FOLDERS, _write("chat_template.jinja", "{{ 1 }}"), ""),
            ("weights end with zeros", ("llama genai",), _damaged_data, ""),
            ("weights are cut off", ("llama genai",), _short_data, ""),
        ),
        "folder for onnxruntime-genai": (
            ("genai: another end token", _ONE, _genai("model", "eos_token_id", value=7), ""),
            ("genai: another length", _ONE, _genai("model", "context_length", value=63), ""),
            ("genai: a shorter search", _ONE, _genai("search", "max_length", value=8), ""),
            ("genai: another head size", _ONE, _genai("model", "decoder", "head_size", value=8), ""),
            ("genai: another number of heads", _ONE, _genai("model", "decoder", "num_key_value_heads", value=4), ""),
            ("genai: another file", _ONE, _genai("model", "decoder", "filename", value="other.onnx"), ""),
            ("genai: another vocabulary", _ONE, _genai("model", "vocab_size", value=255), ""),
            ("genai: another input name", _ONE, _genai("model", "decoder", "inputs", value={"input_ids": "ids"}), ""),
            ("genai: no shared buffer", _ONE, _genai("search", "past_present_share_buffer", value=False), ""),
            (
                "genai: another temperature",
                _ONE,
                _genai("search", "temperature", value=0.5),
                "users tune it; a note names it",
            ),
            ("genai: no configuration", _ONE, _remove("genai_config.json"), ""),
            ("a truncated library", _ONE, _library(lambda b: b[:-5]), ""),
            ("one byte of the library", _ONE, _library(lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]), ""),
            ("another library with its own hash", _ONE, _foreign_library, ""),
            ("no library", _ONE, _remove(_LIBRARY), ""),
            ("a library that is not listed", _ONE, _more_library, ""),
            ("no manifest", _ONE, _remove("manifest.json"), ""),
            ("a manifest of another target", _ONE, _json("manifest.json", lambda m: m.update(target="portable")), ""),
            (
                "a manifest with a file outside",
                _ONE,
                _json("manifest.json", lambda m: m["files"].update({"../x": {"sha256": "0"}})),
                "",
            ),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
