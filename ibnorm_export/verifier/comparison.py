"""A file and its checkpoint: the input of every step of the numeric verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ibnorm_export.artifacts.covering_inputs import MUCH_PADDING
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import torch_dtype
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.tensors import Arrays, DType, InputSpec
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.lazy_runners import LazyRunners
from ibnorm_export.runtimes.registry import BACKENDS, fused_library, open_runner
from ibnorm_export.runtimes.runner import Backend, Kernels, Runner
from ibnorm_export.verifier.checkpoint.code_constants import find_constants
from ibnorm_export.verifier.checkpoint.reference import REALISED, Reference
from ibnorm_export.verifier.checkpoint.samples import PreparedSamples
from ibnorm_export.verifier.options import VerifyOptions

__all__ = ["FUNCTIONS", "FUSED", "SMALL_FILE", "Comparison", "with_rounding", "without_rounding"]

#: How the norms ran, as in `OutputParity.norms`.
FUSED: Final = "fused"
FUNCTIONS: Final = "as functions"
_SERVED: Final = "as served"

#: The largest file of which several sessions are open beside each other, in bytes; each holds the weights in memory.
SMALL_FILE: Final = 2**26

#: The largest file that a session holds the weights of, in bytes; those of a larger one stay mapped.
_LARGEST_HELD: Final = 2_000_000_000

#: Number of values, such as token ids, up to which an input costs no noticeable time to run.
_FEW: Final = 16


@dataclass(frozen=True)
class Comparison:
    """A file, and what PyTorch computes from its checkpoint: what every step of a verdict is given.

    Args:
        file: the file.
        reference: the checkpoint, the samples, and what PyTorch computes from them.
        options: how to verify.
        progress: receives the progress of the work.
        prepared: how the samples were chosen.
        text: tokens (n,) that a language model predicts; None if no text was given.
        notes: what a reader should know about the file, its checkpoint and the samples.
        copy: what runs in place of the file; None runs the file itself. See `with_rounding`.
    """

    file: ExportedModel
    reference: Reference
    _: KW_ONLY
    options: VerifyOptions
    progress: Progress
    prepared: PreparedSamples = field(default_factory=PreparedSamples)
    text: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()
    copy: ExportedModel | None = None

    @property
    def running(self) -> ExportedModel:
        """The file that runs."""
        return self.copy or self.file

    @property
    def rounds(self) -> bool:
        """Whether the backend rounds after every node, as the file's dtype requires.

        On a CPU, ONNX Runtime and OpenVINO compute fp16 graphs in float32 without that rounding, and ONNX Runtime bf16
        graphs not at all.
        """
        return BACKENDS[self.options.backend].rounds or self.reference.dtype is DType.FP32

    @property
    def refers(self) -> bool:
        """Whether copies of the file may refer to its external data; see `write_copy`."""
        return self.options.backend is Backend.ORT_CPU

    @property
    def maps_weights(self) -> bool:
        """Whether sessions keep the weights mapped, because copies of them might not fit into memory.

        Not those of a quantised file: without its own layout, ONNX Runtime widens them and rounds no activation.
        """
        large = self.running.size_bytes > _LARGEST_HELD and self.running.metadata.quantization is None
        return self.options.backend is Backend.ORT_CPU and large

    @cached_property
    def file_inputs(self) -> tuple[InputSpec, ...]:
        """The inputs of the checkpoint that the file takes."""
        names = {tensor.name for tensor in self.running.inputs}
        return tuple(spec for spec in self.reference.model.inputs if spec.name in names)

    def feed(self, inputs: Arrays) -> Arrays:
        """The part of `inputs` that the file takes."""
        return {spec.name: inputs[spec.name] for spec in self.file_inputs}

    @cached_property
    def variants(self) -> LazyRunners:
        """Runners of `running` by how the norms run, those of a large file one at a time.

        Functions run in addition to fused kernels, because a kernel would hide a wrong function body.
        """
        options = self.options
        opened = functools.partial(
            open_runner,
            options.backend,
            self.running,
            provider=options.provider,
            npm=options.npm,
            spins=False,
            maps_weights=self.maps_weights,
        )
        if options.backend is Backend.TRITON:  # the server decides how the norms run
            return LazyRunners({_SERVED: functools.partial(opened, endpoint=options.endpoint)})
        openers: dict[str, Callable[[], Runner]] = {}
        if fused_library(options.backend, options.kernels, provider=options.provider) is not None:
            openers[FUSED] = functools.partial(opened, kernels=Kernels.FUSED)
        if options.kernels is not Kernels.FUSED:
            openers[FUNCTIONS] = functools.partial(opened, kernels=Kernels.FUNCTION, engine=options.engine)
        return LazyRunners(openers, together=self.running.size_bytes <= SMALL_FILE)


def with_rounding(comparison: Comparison, folder: Path) -> Comparison:
    """Return the comparison in which a copy runs that rounds after every node, if the backend does not round.

    Args:
        comparison: the file as it is, and its reference.
        folder: where the copy is written.
    """
    if comparison.rounds:
        return comparison
    from ibnorm_export.graph.dtype_rounding import rounding_copy
    from ibnorm_export.verifier.file_copies import write_copy

    file = comparison.file
    copy = write_copy(rounding_copy(file), file, file=folder / "rounding.onnx", refers=comparison.refers)
    return replace(comparison, copy=copy)


def without_rounding(
    comparison: Comparison, folder: Path, *, tables: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
) -> Comparison:
    """Return the comparison of a half-precision file that computes in float32 and rounds nothing.

    PyTorch has the file's weights, in float32 and float64, so the tolerance is that of float32: an error that rounding
    would hide stands out. Inputs that only show how the file handles shapes and masks are left to the copy that rounds,
    and so are fused kernels: those of float32 do not run where the file does.

    Args:
        comparison: the file as it is, and its reference.
        folder: where the copy is written.
        tables: values that replace those of initializers, by name; see `exact_tables`.
    """
    from ibnorm_export.graph.dtype_rounding import exact_copy
    from ibnorm_export.verifier.file_copies import write_copy

    reference = comparison.reference
    model = reference.model.converted(torch_dtype(reference.dtype)).widened(torch.float32)
    constants = find_constants(model, inputs=reference.inputs[0])
    return replace(
        comparison,
        options=replace(comparison.options, kernels=Kernels.FUNCTION),
        file=write_copy(
            exact_copy(comparison.file, constants, tables=tables),
            comparison.file,
            file=folder / MODEL_FILE,
            refers=comparison.refers,
        ),
        reference=replace(reference, model=model, dtype=DType.FP32, skipped=_shapes_only(reference)),
        copy=None,
    )


def _shapes_only(reference: Reference) -> frozenset[int]:
    """Numbers of inputs that show no arithmetic that the others do not.

    They are the ordinary inputs that the baseline error is not taken from, except small ones, which cost nothing, and
    much padding; but only where covering inputs are run too.
    """
    if not reference.covers:
        return frozenset()
    ordinary = (
        index
        for index in range(REALISED[DType.FP32], min(reference.covers))
        if next(iter(reference.inputs[index].values())).size > _FEW
    )
    return frozenset([*ordinary, *(index for index, covers in reference.covers.items() if covers == MUCH_PADDING)])
