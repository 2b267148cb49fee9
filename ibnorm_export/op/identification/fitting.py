"""Which formula explains the values of a norm: nonlinear least squares in NumPy float64.

A norm maps groups of G values to groups of G values. A form (`Form`) with a compression g, a lambda and an epsilon
explains its values when, at every position, they are an affine image of the form's standardised value z:

    y[n, p] = scale[p] * z[n, p] + bias[p]          n: sample; p: position in the group, and outside of it

Scale and bias are linear, and are eliminated for each position (variable projection: Golub and Pereyra, 1973). What
remains is a problem in one to three numbers, solved by the method of Levenberg and Marquardt from the best points of a
grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COMPRESSIONS",
    "MEMBER_RESIDUAL",
    "OTHER_COMPRESSIONS",
    "Fit",
    "Form",
    "affine",
    "candidates",
    "fit",
    "refine",
    "residual",
    "snap",
]

Array = NDArray[np.float64]

#: The largest relative residual of a member. Rounding in float64 leaves 1e-15 to 1e-13, other forms leave 1e-8 or more.
MEMBER_RESIDUAL: Final = 1e-11

#: g of the members.
COMPRESSIONS: Final[Mapping[str, Callable[[Array], Array]]] = {
    "S": lambda t: t,
    "L": lambda t: np.copysign(np.log1p(np.abs(t)), t),
    "T": np.tanh,
}

#: g of norms that are not members, by name.
OTHER_COMPRESSIONS: Final[Mapping[str, Callable[[Array], Array]]] = {
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "softsign": lambda t: t / (1.0 + np.abs(t)),
    "square root": lambda t: np.copysign(np.sqrt(1.0 + np.abs(t)) - 1.0, t),
    "power 1/2": lambda t: np.copysign(np.sqrt(np.abs(t)), t),
}

_COMPRESS: Final = {**COMPRESSIONS, **OTHER_COMPRESSIONS}

#: Grid of starting points. Lambda and bounds are in units of the input.
_LAMBDAS: Final = (0.02, 0.1, 0.4, 1.0, 3.0, 10.0, 50.0)
_EPSILONS: Final = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0)
_BOUNDS: Final = (0.3, 1.0, 3.0, 10.0, 30.0)

_ITERATIONS: Final = 60


@dataclass(frozen=True, slots=True)
class Form:
    """A formula for z, with lambda and epsilon as parameters.

    Args:
        name: the formula in a few words; empty for that of the members.
        sentence: the formula in a sentence.
        standardised: (x, g, lambda, epsilon, bound) -> the columns whose affine image y is, z first.
        has_bound: the formula has a third parameter, a bound on values.
    """

    name: str
    sentence: str
    standardised: Callable[[Array, Callable[[Array], Array], float, float, float], tuple[Array, ...]]
    _: KW_ONLY
    has_bound: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """The best parameters of one form.

    Args:
        form: the formula.
        compression: name of g.
        lambd: lambda; 1 for S, where only epsilon * lambda^2 matters.
        epsilon: epsilon.
        bound: the bound of a form that has one.
        residual: norm of the unexplained part of y over the norm of y.
    """

    form: Form
    compression: str
    _: KW_ONLY
    lambd: float
    epsilon: float
    bound: float = math.inf
    residual: float = math.inf

    def columns(self, x: Array) -> tuple[Array, ...]:
        """The columns of the form for x (samples, outer, G)."""
        with np.errstate(all="ignore"):
            return self.form.standardised(x, _COMPRESS[self.compression], self.lambd, self.epsilon, self.bound)

    def measured(self, x: Array, y: Array) -> Fit:
        """The same parameters with their residual on x and y (samples, outer, G)."""
        return replace(self, residual=residual(self.columns(x), y)[1])

    @property
    def explains(self) -> bool:
        return self.residual <= MEMBER_RESIDUAL


def _relative(unexplained: Array, y: Array) -> float:
    norm = float(np.linalg.norm(y))
    norm = norm if math.isfinite(norm) else float(np.linalg.norm(y[np.isfinite(y)]))
    value = float(np.linalg.norm(unexplained)) / norm if norm else math.inf
    return value if math.isfinite(value) else math.inf


def _centred(values: Array, valid: NDArray[np.bool_] | None) -> Array:
    if valid is None:
        return np.asarray(values - values.mean(0))
    count = np.maximum(valid.sum(0), 1)
    return np.where(valid, values - np.where(valid, values, 0.0).sum(0) / count, 0.0)


def _unexplained(columns: Sequence[Array], y: Array) -> Array:
    """y without what an affine combination of the columns explains, for each position: arrays (samples, ...).

    Values of y that are NaN are left out.
    """
    valid = None if np.isfinite(y).all() else np.isfinite(y)
    with np.errstate(all="ignore"):
        rest = _centred(y, valid)
        centred = [_centred(column, valid) for column in columns]
        # Gram-Schmidt; with several columns a second pass removes the rounding of the first.
        for index, column in enumerate(centred):
            squared = (column * column).sum(0)
            squared = np.where(squared > 0, squared, 1.0)
            for _ in range(min(2, len(centred))):
                rest = rest - column * ((column * rest).sum(0) / squared)
                for other in range(index + 1, len(centred)):
                    centred[other] = centred[other] - column * ((column * centred[other]).sum(0) / squared)
        return np.asarray(rest)


def residual(columns: Sequence[Array], y: Array) -> tuple[Array, float]:
    """What an affine combination of the columns leaves unexplained of y at each position, and its relative norm."""
    unexplained = _unexplained(columns, y)
    return unexplained, _relative(unexplained, y)


def affine(z: Array, y: Array) -> tuple[Array, Array]:
    """Scale and bias for each position: y[n, p] = scale[p] * z[n, p] + bias[p], by least squares."""
    centred = z - z.mean(0)
    squared = (centred * centred).sum(0)
    squared = np.where(squared > 0, squared, 1.0)
    scale = (centred * (y - y.mean(0))).sum(0) / squared
    rest = y - scale * z
    scale = scale + (centred * (rest - rest.mean(0))).sum(0) / squared
    return np.asarray(scale), np.asarray((y - scale * z).mean(0))


def _parameters(start: Fit) -> list[str]:
    names = [] if start.compression == "S" else ["lambd"]
    names += ["epsilon"] if start.epsilon > 0 else []
    return [*names, "bound"] if start.form.has_bound else names


def refine(start: Fit, x: Array, *, y: Array, fixed: Sequence[str] = ()) -> Fit:
    """Minimise the residual from a starting point, in the logarithms of the parameters.

    Args:
        start: form and starting point. An epsilon of 0 stays 0.
        x: inputs (samples, outer, G).
        y: outputs, of the same shape.
        fixed: parameters that keep their values.
    """
    names = [name for name in _parameters(start) if name not in fixed]
    best = start.measured(x, y)
    if not names or not math.isfinite(best.residual):
        return best

    def moved(point: Fit, step: Array) -> Fit:
        factors = np.exp(np.clip(step, -4.0, 4.0))
        return replace(point, **{n: getattr(point, n) * float(f) for n, f in zip(names, factors, strict=True)})

    damping, idle, small = 1e-3, 0, 1e-7
    for _ in range(_ITERATIONS):
        rest = _unexplained(best.columns(x), y)
        jacobian = np.empty((len(names), rest.size))
        for index in range(len(names)):
            one = np.zeros(len(names))
            one[index] = small
            ahead = _unexplained(moved(best, one).columns(x), y)
            jacobian[index] = (ahead - rest).ravel() / small
        if not np.isfinite(jacobian).all():
            return best
        normal, gradient = jacobian @ jacobian.T, jacobian @ rest.ravel()
        improved = False
        for _ in range(8):
            diagonal = np.diag(damping * np.diag(normal) + 1e-300)
            step = -np.asarray(np.linalg.lstsq(normal + diagonal, gradient, rcond=None)[0], np.float64)
            trial = moved(best, step).measured(x, y)
            if trial.residual < best.residual:
                improved, damping = True, max(damping / 10, 1e-12)
                break
            damping *= 10
        if not improved:
            return best
        idle = idle + 1 if trial.residual > 0.9 * best.residual else 0
        best = trial
        if idle >= 3:
            return best
    return best


def _starts(form: Form, compression: str, near: float | None) -> Iterator[Fit]:
    lambdas: tuple[float, ...] = _LAMBDAS if near is None else (near / 2, near, near * 2)
    lambdas = (1.0,) if compression == "S" else lambdas
    bounds = _BOUNDS if form.has_bound else (math.inf,)
    epsilons = _EPSILONS[::3] if form.has_bound else _EPSILONS  # three dimensions need a coarser grid
    for lambd, epsilon, bound in itertools.product(lambdas, epsilons, bounds):
        yield Fit(form, compression, lambd=lambd, epsilon=epsilon, bound=bound)


def fit(form: Form, compression: str, *, x: Array, y: Array, near: float | None = None) -> Fit:
    """Fit one form from the best points of a grid.

    Args:
        form: the formula.
        compression: name of g.
        x: inputs (samples, outer, G).
        y: outputs, of the same shape.
        near: a lambda to search near, with one start instead of three; None searches everywhere.
    """
    grid = sorted((start.measured(x, y) for start in _starts(form, compression, near)), key=lambda f: f.residual)
    best = grid[0]
    # Points with an epsilon of 0 keep it: the best points with and without an epsilon are both tried.
    with_epsilon = [f for f in grid if f.epsilon > 0][: 3 if near is None else 1]
    without = [f for f in grid if f.epsilon == 0][:1]
    for start in [*without, *with_epsilon]:
        found = refine(start, x, y=y)
        if found.residual < best.residual:
            best = found
        if best.explains:
            break
    return best


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def candidates(value: float, factors: Sequence[float]) -> list[float]:
    """Numbers near `value` that somebody may have written, the likeliest first.

    Decimal numbers with few digits come first, then those with a factor, as in 1e-5 * (n - 1) / n, and a float32.
    """
    if value == 0:
        return [0.0]
    found: list[tuple[float, float]] = []
    for digits in range(1, 16):
        found.append((digits, _rounded(value, digits)))
        if digits <= 7:
            found += [(digits + 2.5, _rounded(value / factor, digits) * factor) for factor in factors]
    found.append((8.5, float(np.float32(value))))
    near = [(cost, v) for cost, v in found if abs(v - value) <= 0.5 * abs(value) and v > 0]
    return list(dict.fromkeys(v for _, v in sorted(near)))


def snap(best: Fit, x: Array, *, y: Array) -> Fit:
    """Replace lambda and epsilon by the simplest numbers that explain y equally well.

    Args:
        best: a fit that explains y.
        x: inputs (samples, outer, G).
        y: outputs, of the same shape.
    """
    limit = max(3 * best.residual, 1e-14)
    size = x.shape[-1]
    if best.epsilon > 0:
        zero = refine(replace(best, epsilon=0.0), x, y=y)
        best = zero if zero.residual <= limit else best
    if best.compression != "S":
        for lambd in candidates(best.lambd, ()):
            trial = replace(best, lambd=lambd).measured(x, y)
            if limit < trial.residual < 1e-8:  # epsilon has absorbed the error of the fitted lambda
                trial = refine(trial, x, y=y, fixed=("lambd",))
            if trial.residual <= limit:
                best = trial
                break
    squared = best.lambd**2
    sizes = (1.0, (size - 1) / size)
    factors = dict.fromkeys(f for n in sizes for f in (n, n * squared, n / squared) if f != 1.0)
    for epsilon in candidates(best.epsilon, list(factors)):
        trial = replace(best, epsilon=epsilon).measured(x, y)
        if trial.residual <= limit:
            return trial
    return best
