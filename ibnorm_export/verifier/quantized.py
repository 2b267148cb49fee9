"""A quantised file as arithmetic that can be judged: its own matrices in PyTorch, and its graph without rounded
activations.

A quantised file computes another model than the checkpoint, so its numbers are not the checkpoint's. But they are
those of the checkpoint with the file's matrices in it, to the bound of fp32, where the kernel leaves activations as
they are: that holds everything that is no matrix to account (masks, caches, batches, norms).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.graph.quantization import dequantize

__all__ = ["exact_file", "with_matrices_of"]

#: Of MatMulNBits: activations stay float32. Source: ONNX Runtime, "Contrib operators", MatMulNBits.
_FLOAT32: Final = 1


def exact_file(exported: ExportedModel, folder: Path) -> ExportedModel:
    """A copy in `folder` whose products take activations in float32, where the file may round them to int8."""
    model = ir.load(exported.path)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
    if exported.metadata.target is Target.ORT_GENAI:  # it runs as a folder
        for file in exported.path.parent.iterdir():
            if file.is_file() and not file.name.startswith(MODEL_FILE):
                shutil.copyfile(file, folder / file.name)
    ir.save(model, folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    return ExportedModel(folder / MODEL_FILE)


def _matrices(exported: ExportedModel, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Names of `model`'s weights that the file has quantised, and what it has for them, shaped as PyTorch's."""
    state = model.module.state_dict(keep_vars=True)
    for name in state:
        for stored, transposed in ((name, False), (f"{name}.T", True)):
            if (found := dequantize(exported, stored)) is not None:
                values = torch.from_numpy(found.copy())
                yield name, values.T if transposed else values
    for stored, names in exported.metadata.packed.items():
        known = all(name in state for name in names) and stored.endswith(".T")
        if known and (found := dequantize(exported, stored)) is not None:
            whole = torch.from_numpy(found.copy()).T
            sizes = [len(state[name]) for name in names]
            if sum(sizes) == len(whole):
                yield from zip(names, torch.split(whole, sizes), strict=True)


def with_matrices_of(exported: ExportedModel, model: LoadedModel) -> LoadedModel:
    """`model` with the matrices of a quantised file in the place of its own; `model` itself stays as it is.

    A matrix that is the embedding too stays in the embedding as it was: the file has it there unquantised.
    """
    shared = {id(tensor): tensor for tensor in (*model.module.parameters(), *model.module.buffers())}
    module = copy.deepcopy(model.module, shared)  # what is not replaced is there once
    same: dict[int, list[str]] = {}
    for name, parameter in module.state_dict(keep_vars=True).items():
        same.setdefault(id(parameter), []).append(name)
    groups = {name: names for names in same.values() for name in names}
    for name, values in _matrices(exported, model):
        for alias in groups[name]:
            path, _, own = alias.rpartition(".")
            owner = module.get_submodule(path)
            if not isinstance(owner, nn.Embedding):
                setattr(owner, own, nn.Parameter(values.contiguous(), requires_grad=False))
    return replace(model, module=module)
