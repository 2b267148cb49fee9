"""The blame split and the error behind every layer: the right link and the right place are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.runtimes import registry
from ibnorm_export.runtimes import runner as base
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier import numeric as numeric_check
from ibnorm_export.verifier.attribution import split
from ibnorm_export.verifier.html import write_report
from ibnorm_export.verifier.report import Level, OutputParity, ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, verify

LAYERS = VerifyOptions(static=False, layers=True)


def parity(norms: str, error: float, torch_error: float = 1e-7) -> OutputParity:
    allowed = 3 * torch_error + 1e-6
    return OutputParity(
        "logits",
        norms,
        max_abs=error,
        error=error,
        torch_error=torch_error,
        worst_sample=0,
        worst_sample_error=error,
        allowed=allowed,
        ratio=error / torch_error,
        cosine=1.0,
        top1_agreement=None,
        elements=4,
        passed=bool(error <= allowed),
    )


def level(name: str, error: float) -> Level:
    return Level(name, error, 1.3e-6, error <= 1.3e-6)


GOOD, BAD = 2e-7, 1e-3


@pytest.mark.parametrize(
    ("functions", "fused", "levels", "guilty", "says"),
    [
        (GOOD, GOOD, (), "", "no link adds error"),
        (BAD, BAD, (BAD, BAD), "exporter", "exporter is to blame"),
        (BAD, GOOD, (BAD, BAD), "exporter", "exporter is to blame"),
        (BAD, BAD, (GOOD, BAD), "optimiser", "level basic 1.00e-03"),
        (GOOD, BAD, (), "kernel", "kernel is to blame"),
        (float("nan"), GOOD, (BAD, float("nan")), "exporter", "exporter"),
    ],
)
def test_the_link_between_a_good_corner_and_a_bad_one_is_to_blame(
    functions: float, fused: float, levels: tuple[float, ...], guilty: str, says: str
) -> None:
    compared = [level(name, error) for name, error in zip(("none", "basic"), levels, strict=False)]
    blame = split([parity("fused", fused), parity("as functions", functions)], "fp32", levels=compared)
    assert blame is not None
    assert blame.guilty == guilty
    assert says in blame.words


def test_an_overflow_of_pytorch_itself_is_the_dtypes() -> None:
    blame = split([parity("as functions", float("nan"), float("inf"))], "fp16")
    assert blame is not None
    assert blame.guilty == "dtype"
    assert split([], "fp32") is None


@pytest.fixture(scope="module")
def skip_llama(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("skip")
    return export(models.load(llama_checkpoint), folder / "m.onnx", options=ExportOptions(fuse_skip=True))


@pytest.mark.parametrize(
    ("file", "source"),
    [("exported_llama", "llama_checkpoint"), ("exported_vit", "vit_checkpoint"), ("skip_llama", "llama_checkpoint")],
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
    assert all(0 < c.error < 1e-6 for x in layers.layers for c in x.corners)
    assert layers.first == ""


def planted_lambda(exported: ExportedModel, folder: Path, index: int) -> tuple[ExportedModel, str]:
    proto = onnx.load(exported.path)
    node = [n for n in proto.graph.node if n.domain == DOMAIN][index]
    next(a for a in node.attribute if a.name == "lambd").f *= 1.01
    onnx.save(proto, folder / "bad.onnx")
    return ExportedModel(folder / "bad.onnx"), node.name


@pytest.mark.parametrize("index", [0, 2, 4])
def test_the_first_layer_that_leaves_its_bound_is_named(
    exported_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path, index: int
) -> None:
    bad, name = planted_lambda(exported_llama, tmp_path, index)
    report = verify(bad, models.load(llama_checkpoint), options=LAYERS)
    assert not report
    assert report.numeric is not None
    assert report.numeric.layers is not None
    first = report.numeric.layers.first_layer
    assert first is not None
    assert (first.module, first.node) == (name, name)
    assert any(f.where == "layer" and f"norm {name} (node {name})" in f.what for f in report.findings)
    assert report.numeric.blame is not None
    assert report.numeric.blame.guilty == "exporter"
    assert [v.name for v in report.numeric.blame.levels] == ["none", "basic", "extended", "all"]


def test_a_weight_behind_the_norms_is_named_by_its_block(
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
    assert report.numeric.layers.first.startswith("block vit.layers.0 (node ")
    assert "behind norm vit.layers.0.layernorm_after" in report.numeric.layers.first


def test_a_cached_step_is_compared_layer_by_layer(llama_checkpoint: Path, tmp_path: Path) -> None:
    def load() -> LoadedModel:
        return models.load(llama_checkpoint, None, task="text-generation")

    exported = export(load(), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    drawn = [load().sample(rng, index) for index in range(8)]
    steps = [s for s in drawn if s["attention_mask"].shape[1] > s["input_ids"].shape[1]]
    assert steps, "no sample has a past"
    assert verify(exported, load(), options=LAYERS, inputs=steps[:1])
    bad, name = planted_lambda(exported, tmp_path, 3)
    report = verify(bad, load(), options=LAYERS, inputs=steps[:1])
    assert any(f.where == "layer" and name in f.what for f in report.findings)


def test_a_wrong_kernel_is_told_from_a_wrong_file(
    exported_vit: ExportedModel, vit_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever runs as the fused corner is off by one part in a thousand; the functions are right."""

    class Wrong:
        name = "ort-cpu"

        def __init__(self, runner: base.Runner) -> None:
            self._runner = runner

        def run(self, inputs: Arrays) -> Arrays:
            return {name: array * np.float32(1.001) for name, array in self._runner.run(inputs).items()}

    def opened(backend: str, file: ExportedModel, kernels: Kernels = Kernels.AUTO, **more: Any) -> base.Runner:
        runner = registry.open_runner(backend, file, kernels=Kernels.FUNCTION, **more)
        return Wrong(runner) if kernels is Kernels.FUSED else runner

    monkeypatch.setattr(numeric_check, "open_runner", opened)
    monkeypatch.setattr(numeric_check, "fused_library", lambda backend, kernels: Path("kernels.so"))
    monkeypatch.setattr(numeric_check, "_executions", lambda file, runtime, inputs: ())
    report = verify(exported_vit, models.load(vit_checkpoint), options=VerifyOptions(static=False))
    assert any(f.where == "link kernel" for f in report.findings), report.findings


def page(report: ParityReport, path: Path) -> str:
    return write_report(report, path, about={"processor": "x"}).read_text(encoding="utf-8")


def test_the_page_shows_blame_curve_and_heat_map(
    exported_llama: ExportedModel, llama_checkpoint: Path, tmp_path: Path
) -> None:
    bad, name = planted_lambda(exported_llama, tmp_path, 2)
    report = verify(bad, models.load(llama_checkpoint), options=LAYERS)
    text = page(report, tmp_path / "r.html")
    assert text.count("<svg") == 3
    for words in ("Error by depth", "Error by layer and corner", "exporter is to blame", f"norm {name} (node {name})"):
        assert words in text
    assert "optimiser level extended" in text
