"""Folders that timm wrote, through export and verification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ibnorm_export import NormConfig, models, replace_norms
from ibnorm_export.errors import CheckpointError
from ibnorm_export.exporter.export import export
from ibnorm_export.verifier.verify import VerifyOptions, verify

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
