"""A quantised file: compare its predictions with the checkpoint's, and its numbers with those of its own matrices.

A quantised file is a different model from the checkpoint, so its numbers differ. But if the kernel does not round
activations, they equal those of the checkpoint with the file's matrices, within the bound of fp32. This comparison
checks everything that is not a matrix: masks, caches, batches, norms.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.graph.quantization import dequantize
from ibnorm_export.verifier.attribution.error_source import attribute_error
from ibnorm_export.verifier.attribution.layers import locate
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.numeric.input_coverage import describe_coverage
from ibnorm_export.verifier.outputs.compare import compare, judge_dtype
from ibnorm_export.verifier.outputs.decoding import decode
from ibnorm_export.verifier.steps import NOTHING, Part, Step, run_steps

__all__ = ["compare_own_numbers"]

#: Accuracy level of MatMulNBits that leaves activations in float32.
#: Source: ONNX Runtime, "Contrib operators", MatMulNBits.
_FLOAT32: Final = 1


#: What is compared with PyTorch that has the file's own matrices.
_STEPS: Final[tuple[Step, ...]] = (compare, decode, judge_dtype, attribute_error, locate, describe_coverage)


def compare_own_numbers(comparison: Comparison, _found: Part = NOTHING) -> Part:
    """Compare a copy that does not round activations with PyTorch that has the file's own matrices.

    Only ONNX Runtime on the CPU runs such a copy; with other backends only predictions are compared.
    """
    predictions = "predictions of the file as it is, against PyTorch in fp32"
    if comparison.options.backend != "ort-cpu":
        note = (
            f"backend {comparison.options.backend} compares only predictions; ort-cpu compares the numbers of a "
            "quantised file too"
        )
        return Part(predictions, notes=(note,), not_run=comparison.prepared.left_out)
    comparison.variants.make_room()
    with tempfile.TemporaryDirectory() as folder:
        model = _with_matrices_of(comparison.file, comparison.reference.model)
        exact = replace(
            comparison,
            file=_copy_without_rounding(comparison.file, Path(folder)),
            reference=replace(comparison.reference, model=model, dtype=DType.FP32),
        )
        found = run_steps(exact, _STEPS)
    method = (
        f"{predictions}; numbers of a copy without rounding of activations, against PyTorch with the file's matrices"
    )
    return replace(found, method=method)


def _copy_without_rounding(exported: ExportedModel, folder: Path) -> ExportedModel:
    """A copy in `folder` whose products take activations in float32; the file may round them to int8."""
    import onnx_ir as ir

    from ibnorm_export.graph.stored_graph import read_graph
    from ibnorm_export.verifier.file_copies import write_copy

    model = read_graph(exported)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
    return write_copy(model, exported, file=folder / MODEL_FILE, refers=False)  # sessions of generation open it too


def _matrices(exported: ExportedModel, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Names of `model`'s weights that the file has quantised, and the file's values in PyTorch's shape."""
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


def _with_matrices_of(exported: ExportedModel, model: LoadedModel) -> LoadedModel:
    """A copy of `model` whose matrices are replaced by those of a quantised file.

    A matrix that is also the embedding stays unquantised in the embedding, as in the file.
    """
    shared = {id(tensor): tensor for tensor in (*model.module.parameters(), *model.module.buffers())}
    module = copy.deepcopy(model.module, shared)  # weights that are not replaced are shared, not copied
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
    return replace(model, module=module, original=None)
