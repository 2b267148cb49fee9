"""The JSON of every command: one form, published as a schema, with files, hashes, date and machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

from ibnorm_export import IBNormError, json_schema
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.cli import main
from ibnorm_export.json_document import json_document, schema_names
from ibnorm_export.json_text import SCHEMA_VERSION

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("write_json_schemas", ROOT / "scripts/write_json_schemas.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def cli(cli: Any) -> Callable[..., Any]:
    """The document that a command prints with --json."""
    return lambda *words: cli(*words, "--json").json


def test_every_command_has_a_schema() -> None:
    assert set(schema_names()) == main.COMMANDS.keys() - {"schema"}  # whose output is a schema
    for command in schema_names():
        jsonschema.Draft202012Validator.check_schema(json_schema(command))


def test_the_schemas_are_written_from_the_types(script: ModuleType) -> None:
    for command, schema in script.schemas().items():
        file = script.FOLDER / f"{command}.schema.json"
        assert file.read_text(encoding="utf-8") == script.text_of(schema), "run python scripts/write_json_schemas.py"


def test_every_key_has_a_meaning(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="'A thing' does not tell what size means"):
        script.closed("A thing", {"name": script.told("its name", script.TEXT), "size": script.WHOLE})

    def keys(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from keys(part)
        if isinstance(value, dict) and isinstance(value.get("properties"), dict):
            yield from value["properties"].items()

    found = [(command, key, about) for command in schema_names() for key, about in keys(json_schema(command))]
    assert len(found) > 900
    assert [(command, key) for command, key, about in found if not about.get("description")] == []


def test_a_schema_refuses_what_it_does_not_name() -> None:
    validator = jsonschema.Draft202012Validator(json_schema("compare"))
    document = json_document(
        "compare",
        {
            "verdict": "pass",
            "decision": "pass",
            "code": None,
            "ratio": 1.0,
            "low": 0.9,
            "high": "inf",
            "rounds": 4,
            "budget": 1.0,
            "resolution": 0.05,
            "rounds_needed": None,
            "notes": (),
        },
    )
    document = json.loads(json.dumps(document))
    validator.validate(document)
    for change in (
        {"ratio": "1.0"},
        {"verdict": "perhaps"},
        {"code": "IBN999"},
        {"more": 1},
        {"schema_version": 2},
        {"files": ["a"]},
    ):
        assert not validator.is_valid({**document, **change}), change
    for key in ("ratio", "date", "environment", "files", "schema_version"):
        assert not validator.is_valid({name: value for name, value in document.items() if name != key}), key


def test_files_have_their_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a.onnx", "folder/b.bin"):
        (tmp_path / name).write_bytes(name.encode())
    files = [tmp_path / "a.onnx", tmp_path / "folder", None, "", tmp_path / "missing"]
    found = json_document("x", {}, files=files)["files"]
    assert [file["path"] for file in found] == [str(tmp_path / "a.onnx"), str(tmp_path / "folder/b.bin")]
    assert [file["sha256"] for file in found] == [hashlib.sha256(n).hexdigest() for n in (b"a.onnx", b"folder/b.bin")]
    assert [file["size_bytes"] for file in found] == [6, 12]


def test_inspect_writes_tensors_as_objects_and_epsilon_as_the_user_does(
    cli: Any, llama_checkpoint: Path, exported_llama: ExportedModel
) -> None:
    file, checkpoint = cli("inspect", exported_llama.path), cli("inspect", llama_checkpoint)
    for found in (file, checkpoint):
        assert found["inputs"][0]["name"] == "input_ids"
        assert found["inputs"][0]["dtype"] == "int64"
        assert found["inputs"][0]["shape"] == ["batch_size", "sequence_length"]
        assert {(norm["lambda"], norm["epsilon"]) for norm in found["norms"]} == {(4.0, 1e-5)}, "not 9.99999974e-06"
    assert file["files"][0]["sha256"] == hashlib.sha256(exported_llama.path.read_bytes()).hexdigest()
    assert {Path(f["path"]).name for f in checkpoint["files"]} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("words", [("doctor",), ("explain",), ("explain", "IBN103")])
def test_commands_without_a_model(cli: Any, words: tuple[str, ...]) -> None:
    found = cli(*words)
    assert found["schema_version"] == SCHEMA_VERSION
    assert found["environment"]["processor"]


def test_package(cli: Any, exported_llama: ExportedModel, tmp_path: Path) -> None:
    found = cli("package", exported_llama.path, "-o", tmp_path / "repository")
    assert any(file["path"].endswith("config.pbtxt") for file in found["files"])


def test_an_error_is_in_the_schema_too(cli: Any) -> None:
    assert cli("verify", "nowhere.onnx", "nowhere")["exit_code"] == 2


def test_schema_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", "schema", "verify"])
    assert main.main() == 0
    assert json.loads(capsys.readouterr().out) == json_schema("verify")
    with pytest.raises(IBNormError, match="no schema of 'verfy'; there is one of analyze, bench"):
        json_schema("verfy")
