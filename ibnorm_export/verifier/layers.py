"""The error behind every norm and block, in all four corners: where a file leaves the checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.runner import Runner
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.error_accumulator import ErrorSums
from ibnorm_export.verifier.layer_outputs import recorded, tapped_copy
from ibnorm_export.verifier.report import LayerParity, LayersReport
from ibnorm_export.verifier.tolerances import BOUNDS

__all__ = ["check_layers"]


def _defined(array: NDArray[Any], masks: Sequence[NDArray[np.bool_]]) -> NDArray[Any]:
    """Without the padded positions, where the array has an axis for them."""
    fitting = next((mask for mask in masks if array.shape[: mask.ndim] == mask.shape), None)
    return array if fitting is None else array[fitting]


def _say(layers: Sequence[LayerParity]) -> str:
    """The first layer that leaves its bound, and the last before it that keeps it; empty where none leaves."""
    before = "the inputs"
    for layer in layers:
        failed = next((corner for corner in layer.corners if not corner.passed), None)
        if failed is not None:
            return (
                f"{layer.kind} {layer.module} (node {layer.node}) is the first that leaves its bound, behind {before}: "
                f"relative error {failed.error:.3g} with norms {failed.norms}; PyTorch has {failed.torch_error:.3g}, "
                f"allowed is {failed.allowed:.3g}"
            )
        before = f"{layer.kind} {layer.module}"
    return ""


def check_layers(
    exported: ExportedModel,
    model: LoadedModel,
    *,
    truth: nn.Module,
    samples: Sequence[Arrays],
    prepare: Callable[[ExportedModel, Path], ExportedModel],
    runners: Callable[[ExportedModel], Mapping[str, Runner]],
    progress: Progress,
) -> LayersReport:
    """Run a tapped copy and the two PyTorch corners on every sample.

    Args:
        exported: the file.
        model: the checkpoint.
        truth: it in float64.
        samples: inputs, with a past where the model has a cache: prefill and cached steps alike.
        prepare: what makes the file comparable in its type, given a folder to write to.
        runners: the runtime's corners, by how the norms run.
        progress: called as the work goes on.
    """
    dtype = DType(exported.dtype)
    own_module = model.in_dtype(torch_dtype(dtype))
    sums: dict[tuple[str, str], ErrorSums] = {}
    notes: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            tapped, taps = tapped_copy(exported, model.module, folder=Path(folder))
        except ModelFileError as error:
            return LayersReport((), "", (str(error),))
        file = prepare(tapped, Path(folder))
        for index, inputs in enumerate(samples):
            progress("running PyTorch layer by layer", index, len(samples))
            for corner, module in (("true", truth), ("own", own_module)):
                values = _record(model, module, inputs=inputs)  # every feature map of a model, so not kept in memory
                np.savez(_kept(folder, corner, index=index), **values)  # type: ignore[arg-type]  # any name is an array's
        names = [tensor.name for tensor in file.inputs]
        corners = runners(file)
        for norms, runner in corners.items():  # one session after the other
            for index, inputs in enumerate(samples):
                progress(f"comparing layers, norms {norms}", index, len(samples))
                actual = runner.run({name: inputs[name] for name in names})
                masks = list(model.valid(inputs).values())
                with (
                    np.load(_kept(folder, "true", index=index)) as true,
                    np.load(_kept(folder, "own", index=index)) as own,
                ):
                    for place in taps:
                        if place.module not in true:
                            notes[f"{place.kind} {place.module} did not run in PyTorch"] = None
                            continue
                        a, o, t = actual[place.output], place.of(own[place.module]), place.of(true[place.module])
                        if a.shape != t.shape:
                            shapes = f"the file has shape {a.shape}, PyTorch {t.shape}"
                            notes[f"{place.kind} {place.module}: {shapes}"] = None
                            continue
                        a, o, t = (_defined(v, masks) for v in (a, o, t))
                        sums.setdefault((place.module, norms), ErrorSums()).add(a, o, truth=t)
    progress("comparing layers", len(samples), len(samples))
    layers = []
    for place in taps:
        judged = tuple(
            sums[place.module, norms].judge(place.module, norms, bound=BOUNDS[dtype])
            for norms in corners
            if (place.module, norms) in sums
        )
        if judged:
            layers.append(
                LayerParity(
                    place.module, place.kind, node=place.node, torch_error=judged[0].torch_error, corners=judged
                )
            )
    return LayersReport(tuple(layers), _say(layers), tuple(notes))


def _record(model: LoadedModel, module: nn.Module, *, inputs: Arrays) -> Arrays:
    with recorded(module) as values:
        TorchRunner(model, module).run(inputs)
    return values


def _kept(folder: str, corner: str, *, index: int) -> Path:
    return Path(folder) / f"{corner}.{index}.npz"
