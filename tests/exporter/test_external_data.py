"""Weights in a second file next to the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.analysis.norms import analyze
from ibnorm_export.analysis.options import AnalysisOptions
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.exporter import single_file
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.serving.triton.repository import package
from ibnorm_export.verifier.verify import VerifyOptions, verify


@pytest.fixture
def external(
    prebuilt: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ExportedModel, LoadedModel]:
    monkeypatch.setattr(single_file, "EXTERNAL_ABOVE_BYTES", 1000)
    (tmp_path / "folder").mkdir()
    return export(prebuilt, tmp_path / "folder" / "m.onnx"), prebuilt


def test_external_data_is_one_file_next_to_the_model(external: tuple[ExportedModel, LoadedModel]) -> None:
    exported, model = external
    assert sorted(p.name for p in exported.path.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    weights = sum(t.nbytes for t in model.module.state_dict().values())
    assert exported.size_bytes == sum(p.stat().st_size for p in exported.path.parent.iterdir()) > weights
    assert exported.path.stat().st_size < weights
    report = verify(exported, model)
    assert report, report.findings
    report = verify(exported, model, options=VerifyOptions(backend="reference", samples=1))
    assert report, report.findings
    moved = exported.path.parent.rename(exported.path.parent.parent / "moved") / "m.onnx"
    assert verify(ExportedModel(moved), model), "the pair may be moved together"


def test_external_data_in_half_precision(vit_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file, "EXTERNAL_ABOVE_BYTES", 1000)
    model = models.load(vit_checkpoint)
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(dtype=DType.BF16))
    report = verify(exported, model, options=VerifyOptions(samples=2))
    assert report, report.findings


def test_replacing_external_data_leaves_no_mixture(
    external: tuple[ExportedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the two files, there is no file under the target's name; afterwards both are new."""
    exported, model = external
    whole = Path.replace

    def stops_at_the_model(self: Path, target: Path) -> Path:
        if target == exported.path:
            raise KeyboardInterrupt
        return whole(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stops_at_the_model)
        with pytest.raises(KeyboardInterrupt):
            export(model, exported.path)
    assert [p.name for p in exported.path.parent.iterdir()] == ["m.onnx.data"]
    assert verify(export(model, exported.path), model)
    monkeypatch.setattr(single_file, "EXTERNAL_ABOVE_BYTES", 10**9)
    assert verify(export(model, exported.path), model), "small again"


def set_entry(key: str, value: str) -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_entry("location", "../outside"), "points outside"),
        (set_entry("location", "/etc/passwd"), "points outside"),
        (set_entry("location", ""), "points outside"),
        (set_entry("location", "link"), "points outside"),
        (set_entry("location", "elsewhere.data"), "elsewhere.data is missing"),
        (set_entry("location", "."), "is missing"),
        (set_entry("offset", "999999999"), "truncated"),
        (set_entry("offset", "-4"), "truncated|no valid offset and length"),
        (set_entry("length", "999999999"), "truncated"),
        (set_entry("offset", "nought"), "no valid offset and length"),
    ],
)
def test_hostile_external_data(
    external: tuple[ExportedModel, LoadedModel], change: Callable[[onnx.TensorProto], None], expected: str
) -> None:
    path = external[0].path
    (path.parent.parent / "outside").write_bytes(bytes(10**6))
    (path.parent / "link").symlink_to(path.parent.parent / "outside")
    proto = onnx.load(path, load_external_data=False)
    change(next(t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match=expected):
        ExportedModel(path)


def in_cache(exported: ExportedModel, folder: Path) -> ExportedModel:
    """A file as the cache of Hugging Face keeps it: each file is a link to a blob, which has another name."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in (exported.path, *exported.external_files):
        shutil.copyfile(file, blobs / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(blobs / f"{file.name}.blob")
    return ExportedModel(snapshot / exported.path.name)


def test_a_folder_of_links_to_blobs(external: tuple[ExportedModel, LoadedModel], tmp_path: Path) -> None:
    exported, model = external
    cached = in_cache(exported, tmp_path)
    assert [file.name for file in cached.external_files] == ["m.onnx.data"]
    assert cached.size_bytes == exported.size_bytes
    report = verify(cached, model)
    assert report, report.findings
    made = package(cached, tmp_path / "repository")
    assert made.models == ("m",)
    assert (made.path / "m" / "1" / "m.onnx.data").is_file()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("fp32", VerifyOptions(backend="reference", samples=1)),
        ("fp32", VerifyOptions(samples=1, layers=True)),
        ("fp16", VerifyOptions(samples=1)),
    ],
    ids=["reference", "layers", "fp16"],
)
def test_links_to_blobs_are_followed(
    prebuilt: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, options: VerifyOptions
) -> None:
    monkeypatch.setattr(single_file, "EXTERNAL_ABOVE_BYTES", 1000)
    exported = export(prebuilt, tmp_path / "m.onnx", options=ExportOptions(dtype=dtype))
    cached = in_cache(exported, tmp_path)
    report = verify(cached, prebuilt, options=options)
    assert report, report.findings
    inputs = prebuilt.sample(np.random.default_rng(0), 0)
    assert analyze(cached, inputs, checkpoint=prebuilt, options=AnalysisOptions(samples=16)).rows


def test_missing_and_truncated_external_data(external: tuple[ExportedModel, LoadedModel]) -> None:
    path = external[0].path
    data = path.with_name("m.onnx.data")
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ModelFileError, match=r"m\.onnx\.data is truncated"):
        ExportedModel(path)
    data.unlink()
    with pytest.raises(ModelFileError, match=r"m\.onnx\.data is missing"):
        ExportedModel(path)


def test_external_data_shorter_than_its_tensor(external: tuple[ExportedModel, LoadedModel]) -> None:
    """The length that the file states does not fit its shape."""
    path = external[0].path
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    set_entry("length", "4")(tensor)
    tensor.dims[0] *= 10**6
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError):
        verify(ExportedModel(path), external[1])
