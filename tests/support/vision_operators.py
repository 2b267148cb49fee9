"""A pytest plugin that lets torchvision load with a build of torch that lacks its operators. timm uses none of them.

PYTHONPATH=build/vision:. pytest -p tests.support.vision_operators tests/models/families
"""

from __future__ import annotations

import importlib.util

import torch

if importlib.util.find_spec("torchvision") is not None:
    KEPT = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        KEPT.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
