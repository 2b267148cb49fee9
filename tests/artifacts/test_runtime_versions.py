"""The oldest runtimes that run a file, and what is reported about one that is older."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ibnorm_export import models
from ibnorm_export.artifacts import runtime_versions
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.runtime_versions import (
    ONNX_RUNTIME,
    check_installed,
    installed_version,
    newest_opset,
    oldest_versions,
    required_versions,
    requirements,
    version_numbers,
    version_problem,
)
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.verifier.verify import verify
from tests.support.planting import plant


def _needed(opset: int, *operators: str, bits: tuple[int, ...] = (), genai: bool = False) -> dict[str, str]:
    return oldest_versions(tuple(requirements(opset, operators, bits=bits, genai=genai)))


@pytest.mark.parametrize(
    ("opset", "operators", "bits", "version"),
    [
        (18, (), (), "1.18"),
        (21, (), (), "1.18"),
        (23, (), (), "1.23"),
        (23, ("Attention",), (), "1.24"),
        (22, ("Attention",), (), "1.22"),
        (20, (), (4,), "1.18"),
        (20, (), (4, 8), "1.22"),
    ],
)
def test_what_a_file_needs(opset: int, operators: tuple[str, ...], bits: tuple[int, ...], version: str) -> None:
    assert _needed(opset, *operators, bits=bits) == {"onnxruntime": version}


def test_a_folder_for_genai_needs_both() -> None:
    assert _needed(21, genai=True) == {"onnxruntime": "1.31", "onnxruntime-genai": "0.18"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1.24", (1, 24)), ("1.24.0rc1", (1, 24, 0)), ("1.31.1+cu13", (1, 31, 1)), ("", ()), ("x", ())],
)
def test_versions_are_read(text: str, numbers: tuple[int, ...]) -> None:
    assert version_numbers(text) == numbers


def test_an_older_runtime_takes_older_opsets() -> None:
    assert [newest_opset(version) for version in ((1, 17), (1, 18), (1, 22), (1, 23, 2))] == [0, 21, 22, 22]
    assert newest_opset((1, 23), ()) == 23, "without Attention"


def test_the_file_states_what_it_needs(exported_llama: ExportedModel, exported_vit: ExportedModel) -> None:
    assert exported_llama.metadata.requires == {"onnxruntime": "1.24"}
    assert exported_vit.metadata.requires == {"onnxruntime": "1.18"}
    for exported in (exported_llama, exported_vit):
        assert required_versions(exported) == exported.metadata.requires


def test_a_file_of_an_earlier_version_is_judged_by_its_operators(exported_llama: ExportedModel, tmp_path: Path) -> None:
    def forget(proto: object) -> None:
        props = proto.metadata_props  # type: ignore[attr-defined]  # a model
        kept = [(p.key, p.value) for p in props if p.key != "ibnorm.requires"]
        del props[:]
        for key, value in kept:
            props.add(key=key, value=value)

    earlier = plant(exported_llama, tmp_path, forget)
    assert not earlier.metadata.requires
    assert required_versions(earlier) == {"onnxruntime": "1.24"}


def test_a_runtime_that_is_too_old_is_one_line_with_what_to_do(exported_llama: ExportedModel) -> None:
    problem = version_problem(exported_llama, ONNX_RUNTIME, version="1.22.1")
    assert problem == (
        f"{exported_llama.path} needs onnxruntime 1.24 or later (the operator Attention of opset 23), but 1.22.1 is "
        "installed: pip install 'onnxruntime>=1.24', or export with --for 'ort>=1.22'"
    )
    assert not version_problem(exported_llama, ONNX_RUNTIME, version="1.24.0")
    assert not version_problem(exported_llama, ONNX_RUNTIME, version="unknown")
    assert "--for" not in version_problem(exported_llama, ONNX_RUNTIME, version="1.17.0"), "no file runs there"


def test_a_folder_of_the_builder_gets_no_advice_that_export_refuses(
    exported_llama: ExportedModel, tmp_path: Path
) -> None:
    def of_the_builder(proto: Any) -> None:
        proto.metadata_props.add(key="ibnorm.target", value='"ort-genai"')

    folder = plant(exported_llama, tmp_path, of_the_builder)
    problem = version_problem(folder, ONNX_RUNTIME, version="1.30.0")
    assert problem.endswith("but 1.30.0 is installed: pip install 'onnxruntime>=1.31'")


def test_onnxruntime_has_other_packages_too(exported_llama: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_versions, "version_of", lambda name: {"onnxruntime-openvino": "1.22.0"}.get(name))
    remedy = r"but 1\.22\.0 is installed: pip install 'onnxruntime-openvino>=1\.24'"
    with pytest.raises(BackendUnavailable, match=remedy):
        check_installed(exported_llama, ONNX_RUNTIME)


def test_every_command_checks_before_it_loads(
    exported_llama: ExportedModel, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert installed_version(ONNX_RUNTIME)
    check_installed(exported_llama, ONNX_RUNTIME)
    monkeypatch.setattr(runtime_versions, "version_of", lambda name: "1.23.2" if name == "onnxruntime" else None)
    with pytest.raises(BackendUnavailable, match=r"needs onnxruntime 1.24 or later"):
        open_runner("ort-cpu", exported_llama)
    with pytest.raises(BackendUnavailable, match=r"needs onnxruntime 1.24 or later"):
        verify(exported_llama, models.load(llama_checkpoint))


def test_the_remedy_works(llama_checkpoint: Path, tmp_path: Path) -> None:
    exported = export(models.load(llama_checkpoint), tmp_path / "m.onnx", options=ExportOptions(runtime="ort>=1.22"))
    assert not version_problem(exported, ONNX_RUNTIME, version="1.22.0")
