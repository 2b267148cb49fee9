"""The files next to a language model: compared with those that its checkpoint gives."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.manifest import write_manifest
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.exporter.companions import copy_companions
from ibnorm_export.exporter.genai_builder import expected_genai_config
from ibnorm_export.op.spec import OP_TYPES, SKIP_OP_TYPES
from ibnorm_export.verifier.folder import with_folder
from ibnorm_export.verifier.report import StaticReport

Edit = Callable[[Path], None]

LIBRARY = "libibnorm_ort.so"

#: The beginning of a shared library for this machine, as `machine_of` reads it.
ELF = (
    b"\x7fELF\x02\x01\x01"
    + bytes(9)
    + b"\x03\x00"
    + {"x86_64": b"\x3e\x00", "aarch64": b"\xb7\x00"}.get(platform.machine(), b"\x00\x00")
)


@pytest.fixture(scope="module")
def model(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    source = Path(shutil.copytree(llama_checkpoint, tmp_path_factory.mktemp("folder") / "checkpoint"))
    write_byte_tokenizer(source)
    return models.load(source, task="text-generation")


@pytest.fixture
def portable(exported_llama: ExportedModel, model: LoadedModel, tmp_path: Path) -> Path:
    """A folder as an export writes it; what its model computes does not matter here."""
    folder = tmp_path / "portable"
    folder.mkdir()
    shutil.copyfile(exported_llama.path, folder / "model.onnx")
    copy_companions(model, folder)
    return folder


@pytest.fixture
def genai(portable: Path, model: LoadedModel) -> Path:
    """A folder for onnxruntime-genai."""
    pytest.importorskip("onnxruntime_genai", reason="its builder writes genai_config.json")
    proto = onnx.load(portable / "model.onnx")
    proto.metadata_props.add(key="ibnorm.target", value=json.dumps(Target.ORT_GENAI))
    onnx.save(proto, portable / "model.onnx")
    config = expected_genai_config(model, dtype=DType.FP32, library=LIBRARY)
    (portable / "genai_config.json").write_text(json.dumps(config, indent=4))
    library = portable / LIBRARY
    library.write_bytes(ELF + b"\0".join(name.encode() for name in (*OP_TYPES, *SKIP_OP_TYPES)))
    write_manifest(portable, {LIBRARY: library}, content={"target": Target.ORT_GENAI})
    return portable


def check(folder: Path, model: LoadedModel) -> StaticReport:
    return with_folder(StaticReport(1, 1, ()), ExportedModel(folder), model=model)


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def swap_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def rewrite_as_data(folder: Path) -> None:
    """Other order of keys, other layout, the same content."""
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(dict(reversed(content.items())), indent=1))


PORTABLE: dict[str, tuple[Edit, str]] = {
    "swapped tokens": (
        edit("tokenizer.json", swap_tokens),
        r"tokenizer.json model.vocab.a: is 98; the checkpoint gives 97",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: .*not valid JSON"),
    "another end token": (
        edit("generation_config.json", lambda c: c.update(eos_token_id=9)),
        "generation_config.json eos_token_id: is 9; the checkpoint gives 2",
    ),
    "another configuration": (
        edit("config.json", lambda c: c["ibnorm"].update({"lambda": 2.0})),
        r"config.json ibnorm.lambda: is 2.0; the checkpoint gives 4.0",
    ),
    "a chat template that the checkpoint does not have": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 }}"),
        "chat_template.jinja: in the folder, but the checkpoint has no such file",
    ),
}


@pytest.mark.parametrize("fault", list(PORTABLE))
def test_a_fault_in_a_folder_is_named(portable: Path, model: LoadedModel, fault: str) -> None:
    change, pattern = PORTABLE[fault]
    assert check(portable, model)
    change(portable)
    report = check(portable, model)
    assert not report
    assert any(re.search(pattern, str(finding)) for finding in report.findings), report.findings


GENAI: dict[str, tuple[Edit, str]] = {
    "another end token": (
        edit("genai_config.json", lambda c: c["model"].update(eos_token_id=7)),
        "genai_config.json model.eos_token_id: is 7; the checkpoint gives 2",
    ),
    "another length": (
        edit("genai_config.json", lambda c: c["model"].update(context_length=63)),
        "genai_config.json model.context_length: is 63; the checkpoint gives 64",
    ),
    "a shorter search": (
        edit("genai_config.json", lambda c: c["search"].update(max_length=8)),
        "genai_config.json search.max_length: is 8; the checkpoint gives 64",
    ),
    "another head size": (
        edit("genai_config.json", lambda c: c["model"]["decoder"].update(head_size=16)),
        "genai_config.json model.decoder.head_size: is 16; the checkpoint gives 8",
    ),
    "another file": (
        edit("genai_config.json", lambda c: c["model"]["decoder"].update(filename="other.onnx")),
        'genai_config.json model.decoder.filename: is "other.onnx"; the checkpoint gives "model.onnx"',
    ),
    "a truncated library": (
        lambda folder: (folder / LIBRARY).write_bytes((folder / LIBRARY).read_bytes()[:-5]),
        f"{LIBRARY}: .*was changed after packaging",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: .*has no manifest.json"),
    "a file that is not listed": (
        lambda folder: (folder / "other.so").write_bytes(ELF),
        "other.so: is a native library that manifest.json does not list",
    ),
    "a lost file": (lambda folder: (folder / LIBRARY).unlink(), f"{LIBRARY}: missing, but manifest.json lists it"),
}


@pytest.mark.parametrize("fault", list(GENAI))
def test_a_fault_in_a_folder_for_genai_is_named(genai: Path, model: LoadedModel, fault: str) -> None:
    change, pattern = GENAI[fault]
    report = check(genai, model)
    assert report, report.findings
    change(genai)
    report = check(genai, model)
    assert not report
    assert any(re.search(pattern, str(finding)) for finding in report.findings), report.findings


def test_another_library_with_its_own_hash_is_named(genai: Path, model: LoadedModel) -> None:
    library = genai / LIBRARY
    library.write_bytes(ELF + b"something else")
    (genai / "manifest.json").unlink()
    write_manifest(genai, {LIBRARY: library}, content={"target": Target.ORT_GENAI})
    (finding,) = check(genai, model).findings
    assert "is not the library of fused kernels: it does not name IBNormS" in str(finding)


@pytest.mark.parametrize("name", ["genai_config.json", "manifest.json"])
@pytest.mark.parametrize("content", [b'{"model": {', b"\xff\xfe{}", b"[" * 100_000, b""])
def test_a_damaged_file_is_a_finding(genai: Path, model: LoadedModel, name: str, content: bytes) -> None:
    (genai / name).write_bytes(content)
    assert any(name in str(finding) for finding in check(genai, model).findings)


def test_what_users_tune_is_a_note(genai: Path, model: LoadedModel) -> None:
    edit("genai_config.json", lambda c: c["search"].update(temperature=0.7))(genai)
    report = check(genai, model)
    assert report, report.findings
    assert report.notes == (
        "genai_config.json search.temperature: is 0.7; the checkpoint gives 1.0 (users may tune it)",
    )


def test_the_same_data_in_another_layout_passes(genai: Path, model: LoadedModel) -> None:
    rewrite_as_data(genai)
    report = check(genai, model)
    assert report, report.findings


def test_whole_numbers_that_a_tool_wrote_without_a_fraction_pass(portable: Path, model: LoadedModel) -> None:
    config = portable / "config.json"
    config.write_text(config.read_text().replace("4.0", "4"))
    assert json.loads(config.read_text())["ibnorm"]["lambda"] == 4
    report = check(portable, model)
    assert report, report.findings


def test_a_file_alone_has_a_note(exported_llama: ExportedModel, model: LoadedModel, tmp_path: Path) -> None:
    shutil.copyfile(exported_llama.path, tmp_path / "model.onnx")
    report = check(tmp_path, model)
    assert report
    assert any("only the model was verified" in note for note in report.notes)
