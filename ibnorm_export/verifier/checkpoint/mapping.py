"""The first step of a comparison: the user's own norms in float64, against the norms that replace them in the export.

Both sides are float64, so they agree to rounding if the reading of the user's class is right. The measured error does
not depend on any runtime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.op.agreement import Agreement, float64_tensors, perturbed
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.verifier.report import MappingReport, NormMapping

__all__ = ["END_TO_END_TOLERANCE", "MappingMeasurement"]

#: The largest relative error of an output in float64: a network amplifies the error of its norms, by up to a hundred.
END_TO_END_TOLERANCE: Final = 1e-10


def _describe(norm: nn.Module) -> str:
    """What a norm is exported as."""
    if not isinstance(norm, (IBNorm, BatchIBNorm)):
        return type(norm).__name__
    spec = norm.spec
    grouping = "" if spec.grouping == "last" else f", grouping {spec.grouping}"
    return f"{spec.op_type}, lambda {spec.lambd:.6g}, epsilon {spec.epsilon:.6g}{grouping}"


@dataclass
class MappingMeasurement:
    """Runs of the user's module, during which every value that reaches a replaced norm also goes to its replacement.

    Args:
        model: the model, which has an original.
        original: its original in float64.
        mapped: its module in float64.
    """

    model: LoadedModel
    original: nn.Module
    _: KW_ONLY
    mapped: nn.Module
    _norms: dict[str, Agreement] = field(default_factory=dict, init=False)
    _outputs: Agreement = field(default_factory=lambda: Agreement(END_TO_END_TOLERANCE), init=False)
    _rerunning: bool = field(default=False, init=False)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Measure every replaced norm in the runs of `original` within this block."""
        handles = []
        for path in self.model.replaced_norms:
            before, after = self._hooks(path)
            norm = self.original.get_submodule(path)
            # Around the hooks of the user's own code, which belong to what the norm computes.
            handles.append(norm.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(norm.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        replacement = self.mapped.get_submodule(path)
        waiting: list[tuple[Any, Any]] = []

        def before(_norm: nn.Module, args: Any, kwargs: Any) -> None:
            if self._rerunning:
                return
            waiting.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))  # the norm may write to its input

        def after(norm: nn.Module, _inputs: Any, output: Any) -> None:
            if self._rerunning:
                return
            args, kwargs = waiting.pop()

            def rounded() -> list[Tensor]:
                changed, named = perturbed((args, kwargs))
                self._rerunning = True
                try:
                    return float64_tensors(norm(*changed, **named))
                finally:
                    self._rerunning = False

            self._norms.setdefault(path, Agreement()).add(
                float64_tensors(replacement(*args, **kwargs)), float64_tensors(output), rounded=rounded
            )

        return before, after

    @contextlib.contextmanager
    def rounding_norms(self) -> Iterator[None]:
        """Round the output of every replaced norm once more in the runs of `original` within this block."""

        def hook(_norm: nn.Module, _inputs: Any, output: Any) -> Any:
            return perturbed(output)

        norms = {id(norm): norm for norm in map(self.original.get_submodule, self.model.replaced_norms)}
        handles = [norm.register_forward_hook(hook) for norm in norms.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_outputs(self, actual: Arrays, expected: Arrays, *, rounded: Callable[[], Arrays]) -> None:
        """Add one sample.

        Args:
            actual: outputs of `mapped`.
            expected: outputs of `original`.
            rounded: computes outputs of `original` within `rounding_norms`.
        """

        def tensors(arrays: Mapping[str, Any]) -> list[Tensor]:
            return [torch.from_numpy(np.asarray(arrays[name])).double() for name in self.model.outputs]

        self._outputs.add(tensors(actual), tensors(expected), rounded=lambda: tensors(rounded()))

    def report(self) -> MappingReport:
        """What was measured so far."""
        assert self.model.original is not None
        norms = tuple(
            NormMapping(
                path,
                type(self.model.original.get_submodule(path)).__name__,
                replacement=_describe(self.model.module.get_submodule(path)),
                error=agreement.error,
                tolerance=agreement.tolerance,
            )
            for path, agreement in self._norms.items()
        )
        return MappingReport(
            norms,
            idle=tuple(path for path in self.model.replaced_norms if path not in self._norms),
            error=self._outputs.error,
            tolerance=self._outputs.tolerance,
        )
