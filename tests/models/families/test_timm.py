"""Folders that timm wrote, through export and verification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from ibnorm_export import NormConfig, models, replace_norms
from ibnorm_export.errors import CheckpointError
from ibnorm_export.exporter.export import export
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.architectures import EPSILON, LAMBDA, TheirNorm

timm = pytest.importorskip("timm", reason="timm is not installed (make test-families installs it)")

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


def section(**more: Any) -> dict[str, Any]:
    return {"compression": "T", "lambda": 3.0, "epsilon": 1e-5, "convention": "divide", **more}


def saved(folder: Path, architecture: str, norms: dict[str, Any], safe: bool = True, **arguments: Any) -> Path:
    model = timm.create_model(architecture, **arguments)
    replace_norms(model, NormConfig.from_config(norms))
    timm.models.save_for_hf(model, folder, model_config={"ibnorm": norms}, safe_serialization=safe)
    return folder


@pytest.mark.parametrize("safe", [True, False])
def test_a_vit_of_timm(tmp_path: Path, safe: bool) -> None:
    model = models.load(saved(tmp_path / "vit", "vit_tiny_patch16_224", section(), safe, **VIT))
    assert list(model.norms) == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    report = verify(export(model, tmp_path / "m.onnx"), model, options=VerifyOptions(layers=True))
    assert report, report.findings
    assert report.numeric is not None
    assert report.numeric.layers is not None
    assert [x.module for x in report.numeric.layers.layers if x.kind == "block"] == ["blocks.0", "blocks.1"]
    assert report.numeric.layers.notes == ()


@pytest.mark.parametrize(
    "norms",
    [
        section(),
        section(compression="L", grouping="axes", axis=1),
        section(compression="S", layers=[{"match": "layer[34].*", "norm": "batchnorm"}]),
    ],
)
def test_a_resnet_of_timm(tmp_path: Path, norms: dict[str, Any]) -> None:
    folder = saved(tmp_path / "resnet", "resnet10t", norms, num_classes=10)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"]["input_size"] = [3, 32, 32]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = models.load(folder)
    report = verify(export(model, tmp_path / "m.onnx"), model)
    assert report, report.findings


class _Touch:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_a_pickle_that_the_config_names_is_not_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path / "vit", "vit_tiny_patch16_224", section(), **VIT)
    pickled = tmp_path / "weights.bin"
    torch.save({"state_dict": _Touch(tmp_path / "loaded")}, pickled)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_args"] = {**VIT, "checkpoint_path": str(pickled)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="model_args has checkpoint_path"):
        models.load(folder)
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("architecture", "vit_of_nobody", "no architecture 'vit_of_nobody'"),
        ("architecture", ["resnet18"], r"no architecture \['resnet18'\]"),
        ("model_args", {"heads": 3}, "heads"),
        ("model_args", ["depth"], r"model_args is \['depth'\]; it must be a JSON object"),
        ("model_args", {**VIT, "embed_dim": 64}, "wrong shape"),
        ("model_args", {**VIT, "img_size": [8]}, "IndexError"),
        (
            "model_args",
            {**VIT, "patch_size": 0},
            "cannot build vit_tiny_patch16_224 from model_args: ZeroDivisionError",
        ),
        ("model_args", {**VIT, "norm_layer": "zz"}, "KeyError: 'zz'"),
        ("model_args", {**VIT, "pretrained": True}, "model_args has pretrained, which no model accepts"),
        ("pretrained_cfg", {}, "input_size is None"),
        ("pretrained_cfg", "small", "pretrained_cfg is 'small'; it must be a JSON object"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, key: str, value: object, expected: str) -> None:
    folder = saved(tmp_path / "vit", "vit_tiny_patch16_224", section(), **VIT)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=expected):
        models.load(folder)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
        ("deit_tiny_distilled_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("seresnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    ],
)
def test_against_a_strangers_norms(architecture: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """The exported file, in plain onnxruntime, against timm's own module with the stranger's class in it."""
    kind = "SLT"[len(architecture) % 3]
    sized = {} if architecture.startswith(("convnext", "seresnet")) else {"img_size": 32}
    torch.manual_seed(0)
    theirs = timm.create_model(architecture, num_classes=5, **arguments, **sized)
    for path, norm in list(theirs.named_modules()):
        if isinstance(norm, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
            first = isinstance(norm, torch.nn.BatchNorm2d) or type(norm).__name__ == "LayerNorm2d"
            own = TheirNorm(kind, len(norm.weight), bias=True, offset=0.0, channels_first=first)
            theirs.set_submodule(path, own)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    norms = {"compression": kind, "lambda": LAMBDA, "epsilon": EPSILON, "convention": "divide"}
    settings = {"ibnorm": norms, "model_args": {**arguments, **sized}}
    timm.models.save_for_hf(theirs, tmp_path / "c", model_config=settings, safe_serialization=True)
    config = json.loads((tmp_path / "c/config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"]["input_size"] = [3, 32, 32]
    (tmp_path / "c/config.json").write_text(json.dumps(config), encoding="utf-8")

    model = models.load(tmp_path / "c")
    exported = export(model, tmp_path / "m.onnx")
    report = verify(exported, model)
    assert report, report.findings
    pixels = torch.randn(3, 3, 32, 32)
    session = ort.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        truth = theirs.double().eval()(pixels.double()).numpy()
    assert np.linalg.norm(logits - truth) <= 2e-6 * np.linalg.norm(truth)


def test_a_norm_with_an_activation_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050")
    timm.models.save_for_hf(model, tmp_path / "c", model_config={"ibnorm": section()}, safe_serialization=True)
    with pytest.raises(CheckpointError, match=r"bn1 \(BatchNormAct2d\) also applies an activation"):
        models.load(tmp_path / "c")
