"""JSON and TOML from files of unknown origin: what is wrong is a ValueError or OSError, however deep or long it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibnorm_export.artifacts.manifest import read_manifest
from ibnorm_export.artifacts.metadata import ModelMetadata
from ibnorm_export.artifacts.tokenizer import end_tokens, read_json
from ibnorm_export.benchmark.baseline import read_baseline
from ibnorm_export.errors import IBNormError, ModelFileError
from ibnorm_export.gate.config import read_check_config
from ibnorm_export.models.containers.folders import read_config, weight_files
from ibnorm_export.parsing import parse_json, read_text, read_toml, read_yaml
from ibnorm_export.runtimes.tensorrt.description import read_description

LEVELS = (101, 900, 100_000)


def lists(levels: int) -> str:
    return "[" * levels + "]" * levels


def objects(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def test_a_hundred_levels_are_read() -> None:
    for text in (lists(100), objects(100)):
        value = parse_json(text)
        for _ in range(99):
            value = value[0] if isinstance(value, list) else value["a"]
        assert value in ([], {"a": 1})


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("nested", [lists, objects])
def test_more_levels_are_an_error(nested: Callable[[int], str], levels: int) -> None:
    with pytest.raises(ValueError, match="more than 100 levels"):
        parse_json(nested(levels))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("text", ["a = {lists}", "{dots} = 1", "[{dots}]"])
def test_nested_toml_is_an_error(tmp_path: Path, text: str, levels: int) -> None:
    file = tmp_path / "check.toml"
    file.write_text(text.format(lists=lists(levels), dots=".".join(["a"] * min(levels, 2000))))
    with pytest.raises(ValueError, match="more than 100 levels"):
        read_toml(file)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("nested", [lists, lambda levels: "- " * levels + "1"])
def test_nested_yaml_is_an_error(tmp_path: Path, nested: Callable[[int], str], levels: int) -> None:
    file = tmp_path / "model_config.yaml"
    file.write_text(nested(levels))
    with pytest.raises(ValueError, match="more than 100 levels"):
        read_yaml(file)


def test_yaml_is_read_without_aliases(tmp_path: Path) -> None:
    file = tmp_path / "model_config.yaml"
    file.write_text("n_layer: 2\nhf_config: {name: a, org: b}\n")
    assert read_yaml(file) == {"n_layer": 2, "hf_config": {"name": "a", "org": "b"}}
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    for text in ("\n".join(["a0: &a0 x", *lines]), "a: &a [*a]"):
        file.write_text(text)
        with pytest.raises(ValueError, match="aliases"):
            read_yaml(file)
    for text in ("a: [", "a: !!python/object/apply:os.getcwd []", "x" * 100_000 + ": ["):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"^[ -~]{1,203}$"):
            read_yaml(file)


def description(file: Path) -> object:
    plan = file.with_name(file.name.removesuffix(".json"))
    plan.touch()
    return read_description(plan)


#: Every reader of JSON or TOML, and the name of its file.
READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": lambda file: read_manifest(file.parent),
    "baseline.json": read_baseline,
    "tokenizer_config.json": read_json,
    "generation_config.json": lambda file: end_tokens(file.parent),
    "m.plan.json": description,
    "config.json": lambda file: read_config(file.parent),
    "model.safetensors.index.json": lambda file: weight_files(file.parent),
    "check.toml": read_check_config,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content",
    [
        lists(150).encode(),
        lists(100_000).encode(),
        objects(100_000).encode(),
        b"a = " + lists(100_000).encode(),
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"[" + b"9" * 5000 + b"]",
        b"a = " + b"9" * 5000,
        b'"' + b"x" * 100_000,
        b'{"' + b"x" * 100_000 + b'": 1}',
        b"",
    ],
)
def test_every_reader_reports_damage_in_a_short_line(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    try:
        READERS[name](file)
    except IBNormError as error:
        assert str(tmp_path) in str(error)
        assert len(str(error)) < 1000
    else:  # a JSON object without an entry that the reader needs
        assert name in ("tokenizer_config.json", "generation_config.json", "config.json")
        assert content.startswith(b"{") and len(content) < 200_000


def test_nested_metadata_is_an_error() -> None:
    for text in (lists(150), lists(100_000)):
        with pytest.raises(ModelFileError, match="is not valid JSON"):
            ModelMetadata.from_props({"ibnorm.norms": text}, Path("m.onnx"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="not a regular file"):
        read_text(tmp_path / "config.json")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 11)
    assert read_text(tmp_path / "a.txt", 11) == "x" * 11
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_text(tmp_path / "a.txt", 10)


@pytest.mark.parametrize("tokens", [[[2]], "2", 2.0, True, [None], -1, 10**30, {"a": 1}])
@pytest.mark.parametrize("name", ["genai_config.json", "generation_config.json", "config.json"])
def test_an_end_token_that_is_not_an_id_is_an_error(tmp_path: Path, name: str, tokens: Any) -> None:
    content = {"eos_token_id": tokens}
    (tmp_path / name).write_text(json.dumps({"model": content} if name == "genai_config.json" else content))
    with pytest.raises(ModelFileError, match=r"eos_token_id is .*; it must be a token id or a list of ids"):
        end_tokens(tmp_path)
