"""OpenVINO's own format: read again by OpenVINO, it computes what PyTorch does in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibnorm_export import ExportedModel, ExportError, ExportOptions, export, load
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.exporter import number_check
from ibnorm_export.exporter.number_check import check_numbers

openvino = pytest.importorskip("openvino", reason="openvino is not installed (make test-targets)")

#: Relative error in fp32: roundings of 2**-24 in sums of up to 64 terms, through two layers that amplify them little.
FP32 = 2e-6
#: In fp16 the weights are rounded to 2**-11 of themselves; two layers add up about ten of these.
FP16 = 5e-3


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_image_model(vit_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    model = load(vit_checkpoint)
    written = export(model, tmp_path / "ir", target="openvino", options=ExportOptions(dtype))
    assert {path.name for path in (tmp_path / "ir").iterdir()} == {
        "model.onnx",
        "openvino_model.xml",
        "openvino_model.bin",
    }
    assert isinstance(written, ExportedModel)
    assert written.metadata.inlined
    pixels = np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    compiled = openvino.Core().compile_model(
        tmp_path / "ir" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    logits = compiled(pixels.astype(dtype.replace("fp", "float")))["logits"]
    with torch.no_grad():
        truth = model.truth()(pixel_values=torch.from_numpy(pixels)).logits.numpy()
    assert np.linalg.norm(logits - truth) <= (FP32 if dtype == "fp32" else FP16) * np.linalg.norm(truth)


def test_a_language_model_with_its_cache(llama_checkpoint: Path, tmp_path: Path) -> None:
    """`export` has compared all outputs; here the file is read again, and the folder is complete."""
    model = load(llama_checkpoint, task="text-generation")
    for _ in range(2):  # the second replaces the first
        export(model, tmp_path / "ir", target="openvino")
    names = {path.name for path in (tmp_path / "ir").iterdir()}
    assert names >= {"model.onnx", "openvino_model.xml", "openvino_model.bin", "config.json"}
    compiled = openvino.Core().compile_model(tmp_path / "ir" / "openvino_model.xml", "CPU")
    assert {port.any_name for port in compiled.inputs} == {spec.name for spec in model.inputs}
    assert {port.any_name for port in compiled.outputs} == set(model.outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("bf16"), "takes weights in fp32 or fp16"),
        (ExportOptions.with_weights("int4"), "takes weights in fp32 or fp16"),
        (ExportOptions(cache="static"), r"the cache is static; it must be dynamic \(--for openvino: .*TensorScatter"),
    ],
)
def test_options_that_openvino_does_not_take(
    llama_checkpoint: Path, tmp_path: Path, options: ExportOptions, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(load(llama_checkpoint, task="text-generation"), tmp_path / "ir", target="openvino", options=options)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def image_model(vit_checkpoint: Path) -> LoadedModel:
    return load(vit_checkpoint)


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-5, np.nan])
def test_other_numbers_are_refused(image_model: LoadedModel, factor: float) -> None:
    """A runtime whose outputs are PyTorch's in float64, times a factor."""
    truth = number_check.Float64TorchRunner(image_model, image_model.truth())
    samples = [image_model.sample(np.random.default_rng(0), 0)]

    def run(inputs: Any) -> Any:
        return {name: array * factor for name, array in truth.run(inputs).items()}

    def check() -> float:
        return check_numbers(image_model, run, dtype=ExportOptions().dtype, samples=samples, what="Something")

    if factor == 1.0:
        assert check() == 0.0
    else:
        with pytest.raises(ExportError, match=r"Something computes logits with a relative error of .* tolerance"):
            check()
