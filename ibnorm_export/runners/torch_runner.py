"""PyTorch itself as a runner, eager or compiled."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.loaded import Arrays, LoadedModel

__all__ = ["TorchRunner"]


class TorchRunner:
    """Runs a module of `model` in the dtype of its parameters.

    Args:
        model: says what the inputs and outputs are.
        module: to run; None for the model's own.
        compiled: through torch.compile, dynamic shapes off: each shape is compiled once.
    """

    def __init__(self, model: LoadedModel, module: nn.Module | None = None, compiled: bool = False) -> None:
        module = model.module if module is None else module
        self.name = "torch.compile" if compiled else "torch"
        self._model = model
        self._dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        entry = model.entry(module)
        self._entry = torch.compile(entry, dynamic=False) if compiled else entry

    def run(self, inputs: Arrays) -> Arrays:
        tensors = []
        for spec in self._model.inputs:
            tensor = torch.from_numpy(np.ascontiguousarray(inputs[spec.name]))
            tensors.append(tensor.to(self._dtype) if spec.floating else tensor)
        try:
            with torch.inference_mode():
                outputs = self._entry(*tensors)
        except torch._inductor.exc.InductorError as error:
            raise BackendUnavailable(f"torch.compile cannot build code here: {str(error).splitlines()[0]}") from error
        return {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            for name, tensor in zip(self._model.outputs, outputs, strict=True)
        }
