"""Messages: values are shortened and escaped, wherever they come from."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.fuzzing.corpus import write_records, write_text_files
from benchmarks.fuzzing.mutations import messages, places
from benchmarks.fuzzing.readers import READERS, Unfit, check_message, run_command
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import IBNormError, listed, message_text, printable
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.models.containers.folders import read_config, weight_files
from ibnorm_export.verifier.report import Finding

#: A name that no message should show as it is.
HOSTILE = "\x1b[2J\r\x9b2J\u202e" + "x" * 100_000


def test_a_list_of_names_is_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
    assert listed([HOSTILE] * 9, 2).endswith("x... and 7 more")
    assert len(listed([HOSTILE] * 9, 9)) < 300
    assert "\x1b" not in listed([HOSTILE])


def test_a_value_in_the_message_of_somebody_else_is_cut() -> None:
    text = str(IBNormError(f"the library says {HOSTILE}; install another"))
    assert text.startswith("the library says \\x1b[2J")
    assert text.endswith("x... install another")
    assert printable(text) == text
    assert len(text) < 300
    sentence = "a sentence of many words, " * 200
    assert "[... 3200 characters ...]" in message_text(sentence)
    path = "/" + "a" * 250
    assert str(IBNormError(f"{path} does not exist")) == f"{path} does not exist"


def test_a_finding_shows_names_of_the_file_shortened() -> None:
    check_message(str(Finding(f"norm {HOSTILE}", f"the node {HOSTILE} is wrong", code=FindingCode.NORM_DIFFERS)))


def with_hostile_values(content: Any) -> Iterator[Any]:
    """The value with each of its places replaced in turn, and each of its keys."""
    for index in range(len(list(places(content)))):
        for rename in (False, True):
            changed = copy.deepcopy(content)
            container, key = list(places(changed))[index]
            if not rename:
                container[key] = HOSTILE
            elif isinstance(container, dict):
                container[HOSTILE] = container.pop(key)
            yield changed


def check_refusal(name: str, file: Path) -> None:
    try:
        READERS[name].read(file, file.parent)
    except IBNormError as error:
        check_message(str(error))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_text_files(folder)
    write_records(folder)
    (folder / "m.plan").touch()
    return folder


@pytest.mark.parametrize(
    "name", ["manifest", "generation_config", "genai_config", "plan_description", "baseline", "request"]
)
def test_every_hostile_value_of_a_json_file_is_shortened(corpus: Path, name: str) -> None:
    file = corpus / READERS[name].file
    original = file.read_text()
    try:
        for changed in with_hostile_values(json.loads(original)):
            file.write_text(json.dumps(changed))
            check_refusal(name, file)
    finally:
        file.write_text(original)


def test_every_hostile_value_of_a_check_is_shortened(corpus: Path) -> None:
    file = corpus / READERS["check"].file
    lines = file.read_text().splitlines()
    for index, line in enumerate(lines):
        key, sign, value = line.partition(" = ")
        for changed in (f"{key}{sign}{json.dumps(HOSTILE)}", f"{json.dumps(HOSTILE)}{sign}{value}"):
            file.write_text("\n".join([*lines[:index], changed, *lines[index + 1 :]]))
            check_refusal("check", file)
    file.write_text("\n".join(lines))


def test_hostile_names_of_a_checkpoint_folder_are_shortened(tmp_path: Path) -> None:
    for content in (HOSTILE, [HOSTILE], {"weight_map": HOSTILE}, {"weight_map": {"a": HOSTILE}}, {"weight_map": [1]}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        for read in (read_config, weight_files):
            try:
                read(tmp_path)
            except IBNormError as error:
                check_message(str(error))


def test_every_hostile_text_of_an_onnx_file_is_shortened(exported_vit: ExportedModel, tmp_path: Path) -> None:
    content = exported_vit.path.read_bytes()
    model = onnx.load_model_from_string(content)
    found: dict[tuple[str, str], int] = {}
    for index, message in enumerate(messages(model)):
        for field, _ in message.ListFields():
            if field.type == field.TYPE_STRING:
                found.setdefault((message.DESCRIPTOR.name, field.name), index)
    assert len(found) > 12
    file = tmp_path / "m.onnx"
    for (_, field_name), index in found.items():
        model = onnx.load_model_from_string(content)
        message = list(messages(model))[index]
        if isinstance(getattr(message, field_name), str):
            setattr(message, field_name, HOSTILE)
        else:
            getattr(message, field_name)[0] = HOSTILE
        file.write_bytes(model.SerializeToString())
        run_command("inspect", file)


def test_an_unfit_message_is_noticed() -> None:
    for text in (HOSTILE, "x" * 1001, "a\x1b[0m"):
        with pytest.raises(Unfit):
            check_message(text)
