"""Derive every polynomial of custom_ops/include/ibnorm/compress.h and print it with its error.

Minimax in the relative error, by Remez exchange in 40-digit arithmetic; the coefficients are then
rounded to float32, highest degree first, refitting the remaining ones after each rounding, so that
the lower coefficients absorb the rounding of the higher ones.

    python custom_ops/tools/derive_compress.py

`tests/custom_ops/cuda/test_compress.py` runs it and compares the result with the header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp  # type: ignore[import-untyped]

__all__ = ["FITS", "Fit", "derive"]

Function = Callable[[mp.mpf], mp.mpf]


@dataclass(frozen=True, slots=True)
class Fit:
    """target(v) = fixed(v) + factor(v) * (k0 + k1 v + ...) on [low, high], error relative to norm(v)."""

    name: str
    target: Function
    fixed: Function
    factor: Function
    norm: Function
    low: mp.mpf
    high: mp.mpf
    terms: int


def _float32(value: mp.mpf) -> mp.mpf:
    return mp.mpf(struct.unpack("<f", struct.pack("<f", float(value)))[0])


def _extrema(error: Function, low: mp.mpf, high: mp.mpf, count: int) -> list[mp.mpf]:
    """Return where |error| is largest in each run of equal sign, on a dense Chebyshev grid."""
    size = 240
    grid = [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * i / size) for i in range(size + 1)]
    values = [error(v) for v in grid]
    best: list[int] = [0]
    for i in range(1, len(grid)):
        if values[i] == 0:
            continue
        if mp.sign(values[i]) == mp.sign(values[best[-1]]):
            if abs(values[i]) > abs(values[best[-1]]):
                best[-1] = i
        else:
            best.append(i)
    while len(best) > count:
        best.pop(0 if abs(values[best[0]]) < abs(values[best[-1]]) else -1)
    return [grid[i] for i in best]


def _minimax(goal: Function, weight: Function, low: mp.mpf, high: mp.mpf, terms: int) -> list[mp.mpf]:
    """Return the k that minimises max |weight(v) * (goal(v) - sum k_i v^i)|."""
    count = terms + 1
    nodes = [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * (2 * i + 1) / (2 * count)) for i in range(count)]
    k: list[mp.mpf] = []
    for _ in range(8):
        rows = [[v**j for j in range(terms)] + [(-1) ** i / weight(v)] for i, v in enumerate(nodes)]
        solution = mp.lu_solve(mp.matrix(rows), mp.matrix([goal(v) for v in nodes]))
        k = [solution[j] for j in range(terms)]
        coefficients = list(k)

        def error(v: mp.mpf, coefficients: list[mp.mpf] = coefficients) -> mp.mpf:
            return weight(v) * (goal(v) - mp.polyval(coefficients[::-1], v))

        found = _extrema(error, low, high, count)
        if len(found) < count:
            break
        nodes = found
    return k


def derive(fit: Fit) -> tuple[list[float], float]:
    """Return float32 coefficients k0, k1, ... and their largest relative error, in exact arithmetic."""
    with mp.workdps(40):
        # Away from the ends of the interval where factor vanishes, goal is defined by division.
        low = fit.low if fit.factor(fit.low) != 0 else fit.low + (fit.high - fit.low) / 10**6

        def weight(v: mp.mpf) -> mp.mpf:
            return abs(fit.factor(v) / fit.norm(v))

        done: dict[int, mp.mpf] = {}

        def goal(v: mp.mpf) -> mp.mpf:
            rest = (fit.target(v) - fit.fixed(v)) / fit.factor(v)
            return rest - mp.fsum(c * v**i for i, c in done.items())

        for terms in range(fit.terms, 0, -1):
            done[terms - 1] = _float32(_minimax(goal, weight, low, fit.high, terms)[-1])
        worst = mp.mpf(0)
        for i in range(1001):
            v = low + (fit.high - low) * i / 1000
            if fit.factor(v) != 0:
                worst = max(worst, abs(weight(v) * goal(v)))
        return [float(done[i]) for i in range(fit.terms)], float(worst)


def _log1p_over(v: mp.mpf) -> mp.mpf:
    return mp.log1p(v)


def _tanh_of_square(w: mp.mpf) -> mp.mpf:
    return mp.tanh(mp.sqrt(w)) / mp.sqrt(w)


with mp.workdps(40):
    _TWO_LOG2E = 2 / mp.log(2)
    FITS = (
        # float32 L: ln(1 + f) = f + f^2 (k0 + k1 f + ...), f in [-1/4, 1/2] after range reduction.
        Fit(
            "kLog1p",
            target=_log1p_over,
            fixed=lambda f: f,
            factor=lambda f: f * f,
            norm=lambda f: mp.log1p(f) if f else mp.mpf(1),
            low=mp.mpf(-1) / 4 - mp.mpf(10) ** -7,
            high=mp.mpf(1) / 2,
            terms=8,
        ),
        # float16 and bfloat16 L near 0: log2(1 + a) = a (k0 + k1 a + ...), a below 1/16.
        Fit(
            "kLog2Small",
            target=lambda a: mp.log1p(a) / mp.log(2),
            fixed=lambda a: mp.mpf(0),
            factor=lambda a: a,
            norm=lambda a: mp.log1p(a) / mp.log(2),
            low=mp.mpf(0),
            high=mp.mpf(1) / 16,
            terms=3,
        ),
        # float32 T near 0, in w = t^2: tanh(t) / t = 1 + w (k0 + k1 w + ...), |t| below 0.55.
        Fit(
            "kTanh",
            target=_tanh_of_square,
            fixed=lambda w: mp.mpf(1),
            factor=lambda w: w,
            norm=_tanh_of_square,
            low=mp.mpf(0),
            high=mp.mpf("0.55") ** 2,
            terms=4,
        ),
        # float16 T near 0, in w = z^2, z = 2 log2(e) t: tanh(t) / z = k0 + k1 w, |t| below 0.1.
        Fit(
            "kTanhSmall",
            target=lambda w: _tanh_of_square(w / _TWO_LOG2E**2) / _TWO_LOG2E,
            fixed=lambda w: mp.mpf(0),
            factor=lambda w: mp.mpf(1),
            norm=lambda w: _tanh_of_square(w / _TWO_LOG2E**2) / _TWO_LOG2E,
            low=mp.mpf(10) ** -8,
            high=(mp.mpf("0.1") * _TWO_LOG2E) ** 2,
            terms=2,
        ),
    )


def main() -> None:
    for fit in FITS:
        coefficients, error = derive(fit)
        print(f"// {fit.name}: relative error {error:.1e}")
        print(f"{{{', '.join(f'{float.hex(c)}F' for c in coefficients)}}}")


if __name__ == "__main__":
    main()
