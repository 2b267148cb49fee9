#!/usr/bin/env python3
"""Compute the coefficients of custom_ops/kernels/cpu/compress_simd.h.

    python custom_ops/tools/fit_compressions.py

prints all coefficients and the error of the float32 evaluation, in units in the last place of the
exact result: of the forms for every t, over every magnitude that a float32 can have, and of the near
forms over their range. It only needs NumPy.

Near forms, for packs of small |t|:

    log1p(a) = a + a^2 P(a) / Q(a), 0 <= a <= 2        tanh(t) = t + t^3 P(t^2) / Q(t^2), |t| <= 3/2

The sum comes last, so a tiny argument loses no digit, and the rounding of the quotient counts for little. The
nearest branch point or pole, -1 and +-i pi/2, is close, so a quotient of degree 2 over 3 in a (1 over 2
in t^2) is as good as a polynomial of degree 10 or more. It costs one division, which works beside the
multipliers.

The forms for every t:

log1p(a), a >= 0. With k chosen so that (1 + a) / 2^k lies in [2/3, 4/3),

    log1p(a) = k ln 2 + log1p(f),   f = (1 + a) / 2^k - 1 = a 2^-k + (2^-k - 1)

a 2^-k is exact, because it scales by a power of two, and 2^-k - 1 is exact for k < 25; beyond that
the 1 does not affect the result. So f has one rounding, with or without a fused multiply-add, and
for small a (k = 0) it *is* a. A tiny a loses no digit in 1 + a, and no correction term is needed.
On [-1/3, 1/3]: log1p(f) = f + f^2 P(f), P by weighted minimax.

The argument is clamped to 1.1e38 so that 2^-k stays a normal number.

tanh(z / 2) = e / (e + 2) with e = exp(z) - 1, z clamped to 18.04, above which tanh rounds to 1.
With n = round(z / ln 2) and r = z - n ln 2 (ln 2 as one float is off by 2e-9, which e tolerates),

    e = 2^n p + (2^n - 1),   p = exp(r) - 1 = r + r^2 Q(r)

2^n - 1 is exact for n < 25, and for tiny z (n = 0) e = p = r, so no digit is lost. The quotient
reduces the error of e by 2 / (e + 2). So this form has an error near 1 ulp, where a direct rational
approximation t N(t^2) / M(t^2) has 6 ulp near |t| = 8.

Rows in half precision use shorter polynomials.

Fits: Lawson's iteration (reweighted least squares) on a Chebyshev grid. For a quotient, each step
linearises it around the last denominator (Sanathanan and Koerner, 1963).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

F32 = np.float32
LOG_DEGREES = (7, 5)  # float32, half precision
EXP_DEGREES = (4, 3)
TANH_LIMIT = 18.04
NEAR_LOG = ((2.0, 3, 3), (3.0, 2, 3))  # limit of a, degrees of P and Q; float32, half precision
NEAR_TANH = ((1.5, 2, 2), (2.5, 2, 2))  # limit of |t|, degrees in t^2


def _grid(low: float, high: float, count: int) -> np.ndarray:
    theta = np.linspace(0, np.pi, count)
    return np.asarray((low + high) / 2 + (high - low) / 2 * np.cos(theta), dtype=np.longdouble)


def _solve(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted least squares in extended precision (modified Gram-Schmidt)."""
    a = a * weight[:, None]
    b = b * weight
    norms = np.sqrt((a * a).sum(axis=0))
    a = a / norms
    q = np.zeros_like(a)
    r = np.zeros((a.shape[1], a.shape[1]), dtype=np.longdouble)
    for j in range(a.shape[1]):
        v = a[:, j].copy()
        for _ in range(2):
            for i in range(j):
                dot = q[:, i] @ v
                r[i, j] += dot
                v -= dot * q[:, i]
        r[j, j] = np.sqrt(v @ v)
        q[:, j] = v / r[j, j]
    rhs = q.T @ b
    x = np.zeros(a.shape[1], dtype=np.longdouble)
    for i in reversed(range(a.shape[1])):
        x[i] = (rhs[i] - r[i, i + 1 :] @ x[i + 1 :]) / r[i, i]
    return x / norms


