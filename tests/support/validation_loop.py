"""A small image folder and a model of timm, and the validation loop that timm and torchvision write for them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

_CLASSES = 12
_IMAGES = 72
_SETTINGS = {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic"}


def picture(height: int, width: int, seed: int = 0) -> Any:
    """A picture of Pillow, smooth as photographs are."""
    image = importlib.import_module("PIL.Image")
    small = np.random.default_rng(seed).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    return image.fromarray(small).resize((width, height), image.Resampling.BICUBIC)


def make_validation(folder: Path) -> None:
    """Write `model/`, as timm saves it, and `val/`, a folder of images for each class."""
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    architecture = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=_CLASSES, **architecture).eval()
    section = {"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide"}
    config = {"ibnorm": section, "pretrained_cfg": _SETTINGS, "model_args": architecture}
    timm.models.save_for_hf(model, folder / "model", model_config=config, safe_serialization=True)
    saved = json.loads((folder / "model" / "config.json").read_text())
    saved |= {"num_classes": _CLASSES, "model_args": architecture, "pretrained_cfg": _SETTINGS}
    (folder / "model" / "config.json").write_text(json.dumps(saved))
    rng = np.random.default_rng(0)
    for index in range(_IMAGES):
        place = folder / "val" / f"class {index % _CLASSES:02}"
        place.mkdir(parents=True, exist_ok=True)
        picture(int(rng.integers(40, 90)), int(rng.integers(40, 90)), index).save(place / f"{index}.jpg")


def validation_loop(folder: Path) -> tuple[list[int], int, int]:
    """Every prediction, and how many are right as the first or among the first five."""
    from ibnorm_export import load

    timm, torchvision = importlib.import_module("timm"), importlib.import_module("torchvision")
    model = load(folder / "model")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=_SETTINGS), is_training=False)
    dataset = torchvision.datasets.ImageFolder(str(folder / "val"), transform)
    predictions: list[int] = []
    top1 = top5 = 0
    with torch.inference_mode():
        for images, labels in torch.utils.data.DataLoader(dataset, batch_size=16):
            logits = model.module(images)
            top1 += int((logits.argmax(-1) == labels).sum())
            top5 += int((logits.topk(5).indices == labels[:, None]).any(-1).sum())
            predictions += logits.argmax(-1).tolist()
    return predictions, top1, top5
