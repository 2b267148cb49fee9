"""A copy of an exported file with a fault in it."""

from __future__ import annotations

from pathlib import Path

import onnx

from ibnorm_export.artifacts.exported_model import ExportedModel
from tests.support.planting import Change


def plant(exported: ExportedModel, folder: Path, change: Change) -> ExportedModel:
    """Write a copy of the file with the change to `folder`."""
    proto = onnx.load(exported.path)
    before = proto.SerializeToString()
    change(proto)
    assert proto.SerializeToString() != before, "the change has no effect"
    onnx.save(proto, folder / "planted.onnx")
    return ExportedModel(folder / "planted.onnx")
