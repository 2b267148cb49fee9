"""Run a norm of unknown code as a black box: on a copy, in evaluation mode, in float64, without side effects."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.float64_mode import compute_in_float64

__all__ = [
    "NormProbe",
    "Structure",
    "UnfitShape",
    "candidate_shapes",
    "inputs",
    "perturbed",
    "samples",
    "structure",
    "trimmed",
]

Array = NDArray[np.float64]

#: (standard deviation, mean) of the rows of x. A mean is at most 10 standard deviations, or E[x^2] - E[x]^2, which some
#: norms compute, would lose digits that the comparison needs.
_ROWS: Final = (
    *((scale, 0.0) for scale in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0) for _ in range(3)),
    *((scale, 10.0) for scale in (1.0, 3.0, 10.0, 100.0)),
    *((scale, 5 * scale) for scale in (1e-3, 1e-2, 0.1, 1.0)),
)

#: Longer groups of values that share statistics are made shorter; the result is confirmed at their real size.
_LONGEST_GROUP: Final = 16384

#: An output moves if it changes by more than this, relative to the largest output.
_MOVED: Final = 1e-12


class UnfitShape(SpecError):
    """A norm does not take an input of a shape as a norm: it raises, or returns something else."""


class NormProbe:
    """A copy of a norm that computes in float64.

    Args:
        module: the norm; neither it nor the state of the random generators changes.

    Raises:
        SpecError: the module cannot be copied, or has no values.
    """

    def __init__(self, module: nn.Module) -> None:
        self.original = module
        self.name = type(module).__name__
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise SpecError(f"{self.name} is on the meta device, so it has no values; load its weights first")
        try:
            self.copy = copy.deepcopy(module).eval().cpu()
        except Exception as error:  # copying runs the user's own code, which may raise anything
            raise SpecError(f"{self.name} cannot be copied: {_message(error)}") from error
        self._is_wide = False
        self._calls = 0

    def check_plain_call(self, shape: Sequence[int]) -> None:
        """Run the norm once in the dtype of its weights, or in float32.

        Raises:
            SpecError: it raises, changes its input, or returns another shape or dtype than that of its input.
        """
        own = next((t.dtype for t in (*self.copy.parameters(), *self.copy.buffers()) if t.is_floating_point()), None)
        try:
            self._check_plain_call(shape, own or torch.float32)
        except UnfitShape:
            if own in (None, torch.float32):
                raise
            self._check_plain_call(shape, torch.float32)  # weights may be stored in half precision

    def _check_plain_call(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        x = torch.from_numpy(inputs(shape, seed=1)).to(dtype)
        before = x.clone()
        with self._quiet():
            y = self._call(x, shape)
        if y.shape != x.shape or y.dtype != x.dtype:
            raise UnfitShape(
                f"{self.name} returns {y.dtype} {tuple(y.shape)} for {x.dtype} {tuple(x.shape)}; a norm returns the "
                "shape and dtype of its input"
            )
        if not torch.equal(x, before):
            raise SpecError(f"{self.name} changes its input in place; compute on a copy of x")

    def __call__(self, x: Array) -> Array:
        """Outputs in float64, of the same shape.

        Raises:
            SpecError: the norm raises, or returns something else.
        """
        if not self._is_wide:
            self.copy.to(torch.float64)
            self._is_wide = True
        tensor = torch.tensor(x)
        with self._quiet(), compute_in_float64():
            y = self._call(tensor, x.shape)
        if y.shape != tensor.shape or not y.is_floating_point():
            raise UnfitShape(
                f"{self.name} returns {y.dtype} {tuple(y.shape)} for an input of shape {tuple(x.shape)}; a norm "
                "returns the shape and dtype of its input"
            )
        return y.detach().to(torch.float64).numpy().copy()

    def _call(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        try:
            y: object = self.copy(x)
        except Exception as error:  # the user's own code may raise anything
            raise UnfitShape(f"{self.name} raised {_message(error)} for an input of shape {tuple(shape)}") from error
        if not isinstance(y, Tensor):
            raise UnfitShape(f"{self.name} returns {type(y).__name__}; a norm returns one tensor")
        return y

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No gradients. The random generators are as before afterwards, and different in each call, to reveal noise."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            self._calls += 1
            torch.default_generator.manual_seed(self._calls)
            yield

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the copy by name; changing one changes what the probe computes."""
        return dict((*self.copy.named_parameters(), *self.copy.named_buffers()))


