"""Stress inputs expose faults that ordinary inputs hide."""

from __future__ import annotations

from pathlib import Path

import onnx

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.exporter.export import export
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import RESNET
from tests.verifier.faults.planted import naive_log_body


def test_only_near_zero_images_expose_a_naive_logarithm(tmp_path: Path) -> None:
    models.save(models.new_model(RESNET, IBNormSpec("L")), tmp_path / "resnet")
    model = models.load(tmp_path / "resnet")
    right = export(model, tmp_path / "m.onnx")
    proto = onnx.load(right.path)
    naive_log_body(proto)
    onnx.save(proto, tmp_path / "bad.onnx")
    bad = ExportedModel(tmp_path / "bad.onnx")
    assert verify(bad, model, options=VerifyOptions(static=False)), "ordinary images hide it"
    report = verify(bad, model, options=VerifyOptions(static=False, stress=True))
    assert not report
    assert any("near-zero rows" in note for note in report.notes)
    assert verify(right, model, options=VerifyOptions(stress=True))