def _lawson(basis: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Coefficients that minimise the largest |basis @ x - goal|."""
    weight = np.ones_like(goal)
    for _ in range(60):
        x = _solve(basis, goal, np.sqrt(weight))
        weight *= np.abs(basis @ x - goal)
        weight /= weight.sum()
    return x


def fit_log(degree: int) -> np.ndarray:
    """P, lowest power first: log1p(f) = f + f^2 P(f) on [-1/3, 1/3]."""
    f = _grid(-1 / 3, 1 / 3, 1201)
    f = f[np.abs(f) > 1e-3]
    exact = np.log1p(f)
    basis = np.stack([f ** (2 + i) / exact for i in range(degree + 1)], axis=1)
    return _lawson(basis, (exact - f) / exact)


def fit_exp(degree: int) -> np.ndarray:
    """Q, lowest power first: exp(r) - 1 = r + r^2 Q(r) on [-ln(2)/2, ln(2)/2]."""
    r = _grid(-0.3467, 0.3467, 1201)
    r = r[np.abs(r) > 1e-3]
    exact = np.expm1(r)
    basis = np.stack([r ** (2 + i) / exact for i in range(degree + 1)], axis=1)
    return _lawson(basis, (exact - r) / exact)


def fit_quotient(
    exact: Callable[[np.ndarray], np.ndarray], high: float, *, degrees: tuple[int, int]
) -> list[np.ndarray]:
    """P and Q, lowest power first: exact(u) = 1 + u P(u) / Q(u) on [0, high], and Q(0) = 1."""
    u = np.asarray(_grid(0.0, high, 2001), dtype=np.float64)
    u = u[u > high * 1e-6]
    goal, scaled = exact(u), u / high
    above, below = (np.stack([scaled**i for i in range(1, degree + 1)], axis=1) for degree in degrees)
    weight, denominator, least = np.ones_like(u), np.ones_like(u), np.inf
    best: list[np.ndarray] = []
    for _ in range(120):
        row = np.sqrt(weight) / (denominator * goal)
        basis = np.concatenate([above, -goal[:, None] * below], axis=1)
        x = np.linalg.lstsq(basis * row[:, None], (goal - 1) * row, rcond=None)[0]
        p, q = x[: degrees[0]], x[degrees[0] :]
        error = np.abs((1 + above @ p) / (1 + below @ q) / goal - 1)
        if error.max() < least:
            least = error.max()
            whole = [np.concatenate([[1.0], c / high ** np.arange(1, len(c) + 1)]) for c in (p, q)]
            best = [np.append(whole[0], np.zeros(len(q) - len(p)))[1:] - whole[1][1:], whole[1]]
        denominator = np.abs(1 + below @ q)
        weight = np.maximum(weight * (error / error.max() + 1e-12), 1e-14 * weight.max())
        weight /= weight.max()
    return best


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.float32) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(F32)  # product exact in float64: one visible rounding, nearly always


def horner(x: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    y = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = fma(y, x, c)
    return y


def eval_log(a: np.ndarray, p: np.ndarray) -> np.ndarray:
    a = np.minimum(a, F32(1.1e38))
    u = (F32(1) + a).view(np.int32)
    s = ((np.int32(0x7F2AAAAB) - u) & np.int32(-0x800000)).view(F32)
    f = fma(a, s, s - F32(1))
    minus_k = (s.view(np.int32) >> 23) - np.int32(127)
    return fma(minus_k.astype(F32), F32(-np.log(2)), fma(f * f, horner(f, p), f))


def eval_tanh(t: np.ndarray, q: np.ndarray) -> np.ndarray:
    z = np.minimum(t * F32(2), F32(TANH_LIMIT))
    n = np.round(z * F32(1 / np.log(2)))
    r = fma(n, F32(-np.log(2)), z)
    p = fma(r * r, horner(r, q), r)
    s = ((n.astype(np.int32) + 127) << 23).view(F32)
    e = fma(s, p, s - F32(1))
    return e / (e + F32(2))


def eval_near_log(a: np.ndarray, p: np.ndarray, *, q: np.ndarray) -> np.ndarray:
    return fma(a * a, horner(a, p) / horner(a, q), a)


def eval_near_tanh(t: np.ndarray, p: np.ndarray, *, q: np.ndarray) -> np.ndarray:
    return fma(t * (t * t), horner(t * t, p) / horner(t * t, q), t)


def worst_ulp(found: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    error = np.abs(found.astype(np.float64) - exact.astype(np.float64)) / np.spacing(exact.astype(F32)).astype(
        np.float64
    )
    return float(error.max()), float(np.sqrt((error**2).mean()))


def near_forms() -> None:
    """Print the coefficients of the near forms and their errors."""
    for use, log, tanh in zip(("float32", "half precision"), NEAR_LOG, NEAR_TANH, strict=True):
        for name, fitted, limit in (
            ("near log1p", fit_quotient(lambda u: np.log1p(u) / u, log[0], degrees=log[1:]), log[0]),
            (
                "near tanh",
                fit_quotient(lambda u: np.tanh(np.sqrt(u)) / np.sqrt(u), tanh[0] ** 2, degrees=tanh[1:]),
                tanh[0],
            ),
        ):
            p, q = (c.astype(F32) for c in fitted)
            for letter, coefficients in (("P", p), ("Q", q)):
                print(use, name, letter, ", ".join(f"{float(c).hex()}F" for c in coefficients))
            values = np.linspace(1e-6, limit, 4_000_001).astype(F32)
            exact, evaluate = (np.log1p, eval_near_log) if "log" in name else (np.tanh, eval_near_tanh)
            error = worst_ulp(evaluate(values, p, q=q), exact(values.astype(np.longdouble)))
            print("{}, {}: worst {:.2f} ulp, rms {:.2f}".format(use, name, *error))


def main() -> None:
    near_forms()
    bits = np.linspace(0x00000001, 0x7E9FFFFF, 6_000_001).astype(np.uint32)
    every = bits.view(F32)
    dense = np.linspace(1e-3, 12, 4_000_001).astype(F32)
    for use, log_degree, exp_degree in zip(("float32", "half precision"), LOG_DEGREES, EXP_DEGREES, strict=True):
        p = fit_log(log_degree).astype(F32)
        q = fit_exp(exp_degree).astype(F32)
        for name, coefficients in (("log1p P", p), ("expm1 Q", q)):
            print(use, name, ", ".join(f"{float(c).hex()}F" for c in coefficients))
        for label, values in (("all magnitudes", every), ("0.001 to 12", dense)):
            exact = values.astype(np.longdouble)
            print(label, "log1p: worst {:.2f} ulp, rms {:.2f}".format(*worst_ulp(eval_log(values, p), np.log1p(exact))))
            print(label, "tanh:  worst {:.2f} ulp, rms {:.2f}".format(*worst_ulp(eval_tanh(values, q), np.tanh(exact))))


if __name__ == "__main__":
    main()
