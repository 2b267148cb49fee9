"""The error after every norm and block: the first place that exceeds its tolerance is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.html import write_report
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.shared_exports import SharedExports

LAYERS = VerifyOptions(static=False, layers=True)


@pytest.fixture(scope="module")
def plain_llama(exports: SharedExports) -> ExportedModel:
    """Residual additions are separate nodes."""
    return exports("llama", fuse_skip=False)


@pytest.mark.parametrize(
    ("file", "source"),
    [("exported_llama", "llama_checkpoint"), ("exported_vit", "vit_checkpoint"), ("plain_llama", "llama_checkpoint")],
)
def test_every_norm_and_block_is_compared(request: pytest.FixtureRequest, file: str, source: str) -> None:
    model = models.load(request.getfixturevalue(source))
    report = verify(request.getfixturevalue(file), model, options=LAYERS)
    assert report, report.findings
    assert report.numeric is not None
    layers = report.numeric.layers
    assert layers is not None
    assert layers.notes == ()
    assert {x.module for x in layers.layers if x.kind == "norm"} == set(model.norms)
    found = [x.module for x in layers.layers if x.kind == "block"]
    assert [name.rpartition(".")[2] for name in found] == ["0", "1"]
    order = [x.module for x in layers.layers]
    assert order.index(found[0]) < order.index(next(m for m in order if m.startswith(f"{found[1]}.")))
    assert all(0 < v.error < 1e-6 for x in layers.layers for v in x.variants)
    assert layers.first_failure == ""


def plant_lambda(exported: ExportedModel, folder: Path, index: int) -> tuple[ExportedModel, str]:
    proto = onnx.load(exported.path)
    node = [n for n in proto.graph.node if n.domain == DOMAIN][index]
    next(a for a in node.attribute if a.name == "lambd").f *= 1.01
    onnx.save(proto, folder / "bad.onnx")
    return ExportedModel(folder / "bad.onnx"), node.name


@pytest.mark.parametrize("index", [0, 2, 4])
def test_the_first_layer_that_exceeds_its_tolerance_is_named(
    exported_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path, index: int
) -> None:
    bad, name = plant_lambda(exported_llama, tmp_path, index)
    report = verify(bad, models.load(llama_checkpoint), options=LAYERS)
    assert not report
    assert report.numeric is not None
    assert report.numeric.layers is not None
    first = report.numeric.layers.first_failed_layer
    assert first is not None
    assert (first.module, first.node) == (name, name)
    assert any(f.where == "layer" and f"norm {name} (node {name})" in f.what for f in report.findings)
    assert report.numeric.attribution is not None
    assert report.numeric.attribution.source == "exporter"
    assert [v.name for v in report.numeric.attribution.levels] == ["none", "basic", "extended", "all"]


def test_a_weight_after_the_norms_is_named_by_its_block(
    exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path
) -> None:
    proto = onnx.load(exported_vit.path)
    tensor = next(t for t in proto.graph.initializer if t.name.startswith("vit.layers.0.mlp") and t.name.endswith("T"))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[np.abs(array).argmax()] *= -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    report = verify(ExportedModel(tmp_path / "bad.onnx"), models.load(vit_checkpoint), options=LAYERS)
    assert report.numeric is not None
    assert report.numeric.layers is not None
    assert report.numeric.layers.first_failure.startswith("block vit.layers.0 (node ")
    assert "after norm vit.layers.0.layernorm_after" in report.numeric.layers.first_failure


def test_a_cached_step_is_compared_layer_by_layer(
    llama_checkpoint: Path, exports: SharedExports, tmp_path: Path
) -> None:
    def load() -> LoadedModel:
        return models.load(llama_checkpoint, None, task="text-generation")

    exported = exports("llama", "text-generation")
    rng = np.random.default_rng(0)
    drawn = [load().sample(rng, index) for index in range(8)]
    steps = [s for s in drawn if s["attention_mask"].shape[1] > s["input_ids"].shape[1]]
    assert steps, "no sample has a past"
    assert verify(exported, load(), options=LAYERS, inputs=steps[:1])
    bad, name = plant_lambda(exported, tmp_path, 3)
    report = verify(bad, load(), options=LAYERS, inputs=steps[:1])
    assert any(f.where == "layer" and name in f.what for f in report.findings)


def test_the_page_shows_attribution_and_errors_by_depth(
    exported_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path
) -> None:
    bad, name = plant_lambda(exported_llama, tmp_path, 2)
    report = verify(bad, models.load(llama_checkpoint), options=LAYERS)
    text = write_report(report, tmp_path / "r.html", about={"processor": "x"}).read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    for words in (
        "Error by depth",
        "What to do",
        "exporter is responsible",
        f"norm {name} (node {name})",
    ):
        assert words in text
    assert "optimiser level extended" in text