def _message(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def inputs(shape: Sequence[int], *, seed: int, scale: float = 1.0) -> Array:
    """Normal values."""
    return scale * np.random.default_rng(seed).standard_normal(tuple(shape))


def samples(shape: Sequence[int]) -> Array:
    """Inputs whose index on axis 0 sets their standard deviation and mean; `shape` is that of one of them."""
    rng = np.random.default_rng(17)
    return np.stack([mean + scale * rng.standard_normal(tuple(shape)) for scale, mean in _ROWS])


@dataclass(frozen=True, slots=True)
class Structure:
    """Which outputs depend on which inputs.

    Args:
        axes: axes of the values that share statistics; empty for an element-wise norm.
        groups: into how many groups the values of these axes are divided; 1 for an ordinary norm.
    """

    axes: tuple[int, ...]
    groups: int = 1


def structure(probe: NormProbe, shape: Sequence[int]) -> Structure:
    """Find the grouping: change one input element, and see which outputs move.

    Raises:
        SpecError: an output depends on other rows, differs between two runs, or is not finite.
    """
    x = inputs(shape, seed=2)
    y = probe(x)
    if not np.isfinite(y).all():
        raise SpecError(f"{probe.name} returns NaN or infinity for normal values")
    if not np.array_equal(probe(x), y):
        raise SpecError(
            f"{probe.name} gives two results for the same input in evaluation mode: it contains noise, dropout or a "
            "state that changes. Switch it off in eval()"
        )
    rng = np.random.default_rng(3)
    axes: set[int] = set()
    share = 1.0
    for _ in range(4):
        place = tuple(int(rng.integers(size)) for size in shape)
        moved = _moved(probe, x, place)
        touched = {axis for axis in range(x.ndim) if (np.delete(moved, place[axis], axis)).any()}
        axes |= touched
        inside = tuple(slice(None) if axis in touched else place[axis] for axis in range(x.ndim))
        share = min(share, float(np.mean(moved[inside])))
    if 0 in axes:
        raise SpecError(
            f"the output of {probe.name} depends on other rows of the batch in evaluation mode (statistics over axis "
            "0); IBNorm has statistics of each row, or running statistics"
        )
    groups = round(1 / share) if share < 0.75 else 1
    return Structure(tuple(sorted(axes)), groups)


def trimmed(probe: NormProbe, shape: Sequence[int], *, axes: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """A smaller input shape that the norm takes as well: axes that no parameter follows become short.

    Args:
        probe: the norm.
        shape: the shape that it is known to take.
        axes: axes that share statistics, if they are known. They keep their sizes, which a norm may depend on (as in
            an unbiased variance), unless they are very long together.
    """
    own = {n for t in probe.tensors().values() for n in (t.numel(), *t.shape) if n > 1}
    group = math.prod(shape[axis] for axis in axes or ())
    kept = set(axes or ()) if group <= _LONGEST_GROUP else set()
    longest = [(2 if axes and axis not in axes else 5) if own else 64 for axis in range(len(shape))]
    sizes = enumerate(shape)
    small = tuple(2 if axis == 0 else n if n in own or axis in kept else min(n, longest[axis]) for axis, n in sizes)
    if small == tuple(shape):
        return small
    try:
        probe(inputs(small, seed=4))
    except SpecError:
        return tuple(shape)
    return small


@contextmanager
def perturbed(tensor: Tensor) -> Iterator[None]:
    """Another value of a parameter or buffer, every element changed; positive values stay positive."""
    before = tensor.clone()
    with torch.no_grad():
        if tensor.dtype == torch.bool:
            tensor.logical_not_()
        elif tensor.is_floating_point():
            ramp = torch.linspace(0.1, 0.2, tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape)
            tensor.add_(0.25 * before.abs() + ramp)
        else:
            tensor.add_(1)
        try:
            yield
        finally:
            tensor.copy_(before)


def _moved(probe: NormProbe, x: Array, place: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which outputs depend on the input at `place`, for any of a few changes of it."""
    moved = np.zeros(x.shape, bool)
    for seed, scale in ((2, 1.0), (5, 0.1)):
        base = inputs(x.shape, seed=seed, scale=scale)
        y = probe(base)
        changed = base.copy()
        changed[place] += 2.0 * scale
        z = probe(changed)
        moved |= np.abs(z - y) > _MOVED * max(float(np.abs(y).max()), 1e-300)
    return moved


def candidate_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Input shapes that a norm probably takes, from its attributes and tensors, the likeliest first."""
    size: object = None
    for name in ("normalized_shape", "num_features", "num_channels", "features", "dim", "hidden_size", "d_model"):
        size = size if size is not None else getattr(module, name, None)
    sizes = [size] if isinstance(size, int) else []
    if isinstance(size, (tuple, list)) and size and all(isinstance(n, int) for n in size):
        sizes = [int(size[-1])] if len(size) == 1 else []
        shapes = [(2, *map(int, size))]
    else:
        shapes = []
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.numel() > 1]
    sizes += [t.numel() for t in tensors]
    for n in dict.fromkeys(int(n) for n in sizes if int(n) > 0) or (64,):
        flat: list[tuple[int, ...]] = [(2, n), (2, 3, n)]
        image: list[tuple[int, ...]] = [(2, n, 5, 7), (2, n, 5)]
        last = type(module).__name__.lower()
        convolutional = "2d" in last or "batch" in last or any(t.dim() > 1 for t in tensors)
        shapes += [*image, *flat] if convolutional else [*flat, *image]
    return list(dict.fromkeys(shapes))
