"""Norms that `identify` must recognise, and norms that it must name as something else.

Targets: for S, L and T in each of the four conventions, lambda 0.5 to 16, epsilon 0 to 1e-3, 8 to 4096 features,
float32 and float64: the right kind, lambda and epsilon to 6 digits, and a residual of at most 1e-11; a replacement that
agrees with the norm to 1e-12; every norm outside the family named as what it is; a model with 50 norms of width 4096 in
at most 60 s of processor time. The norms are in tests/support/stranger_norms.py, and share no code with the package.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export.op.identification.norms import identify, identify_norms
from tests.support.stranger_norms import F_OF_R, MEMBERS, OTHERS, Written, canonical, made

KINDS = ("S", "L", "T")
LAMBDAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
EPSILONS = (0.0, 1e-8, 1e-6, 1e-5, 1e-3)
FEATURES = (8, 65, 768, 4096)
DTYPES = (torch.float32, torch.float64)
#: Lambdas and epsilons of norms with more than 8 features, which take longer.
WIDE = ((0.5, 1e-3), (4.0, 1e-5), (16.0, 0.0))

MAX_RESIDUAL = 1e-11
MAX_REPLACEMENT = 1e-12
DIGITS = 1e-6
MIN_OTHERS = 20
MAX_SECONDS = 60.0


@dataclass
class Tally:
    """The worst of a group of norms."""

    norms: int = 0
    wrong: int = 0
    residual: float = 0.0
    replacement: float = 0.0
    error: float = 0.0


class IBNorm(Written):
    """One norm of the wide model."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, g="L", lam=4.0, eps=1e-5)


def _relative(found: float | None, expected: float) -> float:
    if found is None:
        return float("inf")
    return abs(found - expected) / expected if expected else abs(found)


def _difference(norm: nn.Module, replacement: nn.Module, features: int) -> float:
    x = torch.randn(8, features, dtype=torch.float64, generator=torch.Generator().manual_seed(features)) * 3 + 1
    with torch.no_grad():
        expected, got = copy.deepcopy(norm).double()(x), copy.deepcopy(replacement).double()(x)
    return float((got - expected).norm() / expected.norm())


def _add(tally: Tally, norm: Written, *, features: int) -> None:
    expected = canonical(norm.g, norm.lam, norm.eps, norm.convention)
    found = identify(norm, shape=(2, features))
    errors = [_relative(found.lambd, expected[0]), _relative(found.epsilon, expected[1])]
    off = _difference(norm, found.replacement(), features) if found else float("inf")
    right = bool(found) and found.kind == norm.g and max(errors) <= DIGITS
    tally.norms += 1
    tally.wrong += not right
    tally.error = max(tally.error, *errors)
    tally.residual = max(tally.residual, found.residual)
    tally.replacement = max(tally.replacement, off)


def _table(report: Report, features: tuple[int, ...]) -> None:
    """One row for each width, kind and convention."""
    for size, kind, convention in itertools.product(features, KINDS, F_OF_R):
        tally = Tally()
        pairs = WIDE if size > 8 else tuple(itertools.product(LAMBDAS, EPSILONS))
        for (lambd, epsilon), dtype in itertools.product(pairs, DTYPES):
            torch.manual_seed(size)
            norm = Written(size, g=kind, lam=lambd, eps=epsilon, convention=convention).to(dtype)
            _add(tally, norm, features=size)
        figures = {
            "norms": Figure(tally.norms),
            "wrong": Figure(tally.wrong),
            "error of lambda and epsilon": Figure(tally.error),
            "residual": Figure(tally.residual),
            "replacement": Figure(tally.replacement),
        }
        targets = (Target("wrong", 0), Target("residual", MAX_RESIDUAL), Target("replacement", MAX_REPLACEMENT))
        report.add(Row(f"{kind}, {convention}, {size} features", figures, targets=targets))


def _members(report: Report) -> None:
    for name, case in MEMBERS.items():
        found = identify(case.build(), shape=case.shape)
        errors = (_relative(found.lambd, case.lambd), _relative(found.epsilon, case.epsilon))
        figures = {
            "wrong": Figure(int(found.kind != case.kind or max(errors) > DIGITS)),
            "residual": Figure(found.residual),
        }
        targets = (Target("wrong", 0), Target("residual", MAX_RESIDUAL))
        report.add(Row(f"member: {name}", figures, targets=targets, note=", ".join(found.parameters.values())))


def _others(report: Report) -> None:
    missed = 0
    for name, case in OTHERS.items():
        found = identify(made(case.forward)(), shape=case.shape)
        wrong = bool(found) or case.words not in found.difference
        missed += wrong
        figures = {"taken for a member or unnamed": Figure(int(wrong)), "residual": Figure(found.residual)}
        targets = (Target("taken for a member or unnamed", 0),)
        report.add(Row(f"other: {name}", figures, targets=targets, note=found.difference))
    figures = {"norms": Figure(len(OTHERS)), "missed": Figure(missed)}
    targets = (Target("norms", MIN_OTHERS, at_least=True), Target("missed", 0))
    report.add(Row("all norms outside the family", figures, targets=targets))


def _wide_model(report: Report) -> None:
    net = nn.Sequential(*[IBNorm(4096) for _ in range(50)])
    start = time.process_time()
    found = identify_norms(net, run=lambda: net(torch.randn(2, 16, 4096)))
    seconds = time.process_time() - start
    figures = {
        "processor time": Figure(round(seconds, 1), "s"),
        "members": Figure(len(found.members)),
    }
    targets = (Target("processor time", MAX_SECONDS), Target("members", 50, at_least=True))
    report.add(Row("50 norms of width 4096", figures, targets=targets))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", type=int, nargs="+", default=list(FEATURES), help="Widths (%(default)s).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Identify every norm of the table, members in other forms, norms outside the family, and a wide model."""
    identify(Written(8, g="L", lam=4.0, eps=1e-5))  # imports what PyTorch imports late
    _table(report, tuple(options.features))
    _members(report)
    _others(report)
    _wide_model(report)
