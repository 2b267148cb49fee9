"""Copies of a file with external data take no disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.exporter import single_file
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.graph.stored_graph import read_graph
from ibnorm_export.runtimes import ort as ort_runner
from ibnorm_export.verifier import comparison as comparison_module
from ibnorm_export.verifier.file_copies import write_copy
from ibnorm_export.verifier.verify import VerifyOptions, verify


@pytest.fixture
def external(vit_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportedModel:
    """A file in bf16 with its weights in a second file."""
    monkeypatch.setattr(single_file, "EXTERNAL_ABOVE_BYTES", 1000)
    return export(models.load(vit_checkpoint), tmp_path / "m.onnx", options=ExportOptions(dtype=DType.BF16))


def test_copies_of_copies_refer_to_external_data_and_that_of_one_file_is_written(
    external: ExportedModel, tmp_path: Path
) -> None:
    (folder := tmp_path / "copies").mkdir()
    copy = write_copy(read_graph(external), external, file=folder / "copy.onnx", refers=True)
    again = write_copy(read_graph(copy), copy, file=folder / "again.onnx", refers=True)
    assert sorted(file.name for file in folder.iterdir()) == ["again.onnx", "copy.onnx"]
    for made in (copy, again):
        assert made.external_files == external.external_files
        assert list(made.proto.graph.initializer) == list(external.proto.graph.initializer)
        for name in external.weights:
            np.testing.assert_array_equal(made.array(name), external.array(name))
    written = write_copy(read_graph(again), again, file=folder / "written.onnx", refers=False)
    assert written.external_files == (folder / "written.onnx.data",)
    whole = tmp_path / "whole.onnx"
    onnx.save(onnx.load(external.path), whole)
    written = write_copy(read_graph(ExportedModel(whole)), ExportedModel(whole), file=folder / "one.onnx", refers=True)
    assert written.external_files == (folder / "one.onnx.data",)


def test_a_file_too_large_for_memory_is_compared_with_its_weights_mapped(
    external: ExportedModel, vit_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[bool] = []
    plain = ort_runner.session_options

    def watched(*args: object, maps_weights: bool = False, **more: object) -> object:
        mapped.append(maps_weights)
        return plain(*args, maps_weights=maps_weights, **more)  # type: ignore[arg-type]  # what it is given

    monkeypatch.setattr(ort_runner, "session_options", watched)
    monkeypatch.setattr(comparison_module, "_LARGEST_HELD", 0)
    model = models.load(vit_checkpoint)
    options = VerifyOptions(samples=1, layers=True)
    report = verify(external, model, options=options)
    assert report, report.findings
    assert len(mapped) > 1
    assert all(mapped)
    next(a for n in external.proto.graph.node for a in n.attribute if a.name == "lambd").f *= 1.1
    external.path.write_bytes(external.proto.SerializeToString())
    report = verify(ExportedModel(external.path), model, options=options)
    assert report.numeric is not None
    assert not report.numeric
