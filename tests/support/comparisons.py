"""A comparison whose runners the test chooses, e.g. one that computes something wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays, DType, InputSpec
from ibnorm_export.progress import silent
from ibnorm_export.runtimes.lazy_runners import LazyRunners
from ibnorm_export.runtimes.runner import Kernels, Runner
from ibnorm_export.verifier.checkpoint.reference import Reference
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.options import VerifyOptions


def compare_runners(
    file: ExportedModel, model: LoadedModel, *, runners: Mapping[str, Runner], inputs: Sequence[Arrays] = ()
) -> Comparison:
    """Compare `runners` with PyTorch instead of the file; they take all inputs of the checkpoint."""

    class OnlyChosen(LazyRunners):
        def put(self, key: str, runner: Runner) -> None:
            """A session of the file takes no part."""

    class ChosenRunners(Comparison):
        @cached_property
        def file_inputs(self) -> tuple[InputSpec, ...]:
            return model.inputs

        @cached_property
        def variants(self) -> LazyRunners:
            return OnlyChosen({norms: lambda runner=runner: runner for norms, runner in runners.items()})

    reference = Reference(model, DType(file.dtype), inputs=tuple(inputs), progress=silent)
    return ChosenRunners(file, reference, options=VerifyOptions(kernels=Kernels.FUNCTION), progress=silent)
