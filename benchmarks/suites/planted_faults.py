"""Faults that verification must find, and correct exports that it must pass.

Targets: every planted fault fails and is named (at least 20 kinds, 15 of them by the numeric verdict without the static
one), and no correct export fails.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export.artifacts.tensors import DType
from tests.verifier.faults.hostile import HOSTILE, hostile_alarm
from tests.verifier.faults.planted import FAULTS, bases, correct, false_alarm, judge, row

MIN_FAULTS = 20
MIN_FOUND_NUMERICALLY = 15


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--correct", type=int, default=200, help="Correct exports to verify (%(default)s).")
    parser.add_argument("--hostile", type=int, default=2, help="Seeds of exports with hostile weights (%(default)s).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Plant every fault, then verify correct exports."""
    found_numerically = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = bases(folder)
        for fault in FAULTS:
            outcome = judge(fault, files[fault.base], folder)
            found_numerically += outcome.numeric_only
            figures = {"missed or unnamed": Figure(int(not (outcome.failed and outcome.named)))}
            report.add(Row(fault.name, figures, targets=(Target("missed or unnamed", 0),), details=row(outcome)))
        alarms = []
        for index in range(options.correct):
            case = correct(index)
            if message := false_alarm(case, folder):
                alarms.append({**row(case), "message": message})
    counts = {"faults": Figure(len(FAULTS)), "found by the numeric verdict": Figure(found_numerically)}
    targets = (
        Target("faults", MIN_FAULTS, at_least=True),
        Target("found by the numeric verdict", MIN_FOUND_NUMERICALLY, at_least=True),
    )
    report.add(Row("all faults", counts, targets=targets))
    figures = {"false alarms": Figure(len(alarms)), "exports": Figure(options.correct)}
    report.add(Row("correct exports", figures, targets=(Target("false alarms", 0),), details={"alarms": alarms}))
    for kind in HOSTILE:
        _add_hostile(report, kind, seeds=options.hostile)


def _add_hostile(report: Report, kind: str, *, seeds: int) -> None:
    """Verify right exports with one kind of hostile weights, in every dtype."""
    alarms, exports = [], 0
    with tempfile.TemporaryDirectory() as place:
        for family, dtype, seed in itertools.product(("llama", "vit"), DType, range(seeds)):
            exports += 1
            if messages := hostile_alarm(kind, family, dtype, folder=Path(place), seed=seed):
                alarms.append({"family": family, "dtype": dtype.value, "seed": seed, "message": messages[0]})
    figures = {"false alarms": Figure(len(alarms)), "exports": Figure(exports)}
    report.add(Row(f"hostile: {kind}", figures, targets=(Target("false alarms", 0),), details={"alarms": alarms}))
