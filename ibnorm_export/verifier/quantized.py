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

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.graph.quantization import dequantize
from ibnorm_export.verifier.comparison import Comparison, write_copy
from ibnorm_export.verifier.norms import find_unfused, observe_norms
from ibnorm_export.verifier.numeric import check_numbers, locate
from ibnorm_export.verifier.quality import check_quality, sample_text
from ibnorm_export.verifier.report import Finding, NumericReport

__all__ = ["check_quantized"]

#: Accuracy level of MatMulNBits that leaves activations in float32.
#: Source: ONNX Runtime, "Contrib operators", MatMulNBits.
_FLOAT32: Final = 1


def check_quantized(comparison: Comparison, *, tokens: NDArray[np.int64] | None) -> NumericReport:
    """Compare the predictions of a quantised file, and, on the CPU, its numbers.

    Args:
        comparison: the file as it is, and its reference.
        tokens: a text (n,) to predict; None samples one from the model.
    """
    stored = comparison.file.metadata.quantization
    assert stored is not None
    kind = f"int{stored.bits}"
    notes = []
    if tokens is None:
        tokens = sample_text(comparison.reference.model)
        notes.append("predictions are of text that PyTorch samples from the model; use --text to give your own")
    quality = check_quality(comparison, tokens, kind=kind)
    comparison.variants.close()
    norms = observe_norms(comparison)
    numbers = _check_own_numbers(comparison)
    if comparison.options.backend != "ort-cpu":
        notes.append(
            f"backend {comparison.options.backend} compares only predictions; ort-cpu compares the numbers of a "
            "quantised file too"
        )
    findings = (
        *(Finding("quality", str(q)) for q in quality if not q.passed),
        *numbers.findings,
        *find_unfused(comparison, norms),
    )
    return replace(numbers, dtype=kind, findings=findings, notes=(*notes, *numbers.notes), norms=norms, quality=quality)


def _check_own_numbers(comparison: Comparison) -> NumericReport:
    """Compare a copy that does not round activations with PyTorch that has the file's own matrices."""
    predictions = "predictions of the file as it is, against PyTorch in fp32"
    given = comparison.reference
    if comparison.options.backend != "ort-cpu":
        return NumericReport(
            comparison.options.backend,
            given.dtype.value,
            method=predictions,
            samples=len(given.samples),
            outputs=(),
            findings=(),
        )
    with tempfile.TemporaryDirectory() as folder:
        model = _with_matrices_of(comparison.file, given.model)
        exact = replace(
            comparison,
            file=_copy_without_rounding(comparison.file, Path(folder)),
            reference=replace(given, model=model, dtype=DType.FP32),
        )
        report = check_numbers(exact)
        exact.variants.close()
        report = locate(report, exact)
    method = (
        f"{predictions}; numbers of a copy without rounding of activations, against PyTorch with the file's matrices"
    )
    return replace(report, method=method)


def _copy_without_rounding(exported: ExportedModel, folder: Path) -> ExportedModel:
    """A copy in `folder` whose products take activations in float32; the file may round them to int8."""
    model = ir.load(exported.path)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
    return write_copy(model, exported, folder=folder)


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
