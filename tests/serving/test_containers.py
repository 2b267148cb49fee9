"""Triton's containers: which one runs a file, and a server that is too old is refused before it starts."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import onnx.parser
import pytest

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.runtime_versions import version_numbers
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.serving.triton.binary import TritonBinary
from ibnorm_export.serving.triton.containers import CONTAINERS, check_models, container_for, server_runtime

ATTENTION = "g (float[1,2,3,4] a) => (float[1,2,3,4] b) { b = Attention(a, a, a) }"
PLAIN = "g (float[n] a) => (float[n] b) { b = Neg(a) }"


def model_of(folder: Path, *, opset: int, graph: str = PLAIN) -> ExportedModel:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {graph}'), folder / "model.onnx")
    return ExportedModel(folder / "model.onnx")


def server(folder: Path, version: str) -> TritonBinary:
    """A server as in a container: bin/tritonserver, and TRITON_VERSION beside bin."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "tritonserver").touch()
    (folder / "TRITON_VERSION").write_text(f"{version}\n", encoding="utf-8")
    return TritonBinary(folder / "bin" / "tritonserver", None)


def test_the_table_is_in_order() -> None:
    for earlier, later in itertools.pairwise(CONTAINERS):
        assert earlier.name < later.name
        assert version_numbers(earlier.server) < version_numbers(later.server)
        assert version_numbers(earlier.onnxruntime) <= version_numbers(later.onnxruntime)


@pytest.mark.parametrize(
    ("opset", "graph", "container"),
    [
        (18, PLAIN, "24.07"),
        (22, PLAIN, "25.05"),
        (23, PLAIN, "25.08"),
        (23, ATTENTION, "26.02"),  # ONNX Runtime 1.23 gives NaN in rows that are padded on the left
        (26, PLAIN, "26.07"),
    ],
)
def test_the_oldest_container_that_runs_a_file(tmp_path: Path, opset: int, graph: str, container: str) -> None:
    found = container_for(model_of(tmp_path, opset=opset, graph=graph))
    assert found is not None and found.name == container


def test_a_server_that_is_too_old_is_refused(tmp_path: Path) -> None:
    model_of(tmp_path / "repository" / "m" / "1", opset=23, graph=ATTENTION)
    old, new, other = (server(tmp_path / version, version) for version in ("2.62.0", "2.66.0", "9.9.9"))
    assert [server_runtime(binary) for binary in (old, new, other)] == ["1.23.1", "1.24.1", ""]
    with pytest.raises(
        BackendUnavailable,
        match=r"needs onnxruntime 1\.24 or later \(the operator Attention of opset 23\), but 1\.23\.1 is installed: "
        r"use a container from 26\.02 on, or export with --for 'ort>=1\.23'",
    ):
        check_models(tmp_path / "repository", old)
    check_models(tmp_path / "repository", new)
    check_models(tmp_path / "repository", other)  # not known: the server itself decides


def test_a_server_without_a_version_is_not_known(tmp_path: Path) -> None:
    binary = server(tmp_path / "a", "2.62.0")
    (tmp_path / "a" / "TRITON_VERSION").unlink()
    assert server_runtime(binary) == ""
