"""The error after every norm and block: where a file departs from its checkpoint."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.checkpoint.reference import Reference
from ibnorm_export.verifier.comparison import Comparison, with_rounding
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.outputs.error_accumulator import ErrorSums
from ibnorm_export.verifier.report_parts.layers import LayerParity, LayersReport
from ibnorm_export.verifier.steps import Part
from ibnorm_export.verifier.tolerances import BOUNDS

if TYPE_CHECKING:  # it imports onnx_ir, which takes half a second
    from ibnorm_export.verifier.attribution.layer_outputs import LayerOutput

__all__ = ["compare_layers", "locate"]

#: Truth and baseline of one layer.
_Recorded = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Recordings:
    """What PyTorch's norms and blocks return, stored in files because not all feature maps fit into memory."""

    folder: Path

    def _file(self, role: str, index: int) -> Path:
        return self.folder / f"{role}.{index}.npz"

    def record(self, reference: Reference) -> None:
        """Run truth and baseline on every input."""
        from ibnorm_export.verifier.attribution.layer_outputs import layer_paths, record_layer_outputs

        paths = layer_paths(reference.model.module)
        runners = (
            ("truth", reference.truth, reference.exact(reference.truth)),
            ("baseline", reference.baseline, TorchRunner(reference.model, reference.baseline)),
        )
        for index, inputs in enumerate(sample.inputs for sample in reference.samples):
            reference.progress("running PyTorch layer by layer", index, len(reference.samples))
            for role, module, runner in runners:
                with (
                    zipfile.ZipFile(self._file(role, index), "w") as archive,
                    record_layer_outputs(module, paths=paths, keep=functools.partial(_add_array, archive)),
                ):
                    runner.run(inputs)

    @contextlib.contextmanager
    def read(self, index: int) -> Iterator[Callable[[LayerOutput], _Recorded | None]]:
        """Open the recordings of one input: layer -> truth and baseline, or None if the layer did not run."""
        with np.load(self._file("truth", index)) as truth, np.load(self._file("baseline", index)) as baseline:

            def look_up(layer: LayerOutput) -> _Recorded | None:
                if layer.module not in truth:
                    return None
                return layer.select(truth[layer.module]), layer.select(baseline[layer.module])

            yield look_up


