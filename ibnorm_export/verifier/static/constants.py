"""Constants of a file that are not weights: which of them a right file may have."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.verifier.checkpoint.coverage import Coverage
from ibnorm_export.verifier.static.dataflow import ConstantUse
from ibnorm_export.verifier.weights.rotary_tables import rotary_frequencies

__all__ = ["PRODUCTS", "SHAPE_INPUTS", "KnownConstants"]

#: Positions of inputs that state shapes, axes, positions or repetitions, by op type; they are not arithmetic.
SHAPE_INPUTS: Final = {
    "Reshape": {1},
    "Expand": {1},
    "Unsqueeze": {1},
    "Squeeze": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Tile": {1},
    "Pad": {1, 3},
    "ConstantOfShape": {0},
    "Resize": {1, 2, 3},
    "Upsample": {1},
    "OneHot": {1},
    "TopK": {1},
    "Trilu": {1},
    "CumSum": {1},
    "ReduceMean": {1},
    "ReduceSum": {1},
    "ReduceMax": {1},
    "ReduceMin": {1},
    "ReduceProd": {1},
    "ReduceL2": {1},
}

#: Operators that add up products with a constant.
PRODUCTS: Final = frozenset({"MatMul", "Gemm", "Conv", "Einsum"})

#: Values that masks consist of.
_MASK_VALUES: Final = frozenset(
    {0.0, 1.0, -np.inf, *(float(torch.finfo(t).min) for t in (torch.float16, torch.bfloat16, torch.float32))}
)

#: Longest list of integers that counts as a shape or a list of axes wherever it is used.
_SHAPE_LENGTH: Final = 8

#: Largest difference of a constant that PyTorch computes too, over its largest value, in steps of the dtype.
_STEPS: Final = 16


class KnownConstants:
    """What a right file may hold besides weights: shapes, numbers, masks, ranges, and what PyTorch itself computes.

    Args:
        model: the checkpoint.
        coverage: what one run of it used.
        dtype: the dtype of the file, in which it has rounded weights before it computed constants from them.
    """

    def __init__(self, model: LoadedModel, coverage: Coverage, *, dtype: DType) -> None:
        self._model = model
        self._coverage = coverage
        self._step = {DType.FP32: 2.0**-23, DType.FP16: 2.0**-10, DType.BF16: 2.0**-7}[dtype]

    def explains_use(self, use: ConstantUse, array: NDArray[Any]) -> bool:
        """Whether a constant states a shape, axes or positions where it is used."""
        if use.node is None or use.node.proto.domain not in ("", "ai.onnx"):
            return False
        shape_input = use.position in SHAPE_INPUTS.get(use.node.proto.op_type, ())
        return shape_input or (use.node.proto.op_type == "Concat" and array.dtype == np.int64 and array.ndim == 1)

    def problem(self, array: NDArray[Any], *, multiplies: bool = False) -> str:
        """What is wrong with a constant that is not a weight; empty if it is explained.

        Args:
            array: its value.
            multiplies: whether a node adds up products with it.
        """
        flat = array.reshape(-1)
        values = np.unique(np.asarray(flat, dtype=np.float64))
        if len(values) <= 1:
            if not multiplies or array.size < 2 or self._computed(array):
                return ""
            return f"all its {array.size} values are {values[0]:g}, and the checkpoint has no such weight"
        if array.dtype == np.bool_ or (len(values) == 2 and _MASK_VALUES.issuperset(values)):
            if _is_causal(array) or self._computed(array):
                return ""
            return f"it chooses among {array.size} places, which the checkpoint does not"
        if np.issubdtype(array.dtype, np.integer):
            if array.size <= _SHAPE_LENGTH or _is_range(flat) or self._computed(array):
                return ""
            return f"it holds {array.size} integers that the checkpoint neither has nor computes"
        if (_is_range(flat) and flat[0] in (0, 1)) or self._computed(array):
            return ""
        problem = f"it holds {array.size} values that the checkpoint neither has nor computes"
        return self._rotary_problem(array, otherwise=problem)

    def origins(self, array: NDArray[Any]) -> frozenset[str]:
        """Names of the weights from which PyTorch computes an equal constant, whatever the input.

        A matrix may be the other way round: a part of a weight that a product takes is transposed as whole weights are.
        """
        turned = (array, array.T) if array.ndim == 2 and array.dtype.kind in "fV" else (array,)
        found = (
            names
            for known, names in self._constants_by_size.get(array.size, ())
            if any(_close(form, known, step=self._step) for form in turned)
        )
        return frozenset().union(*found)

    def weights(self, names: frozenset[str]) -> tuple[torch.Tensor, ...]:
        """Tensors of the state dict by their names."""
        state = self._model.module.state_dict(keep_vars=True)
        return tuple(state[name] for name in sorted(names))

    def _computed(self, array: NDArray[Any]) -> bool:
        """Whether PyTorch takes or computes the same, whatever the input."""
        return any(_close(array, known, step=self._step) for known, _ in self._constants_by_size.get(array.size, ()))

    @cached_property
    def _constants_by_size(self) -> dict[int, list[tuple[NDArray[Any], frozenset[str]]]]:
        found: dict[int, list[tuple[NDArray[Any], frozenset[str]]]] = {}
        for constant, names in self._coverage.constants:
            wide = constant.double() if constant.is_floating_point() else constant
            found.setdefault(constant.numel(), []).append((wide.numpy(), names))
        return found

    def _rotary_problem(self, array: NDArray[Any], *, otherwise: str) -> str:
        """A table of cosines or sines of rotary positions (positions, frequencies) must reach the last position."""
        for frequencies, scaling in rotary_frequencies(self._model):
            if array.ndim != 2 or array.shape[1] not in (len(frequencies), 2 * len(frequencies)):
                continue
            angles = np.outer(np.arange(len(array)), np.resize(frequencies, array.shape[1]))
            # Angles are computed in float32, so their error grows with the position.
            steps = _step(array) + 16 * 2.0**-23 + len(array) * 2.0**-22
            for function in (np.cos, np.sin):
                wrong = np.abs(np.asarray(array, np.float64) - function(angles) * scaling).max(axis=1) > steps
                if not wrong.any():
                    short = len(array) < self._model.max_positions
                    ends = f"it is a rotary table of {len(array)} positions; the model has {self._model.max_positions}"
                    return ends if short else ""
                if wrong.mean() < 0.5:
                    first = int(np.argmax(wrong))
                    return f"it is a rotary table, of which {int(wrong.sum())} positions are wrong, from {first} on"
        return otherwise


def _is_range(flat: NDArray[Any]) -> bool:
    """Whether values have equal distances, as positions have."""
    steps = np.diff(np.asarray(flat, dtype=np.float64))
    return bool(flat.size > 1 and np.all(steps == steps[0]) and steps[0] == round(steps[0]))


def _is_causal(array: NDArray[Any]) -> bool:
    """Whether a mask (..., queries, keys) lets each query see the keys up to its own position, or only those."""
    if array.ndim < 2:
        return False
    most = array == array[..., -1:, :1]  # what the last query gives to the first key
    seen = int(most.reshape(-1, *array.shape[-2:])[0, 0].sum())
    return bool((most == np.tri(array.shape[-2], array.shape[-1], seen - 1, dtype=bool)).all())


def _step(array: NDArray[Any]) -> float:
    """The relative distance between neighbouring numbers of the dtype of an array."""
    sizes = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-23}
    return sizes.get(str(array.dtype), 2.0**-23)


def _close(array: NDArray[Any], known: NDArray[Any], *, step: float) -> bool:
    actual, expected = (np.asarray(a, dtype=np.float64).reshape(-1) for a in (array, known))
    finite = np.isfinite(expected)
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    if np.issubdtype(array.dtype, np.integer):
        return bool(np.array_equal(actual, expected))
    tolerance = _STEPS * max(step, _step(array)) * largest
    same = np.isfinite(actual) == finite
    return bool(same.all() and (np.abs(actual[finite] - expected[finite]) <= tolerance).all())
