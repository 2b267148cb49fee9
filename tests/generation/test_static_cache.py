"""A cache that is kept in place: what is in the graph, that it decodes as PyTorch does, what it rejects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ExportError, ModelFileError
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.sessions import Session, open_sessions
from ibnorm_export.generation.text_model import open_folder
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.accuracy import assert_rows_close

STATIC = ExportOptions(cache="static")
FUNCTION = VerifyOptions(kernels=Kernels.FUNCTION)


def load(checkpoint: Path) -> LoadedModel:
    return models.load(checkpoint, task="text-generation")


@pytest.fixture(scope="module")
def checkpoint(language_checkpoint: Path) -> Path:
    return language_checkpoint


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return export_folder(load(checkpoint), tmp_path_factory.mktemp("static") / "out", options=STATIC)


def started(exported: ExportedModel, length: int = 40) -> Session:
    return open_sessions(exported.path.parent, Kernels.FUNCTION).start(1, length)


def test_the_cache_is_written_and_not_copied(exported: ExportedModel) -> None:
    assert (exported.opset, exported.metadata.cache) == (24, "static")
    assert (exported.operators["TensorScatter"], exported.operators["RotaryEmbedding"]) == (4, 4)
    caches = [t for t in (*exported.inputs, *exported.outputs) if t.name.endswith((".key", ".value"))]
    assert {t.shape for t in caches} == {("batch_size", 2, "capacity", 8)}
    past = {t.name for t in exported.inputs if t.name.startswith("past")}
    users = {node.op_type for node in exported.proto.graph.node for name in node.input if name in past}
    assert users <= {"TensorScatter", "Shape"}
    for node in exported.proto.graph.node:
        if node.op_type == "Attention":
            assert node.input[1].startswith("present."), "grouped heads are not repeated by copying"
            assert node.input[6] == "cache/totals"


def test_decoding_is_verified(exported: ExportedModel, checkpoint: Path) -> None:
    report = verify(exported, load(checkpoint), options=FUNCTION)
    assert report, report.findings
    assert report.numeric is not None
    names = [o.name for o in report.numeric.outputs]
    assert {"decoding (32 calls)", "cache in place (33 calls)"} <= set(names)


def test_half_precision_is_verified_with_a_rounding_copy(checkpoint: Path, tmp_path: Path) -> None:
    exported = export_folder(load(checkpoint), tmp_path / "half", options=ExportOptions(DType.FP16, cache="static"))
    report = verify(exported, load(checkpoint), options=FUNCTION)
    assert report, report.findings


def _late(proto: onnx.ModelProto) -> None:
    """The cache is written one token too far along."""
    for node in proto.graph.node:
        if node.op_type == "TensorScatter":
            node.input[2] = "cache/late"
    one = onnx.numpy_helper.from_array(np.array([1]), "cache/one")
    proto.graph.initializer.append(one)
    place = next(i for i, n in enumerate(proto.graph.node) if "cache/starts" in n.output)
    proto.graph.node.insert(place + 1, onnx.helper.make_node("Add", ["cache/starts", "cache/one"], ["cache/late"]))


def _swapped(proto: onnx.ModelProto) -> None:
    """Presents of the two layers are swapped: every single call has correct logits."""
    names = {"present.0.key": "present.1.key", "present.1.key": "present.0.key"}
    for node in proto.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]


@pytest.mark.parametrize("fault", [_late, _swapped])
def test_a_cache_in_the_wrong_place_is_found(
    exported: ExportedModel, checkpoint: Path, tmp_path: Path, fault: Any
) -> None:
    proto = onnx.load(exported.path)
    fault(proto)
    onnx.save(proto, tmp_path / "model.onnx")
    report = verify(ExportedModel(tmp_path), load(checkpoint), options=FUNCTION)
    assert not report
    assert {"decoding", "cache in place"} <= {f.where for f in report.findings}


def test_one_buffer_is_input_and_output(exported: ExportedModel) -> None:
    tokens = np.arange(12)[None] * 5 + 70
    one, many = started(exported), started(exported)
    whole = one.feed(tokens)
    steps = [many.feed(tokens[:, :4]), *(many.feed(tokens[:, i : i + 1]) for i in range(4, 12))]
    assert_rows_close(steps[-1], whole)
    many.rewind(6)
    np.testing.assert_array_equal(many.feed(tokens[:, 6:7]), steps[3])
    assert np.abs(steps[3] - steps[2]).max() > 1e-3


def test_values_after_the_last_token_are_ignored(exported: ExportedModel) -> None:
    """Results are bit-identical, whatever a longer text left in the buffer."""
    tokens = np.arange(20)[None] * 3 + 50
    fresh, used = started(exported), started(exported)
    used.feed(tokens)
    used.rewind(0)
    np.testing.assert_array_equal(fresh.feed(tokens[:, ::-1][:, :7]), used.feed(tokens[:, ::-1][:, :7]))


def test_it_generates_the_text_of_a_dynamic_cache(exported: ExportedModel, portable_folder: Path) -> None:
    sampling = Sampling(30, 1.2, top_p=0.9, seed=3)
    folders = (exported.path.parent, portable_folder)
    texts = [open_folder(folder, Kernels.FUNCTION).generate("ab", sampling).tokens for folder in folders]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 30


def test_what_does_not_fit_is_rejected(exported: ExportedModel, checkpoint: Path, tmp_path: Path) -> None:
    session = started(exported, 8)
    session.feed(np.ones((1, 6), dtype=np.int64))
    with pytest.raises(ModelFileError, match="for 1 text of at most 8 tokens"):
        session.feed(np.ones((1, 3), dtype=np.int64))
    with pytest.raises(ModelFileError, match="for 1 text"):
        session.feed(np.ones((2, 1), dtype=np.int64))
    runner = open_runner("ort-cpu", exported, kernels=Kernels.FUNCTION)
    inputs = {
        "input_ids": np.ones((1, 1), dtype=np.int64),
        "attention_mask": np.ones((1, 5), dtype=np.int64),
        "position_ids": np.full((1, 1), 4),
        **{t.name: np.zeros((1, 3, 4, 8), dtype=np.float32) for t in exported.inputs if t.name.startswith("past")},
    }
    with pytest.raises(ModelFileError, match="ONNX Runtime cannot run the model"):
        runner.run(inputs)
    with pytest.raises(ExportError, match="opset is 23; it must be 24 to 26"):
        export_folder(load(checkpoint), tmp_path / "a", options=ExportOptions(opset=23, cache="static"))
    with pytest.raises(ExportError, match="cache is 'paged'; it must be one of dynamic, static"):
        export_folder(load(checkpoint), tmp_path / "a", options=ExportOptions(cache="paged"))
    with pytest.raises(ExportError, match="does not take --opset, --inline, --cache"):
        export_genai(load(checkpoint), tmp_path / "a", options=STATIC)