def _add_array(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    """Add an array to an NPZ file, which NumPy can only write from arrays that are all in memory."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)


@dataclass(slots=True)
class _Sums:
    """Running sums by layer and variant, and notes about what could not be compared."""

    errors: dict[tuple[str, str], ErrorSums] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def add(
        self,
        layer: LayerOutput,
        norms: str,
        *,
        actual: NDArray[Any],
        recorded: _Recorded | None,
        masks: Sequence[NDArray[np.bool_]],
        covers: str,
        spread: float,
    ) -> None:
        """Add one layer of one sample, without the positions that `masks` exclude; see `ErrorSums.add`."""
        name = f"{layer.kind} {layer.module}"
        if recorded is None:
            self.notes[f"{name} did not run in PyTorch"] = None
            return
        truth, baseline = recorded
        if actual.shape != truth.shape:
            self.notes[f"{name}: the file has shape {actual.shape}, PyTorch {truth.shape}"] = None
            return
        a, b, t = (_without_padding(values, masks) for values in (actual, baseline, truth))
        self.errors.setdefault((layer.module, norms), ErrorSums()).add(a, b, truth=t, covers=covers, spread=spread)


def locate(comparison: Comparison, found: Part) -> Part:
    """Compare every layer if that was requested, or if an output fails, to find the first layer that does.

    The first that fails is a finding only if the report fails without it.
    """
    outputs_pass = all(output.passed for output in found.outputs)
    if outputs_pass and not comparison.options.layers:
        return Part()
    layers = compare_layers(comparison)
    shown = layers if comparison.options.layers else None
    if not layers.first_failure:
        return Part(layers=shown)
    if found.report(comparison):
        return Part(layers=shown, notes=(f"{layers.first_failure}; every output is within its tolerance",))
    return Part(layers=shown, findings=(Finding("layer", layers.first_failure, code=FindingCode.FIRST_LAYER),))


def compare_layers(comparison: Comparison) -> LayersReport:
    """Run a copy of the file with layer outputs, and PyTorch, on every sample.

    Args:
        comparison: the file as it is, and its reference. If the model has a cache, some samples have a past, so
            both prefill and cached steps are compared.
    """
    from ibnorm_export.verifier.attribution.layer_outputs import copy_with_layer_outputs

    reference = comparison.reference
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            copy, layers = copy_with_layer_outputs(
                comparison.file, reference.model.module, folder=folder, refers=comparison.refers
            )
        except ModelFileError as error:
            return LayersReport((), "", (str(error),))
        comparison.variants.make_room()
        comparison = with_rounding(replace(comparison, file=copy, copy=None), folder)
        recordings = _Recordings(folder)
        recordings.record(reference)
        sums = _Sums()
        for norms, index, actual in _runs(comparison):
            sample = reference.samples[index]
            masks = list(sample.valid.values())
            with recordings.read(index) as recorded:
                for layer in (layer for layer in layers if layer.output in actual):
                    sums.add(
                        layer,
                        norms,
                        actual=actual[layer.output],
                        recorded=recorded(layer),
                        masks=masks,
                        covers=sample.covers,
                        spread=reference.spread,
                    )
    parities = tuple(_judge(layers, sums.errors, reference=reference))
    return LayersReport(parities, _describe_first_failure(parities), tuple(sums.notes))


def _runs(comparison: Comparison) -> Iterator[tuple[str, int, Arrays]]:
    """How the norms ran, index of the sample, and what the file computes; one session after the other."""
    inputs = [sample.inputs for sample in comparison.reference.samples]
    for norms, runner in comparison.variants.items():
        for index, sample in enumerate(inputs):
            comparison.progress(f"comparing layers, norms {norms}", index, len(inputs))
            yield norms, index, runner.run(comparison.feed(sample))
    comparison.variants.close()
    comparison.progress("comparing layers", len(inputs), len(inputs))


def _without_padding(array: NDArray[Any], masks: Sequence[NDArray[np.bool_]]) -> NDArray[Any]:
    """`array` without the padded positions, if it has an axis for them."""
    fitting = next((mask for mask in masks if array.shape[: mask.ndim] == mask.shape), None)
    return array if fitting is None else array[fitting]


def _judge(
    layers: Sequence[LayerOutput], errors: Mapping[tuple[str, str], ErrorSums], *, reference: Reference
) -> Iterator[LayerParity]:
    bound = BOUNDS[reference.dtype]
    for layer in layers:
        variants = tuple(
            sums.judge(module, norms, bound=bound) for (module, norms), sums in errors.items() if module == layer.module
        )
        if variants:
            yield LayerParity(
                layer.module,
                layer.kind,
                node=layer.node,
                baseline_error=variants[0].baseline_error,
                variants=variants,
            )


def _describe_first_failure(layers: Sequence[LayerParity]) -> str:
    """The first layer that exceeds its tolerance, and the last before it that does not; empty if none does."""
    before = "the inputs"
    for layer in layers:
        failed = next((variant for variant in layer.variants if not variant.passed), None)
        if failed is not None:
            error, tolerance = failed.error, failed.tolerance
            if error <= tolerance:
                error, tolerance = failed.worst_sample_error, failed.worst_sample_tolerance
            where = f" for {failed.worst_sample_covers}" if failed.worst_sample_covers else ""
            return (
                f"{layer.kind} {layer.module} (node {layer.node}) is the first to exceed its tolerance, after "
                f"{before}: relative error {error:.3g}{where} with norms {failed.norms}; PyTorch has "
                f"{failed.baseline_error:.3g}, the tolerance is {tolerance:.3g}"
            )
        before = f"{layer.kind} {layer.module}"
    return ""
