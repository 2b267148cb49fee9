"""A file and its checkpoint: the input of every step of the numeric verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import onnx_ir as ir

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays, DType, InputSpec
from ibnorm_export.progress import Progress
from ibnorm_export.runtimes.lazy_runners import LazyRunners
from ibnorm_export.runtimes.registry import fused_library, open_runner
from ibnorm_export.runtimes.runner import Kernels, Runner
from ibnorm_export.verifier.options import VerifyOptions
from ibnorm_export.verifier.reference import Reference

__all__ = ["FUNCTIONS", "FUSED", "Comparison", "with_rounding"]

#: How the norms ran, as in `OutputParity.norms`.
FUSED: Final = "fused"
FUNCTIONS: Final = "as functions"
_SERVED: Final = "as served"


@dataclass(frozen=True)
class Comparison:
    """A file, and what PyTorch computes from its checkpoint.

    Args:
        file: the file that is run.
        reference: what it is compared with.
        options: how to verify.
        progress: receives the progress of the work.
    """

    file: ExportedModel
    reference: Reference
    options: VerifyOptions
    progress: Progress

    @property
    def rounds(self) -> bool:
        """Whether the backend rounds after every node, as the file's dtype requires.

        On a CPU, ONNX Runtime computes fp16 graphs in float32 without that rounding, and bf16 graphs not at all.
        """
        return self.options.backend != "ort-cpu" or self.reference.dtype is DType.FP32

    @cached_property
    def file_inputs(self) -> tuple[InputSpec, ...]:
        """The inputs of the checkpoint that the file takes."""
        names = {tensor.name for tensor in self.file.inputs}
        return tuple(spec for spec in self.reference.model.inputs if spec.name in names)

    def feed(self, inputs: Arrays) -> Arrays:
        """The part of `inputs` that the file takes."""
        return {spec.name: inputs[spec.name] for spec in self.file_inputs}

    @cached_property
    def variants(self) -> LazyRunners:
        """Runners of the file by how the norms run, one open at a time.

        Functions run in addition to fused kernels, because a kernel would hide a wrong function body.
        """
        options = self.options
        opened = functools.partial(open_runner, options.backend, self.file)
        if options.backend == "triton":  # the server decides how the norms run
            return LazyRunners({_SERVED: functools.partial(opened, endpoint=options.endpoint)})
        openers: dict[str, Callable[[], Runner]] = {}
        if fused_library(options.backend, options.kernels) is not None:
            openers[FUSED] = functools.partial(opened, kernels=Kernels.FUSED)
        if options.kernels is not Kernels.FUSED:
            openers[FUNCTIONS] = functools.partial(opened, kernels=Kernels.FUNCTION, engine=options.engine)
        return LazyRunners(openers)


def with_rounding(comparison: Comparison, folder: Path) -> Comparison:
    """Return the comparison of a copy that rounds after every node, if the backend does not round.

    Args:
        comparison: the file as it is, and its reference.
        folder: where the copy is written.
    """
    if comparison.rounds:
        return comparison
    from ibnorm_export.graph.dtype_rounding import rounding_copy

    ir.save(rounding_copy(comparison.file), folder / "rounding.onnx", external_data="rounding.onnx.data")
    return replace(comparison, file=ExportedModel(folder / "rounding.onnx"))
