"""The difference between a stranger's model and the folder that was imported from its checkpoint, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ibnorm_export import load


def imported_logits(folder: Path, inputs: Tensor) -> Tensor:
    """The logits of an imported folder, computed in float64."""
    loaded = load(folder)
    module = copy.deepcopy(loaded.module).double()
    if loaded.exact is not None:
        loaded.exact(module)
    tensors = (inputs, torch.ones_like(inputs)) if loaded.inputs[0].name == "input_ids" else (inputs.double(),)
    with torch.no_grad():
        (got,) = loaded.call(module, *tensors)
    return got


def largest_difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two float64 tensors of one shape, relative to the largest wanted value."""
    assert got.dtype == wanted.dtype == torch.float64
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def difference(stranger: nn.Module, folder: Path, inputs: Tensor) -> float:
    """The largest difference of the logits, relative to the largest logit; both models compute in float64."""
    with torch.no_grad():
        wanted = copy.deepcopy(stranger).double()(inputs.double() if inputs.is_floating_point() else inputs)
    return largest_difference(imported_logits(folder, inputs), wanted)
