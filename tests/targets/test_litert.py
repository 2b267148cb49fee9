"""LiteRT's format: the written file, read again, computes what PyTorch does in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibnorm_export import BackendUnavailable, DType, ExportedModel, ExportError, ExportOptions, export, load
from ibnorm_export.exporter.litert import LITERT

#: Relative error in fp32: roundings of 2**-24 in sums of up to 64 terms, through two layers that amplify them little,
#: and 1.5e-7 of the formula for erf.
FP32 = 2e-6

#: With weights in fp16: each is rounded by up to 2**-11, which two layers amplify little.
FP16 = 2e-3

needs_converter = pytest.mark.skipif(
    shutil.which("onnx2tf") is None,
    reason="onnx2tf is not on PATH; it brings TensorFlow, so `make test-targets` leaves it out: pipx install onnx2tf",
)


@needs_converter
@pytest.mark.parametrize(("dtype", "least", "most"), [("fp32", 0.0, FP32), ("fp16", FP32, FP16)])
@pytest.mark.parametrize("family", ["vit", "llama"])
def test_the_numbers(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, *, dtype: str, least: float, most: float
) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    model = load(request.getfixturevalue(f"{family}_checkpoint"))
    written = export(model, tmp_path / "mobile", target="litert", options=ExportOptions(dtype))
    assert {path.name for path in (tmp_path / "mobile").iterdir()} == {"model.onnx", "model.tflite"}
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for tensor in written.inputs:
        assert all(isinstance(axis, int) for axis in tensor.shape)
        arrays[tensor.name] = (
            rng.integers(1, 200, tensor.shape) if tensor.dtype == "int64" else rng.standard_normal(tensor.shape)
        )
    if "attention_mask" in arrays:
        arrays["attention_mask"][:] = 1
    plain = interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    opened = interpreter.Interpreter(
        str(tmp_path / "mobile" / "model.tflite"), experimental_op_resolver_type=plain
    ).get_signature_runner()
    feeds = {name: array.astype(np.float32 if array.dtype == float else np.int64) for name, array in arrays.items()}
    with torch.no_grad():
        truth = model.truth()(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()
    found = opened(**feeds)["logits"]
    assert least <= np.linalg.norm(found - truth) / np.linalg.norm(truth) <= most


def test_without_the_converter(exported_vit: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"needs the command onnx2tf, .*\(pipx install onnx2tf\)"):
        LITERT.convert(exported_vit, tmp_path, DType.FP32)


def test_what_the_converter_reports(
    exported_vit: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    command = tmp_path / "onnx2tf"
    command.write_text("#!/bin/sh\necho one\necho 'ERROR: no such operator' >&2\nexit 1\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ExportError, match="onnx2tf cannot convert the model: ERROR: no such operator"):
        LITERT.convert(exported_vit, tmp_path, DType.FP32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("bf16"), "--target litert takes weights in fp32 or fp16"),
        (ExportOptions(runtime="web"), "the runtime is web, but the target litert: leave one of them out"),
        (ExportOptions(opset=20), r"opset is 20; it must be at most 18, or left out \(--for litert: "),
    ],
)
def test_options_that_litert_does_not_take(
    vit_checkpoint: Path, tmp_path: Path, options: ExportOptions, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(load(vit_checkpoint), tmp_path / "mobile", target="litert", options=options)
    assert list(tmp_path.iterdir()) == []
