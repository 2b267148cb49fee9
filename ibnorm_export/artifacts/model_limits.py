"""What a model takes: the ids of each input, and the longest sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays

__all__ = ["ModelLimits", "find_limits"]


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model takes.

    Args:
        vocabulary: number of ids by name of the input; an input that is not named has the ids 0 and 1.
        longest: the longest sequence, in tokens; 0 if it is unknown.
    """

    vocabulary: Mapping[str, int]
    longest: int


class _Embeddings:
    """Records which embedding each integer input goes to, and how many positions the others have."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._names = {t.untyped_storage().data_ptr(): name for name, t in inputs.items() if t.numel()}
        self.vocabulary: dict[str, int] = {}
        self.positions: list[int] = []

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        ids = args[0] if args else None
        if not isinstance(module, nn.Embedding) or not isinstance(ids, Tensor):
            return
        name = self._names.get(ids.untyped_storage().data_ptr())
        if name is None:
            self.positions.append(module.num_embeddings)
        else:
            self.vocabulary[name] = min(module.num_embeddings, self.vocabulary.get(name, module.num_embeddings))


def find_limits(model: LoadedModel, *, inputs: Arrays) -> ModelLimits:
    """Find the vocabulary and the longest sequence of a model, if necessary by running it once.

    Args:
        model: the model.
        inputs: one input.
    """
    if all(spec.floating for spec in model.inputs):
        return ModelLimits({}, 0)
    if model.vocabulary and model.max_positions:
        return ModelLimits({"input_ids": model.vocabulary}, model.max_positions)
    module = model.module
    tensors = {spec.name: torch.from_numpy(inputs[spec.name].copy()) for spec in model.inputs}
    watch = _Embeddings({spec.name: tensors[spec.name] for spec in model.inputs if not spec.floating})
    hooks = [m.register_forward_pre_hook(watch) for m in module.modules() if isinstance(m, nn.Embedding)]
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    entry = model.entry(module)
    try:
        with torch.no_grad():
            entry(*(t.to(dtype) if t.is_floating_point() else t for t in tensors.values()))
    finally:
        for hook in hooks:
            hook.remove()
    vocabulary = dict(watch.vocabulary)
    if "position_ids" in vocabulary:
        watch.positions.append(vocabulary.pop("position_ids"))
    if model.vocabulary and "input_ids" in tensors:
        vocabulary["input_ids"] = model.vocabulary
    return ModelLimits(vocabulary, model.max_positions or min(watch.positions, default=0))
