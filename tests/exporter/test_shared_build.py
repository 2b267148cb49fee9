"""One trace for several types of weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from ibnorm_export import ExportOptions, load
from ibnorm_export.exporter import single_file
from ibnorm_export.exporter.single_file import SharedBuild


def test_a_half_precision_file_does_not_cost_the_others_their_trace(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of a sweep: fp16 needs its own graph, and int8 and int4 the one of fp32 again."""
    traced: list[str] = []

    def fake_build(model: object, options: ExportOptions, **_: object) -> ir.Model:
        traced.append(options.dtype.value)
        empty = onnx.helper.make_graph([], "empty", [], [])
        return ir.serde.deserialize_model(onnx.helper.make_model(empty))

    monkeypatch.setattr(single_file, "build", fake_build)
    shared = SharedBuild(load(llama_checkpoint, task="text-generation"))
    for weights in ("fp32", "fp16", "int8", "int4"):
        shared.build(ExportOptions.with_weights(weights))
    assert traced == ["fp32", "fp16"]
