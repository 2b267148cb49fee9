"""The first step of a comparison: the user's own norms in float64, against the norms that replace them in the export.

Both sides are float64, so they agree to rounding if the reading of the user's class is right. The measured error does
not depend on any runtime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.verifier.report import MappingReport, NormMapping

__all__ = ["END_TO_END_TOLERANCE", "NORM_TOLERANCE", "MappingMeasurement"]

#: The largest relative error of one norm in float64. Two orders of evaluation differ by about ten roundings of 1.1e-16,
#: and by more where the mean is far above the standard deviation: this covers a mean of 1000 standard deviations.
NORM_TOLERANCE: Final = 1e-12

#: The largest relative error of an output in float64: a network amplifies the error of its norms, by up to a hundred.
END_TO_END_TOLERANCE: Final = 1e-10

#: Where rounding is amplified (rows that are nearly constant), an error may also be this many times the change that one
#: rounding of every value causes: each side rounds about eight times.
_ROUNDINGS: Final = 16


def _floats(values: Any) -> list[Tensor]:
    return [leaf.detach().double() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _squares(actual: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Sums of squares of the difference and of `expected`; infinite where shapes or non-finite values differ."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return float("inf"), 1.0
    difference = total = 0.0
    for a, e in zip(actual, expected, strict=True):
        finite = torch.isfinite(e)
        if not torch.equal(torch.isfinite(a), finite):
            return float("inf"), 1.0
        difference += float(((a - e)[finite] ** 2).sum())
        total += float((e[finite] ** 2).sum())
    return difference, total


def _perturbed(value: Tensor) -> Tensor:
    """The values with each rounded once more, up or down."""
    if not value.is_floating_point():
        return value
    signs = torch.ones(value.numel(), dtype=value.dtype)
    signs[1::2] = -1
    generator = torch.Generator().manual_seed(0)
    signs = signs[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)
    return value * (1 + signs * torch.finfo(torch.float64).eps)


@dataclass(slots=True)
class _Sums:
    """Sums of squares over all values: the error, the expected values, and the change that one rounding causes."""

    error: float = 0.0
    expected: float = 0.0
    rounding: float = 0.0

    def add(
        self, actual: list[Tensor], expected: list[Tensor], *, limit: float, rounded: Callable[[], list[Tensor]]
    ) -> None:
        """Add values; `rounded` computes the expected values from inputs that are rounded once more."""
        error, squares = _squares(actual, expected)
        self.error += error
        self.expected += squares
        if np.isfinite(error) and error > limit**2 * squares:
            change, _ = _squares(rounded(), expected)
            self.rounding += change if np.isfinite(change) else 0.0

    def _relative(self, squares: float) -> float:
        return float(np.sqrt(squares / self.expected)) if self.expected else float(np.sqrt(squares))

    def relative_error(self) -> float:
        return self._relative(self.error)

    def tolerance(self, limit: float) -> float:
        """`limit`, and what rounding explains beyond it."""
        return limit + _ROUNDINGS * self._relative(self.rounding)


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
    mapped: nn.Module
    _norms: dict[str, _Sums] = field(default_factory=dict, init=False)
    _outputs: _Sums = field(default_factory=_Sums, init=False)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Measure every replaced norm in the runs of `original` within this block."""
        handles = []
        for path in self.model.replaced_norms:
            before, after = self._hooks(path)
            norm = self.original.get_submodule(path)
            handles.append(norm.register_forward_pre_hook(before, with_kwargs=True))
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
            waiting.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))  # the norm may write to its input

        def after(norm: nn.Module, _inputs: Any, output: Any) -> None:
            args, kwargs = waiting.pop()

            def rounded() -> list[Tensor]:
                changed, named = tree_map_only(Tensor, _perturbed, (args, kwargs))
                return _floats(norm.forward(*changed, **named))

            sums = self._norms.setdefault(path, _Sums())
            sums.add(_floats(replacement(*args, **kwargs)), _floats(output), limit=NORM_TOLERANCE, rounded=rounded)

        return before, after

    @contextlib.contextmanager
    def rounding_norms(self) -> Iterator[None]:
        """Round the output of every replaced norm once more in the runs of `original` within this block."""

        def hook(_norm: nn.Module, _inputs: Any, output: Any) -> Any:
            return tree_map_only(Tensor, _perturbed, output)

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

        self._outputs.add(
            tensors(actual), tensors(expected), limit=END_TO_END_TOLERANCE, rounded=lambda: tensors(rounded())
        )

    def report(self) -> MappingReport:
        """What was measured so far."""
        assert self.model.original is not None
        norms = tuple(
            NormMapping(
                path,
                type(self.model.original.get_submodule(path)).__name__,
                replacement=_describe(self.model.module.get_submodule(path)),
                error=sums.relative_error(),
                tolerance=sums.tolerance(NORM_TOLERANCE),
            )
            for path, sums in self._norms.items()
        )
        return MappingReport(
            norms,
            idle=tuple(path for path in self.model.replaced_norms if path not in self._norms),
            error=self._outputs.relative_error(),
            tolerance=self._outputs.tolerance(END_TO_END_TOLERANCE),
        )
