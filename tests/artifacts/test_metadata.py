"""The metadata of an exported file: what is written is read back, and damaged entries are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ibnorm_export.artifacts.metadata import (
    METADATA_FORMAT,
    CacheKind,
    ModelMetadata,
    QuantizationEntry,
    Target,
    Task,
)
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError

FILE = Path("model.onnx")

FORWARD = ModelMetadata(family="vit", opset=20, norms={"norm": {"compression": "linear"}}, versions={"onnx": "1"})
GENAI = ModelMetadata(
    family="llama",
    task=Task.TEXT_GENERATION,
    target=Target.ORT_GENAI,
    max_positions=64,
    dtype=DType.FP16,
    opset=21,
    fuse_skip=True,
    cache=CacheKind.DYNAMIC,
    quantization=QuantizationEntry(4, 32, head_bits=None, method="round to nearest", norms="fp32"),
    packed={"qkv": ("q", "k", "v")},
    config={"compression": "linear"},
    source_sha256="ab",
    arguments={
        "integers": {"mask": "bool"},
        "constants": {"k": None},
        "ranges": {"ids": [0, 9]},
        "sizes": {"batch": 2},
    },
    shape={"batch_size": 1},
    requires={"onnxruntime": "1.24"},
)


@pytest.mark.parametrize("metadata", [FORWARD, GENAI], ids=["forward", "genai"])
def test_what_is_written_is_read_back(metadata: ModelMetadata) -> None:
    assert ModelMetadata.from_props(metadata.to_props(), FILE) == metadata


def test_the_file_has_one_key_for_each_field_in_order() -> None:
    props = GENAI.to_props()
    assert list(props) == sorted(props)
    assert {name.removeprefix("ibnorm.") for name in props} == set(ModelMetadata.__dataclass_fields__) - {"other"}
    assert props["ibnorm.format"] == f'"{METADATA_FORMAT}"'
    assert props["ibnorm.task"] == '"text-generation"'
    assert props["ibnorm.packed"] == '{"qkv": ["q", "k", "v"]}'


def test_a_portable_file_of_a_checkpoint_has_no_keys_that_only_others_need() -> None:
    others = {f"ibnorm.{key}" for key in ("target", "packed", "arguments", "shape", "requires")}
    assert FORWARD.to_props().keys() == GENAI.to_props().keys() - others


def test_a_file_from_another_tool_has_empty_metadata() -> None:
    found = ModelMetadata.from_props({"author": "someone"}, FILE)
    assert found.is_empty
    assert found == ModelMetadata.empty()
    assert found.to_props() == {}
    assert (found.task, found.target, found.max_positions) == (Task.FORWARD, Target.PORTABLE, 0)


def test_unknown_keys_are_kept() -> None:
    found = ModelMetadata.from_props({**FORWARD.to_props(), "ibnorm.zoom": "[1]", "zoom": "2"}, FILE)
    assert found.other == {"zoom": [1]}
    assert found.to_dict()["zoom"] == [1]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("task", "speech", "must be one of forward, text-generation"),
        ("target", ["portable"], "must be one of portable, ort-genai"),
        ("cache", "none", "must be one of dynamic, static"),
        ("dtype", "int4", "must be one of fp32, fp16, bf16"),
        ("family", 5, "must be a string"),
        ("max_positions", True, "must be an integer"),
        ("max_positions", "64", "must be an integer"),
        ("inlined", 1, "must be true or false"),
        ("norms", [], "must be an object"),
        ("config", "vit", "must be an object"),
        ("packed", {"qkv": "q"}, "must be an object of lists of names"),
        ("arguments", {"integers": {"mask": "float32"}}, "must be an object of integers, constants, ranges, sizes"),
        ("arguments", {"ranges": {"ids": [9, 0]}}, "must be an object of integers"),
        ("shape", {"batch_size": "1"}, "must be an object of integers"),
        ("requires", {"onnxruntime": "new"}, "must be an object of versions"),
        ("arguments", {"sizes": {"batch": "2"}}, "must be an object of integers"),
        ("arguments", {"code": {}}, "must be an object of integers"),
        ("quantization", {"bits": 3}, "must be an object whose bits are 4 or 8"),
        ("family", ["x" * 1000], r"x\.\.\.; it must be a string"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_an_error(key: str, value: Any, expected: str) -> None:
    props = {**GENAI.to_props(), f"ibnorm.{key}": json.dumps(value)}
    with pytest.raises(ModelFileError, match=rf"model\.onnx: metadata '{key}' is .*{expected}"):
        ModelMetadata.from_props(props, FILE)


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["open", "deep"])
def test_an_entry_that_is_not_json_is_an_error(text: str) -> None:
    with pytest.raises(ModelFileError, match=r"metadata 'ibnorm\.config' is not valid JSON"):
        ModelMetadata.from_props({"ibnorm.config": text}, FILE)
