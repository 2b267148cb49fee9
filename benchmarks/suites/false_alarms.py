"""Right exports that verification must pass: 340 of all families, forms and dtypes, and 60 with hostile weights.

The ones after these are unusual: further architectures, code of users, opsets, sizes and settings.

Each export has a number. Its outcome is written to a file as soon as it is known, so an interrupted run continues where
it stopped, and several processes can share the work through `--folder`, which keeps exports and outcomes. An older
processor, e.g. `python -m tests.processors.run avx2 python -m benchmarks.run false_alarms --processor "AVX2"`, needs a
folder of its own: PyTorch's random weights differ in their last bits from processor to processor.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.outcomes import Outcomes
from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export.errors import IBNormError
from tests.verifier.faults.right_exports import EXPORTS, alarms, right_export
from tests.verifier.faults.unusual_exports import UNUSUAL, unusual_alarms

#: How many exports there are; the unusual ones have the last numbers.
_ALL = EXPORTS + len(UNUSUAL)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--folder", type=Path, help="Keep exports and outcomes here, and continue from them.")
    parser.add_argument("--exports", default=f"0:{_ALL}:1", help="Numbers as START:STOP:STEP (%(default)s).")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Verify no further export after this time.")
    parser.add_argument("--processor", default="", help="Name of an emulated or masked processor for the record.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Export and verify each model, then count the alarms of each group."""
    processor = options.processor or _processor()
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = Outcomes(folder, key=("processor", "number"))
        done = {number for where, number in outcomes.read() if where == processor}
        end = time.monotonic() + 60.0 * options.minutes
        for number in range(*map(int, options.exports.split(":"))):
            if number not in done and time.monotonic() < end:
                outcomes.add({"processor": processor, **_try(number, folder / f"{number:03}")})
        known = outcomes.read()
    counts = Counter(where for where, _ in known)
    report.facts["verified"] = {where: f"{count} of {_ALL} exports" for where, count in sorted(counts.items())}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for (where, number), outcome in sorted(known.items(), key=lambda item: item[0][1]):
        groups[where, _kind(number)].append(outcome)
    for (where, kind), judged in sorted(groups.items()):
        report.add(_row(f"{kind}, {where}", judged))


def _kind(number: int) -> str:
    """The row of an export in the record."""
    if number >= EXPORTS:
        return "unusual exports"
    case = right_export(number)
    return "hostile weights" if case.hostile else f"{case.family} {case.form}"


def _processor() -> str:
    """The name of this processor, with its widest instruction set."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    widest = next((name for flag, name in (("avx512f", "AVX-512"), (" avx2", "AVX2")) if flag in text), "")
    return widest or platform.machine()


def _try(number: int, folder: Path) -> dict[str, Any]:
    """Export and verify one model."""
    start = time.perf_counter()
    name = str(right_export(number)) if number < EXPORTS else f"{number} {UNUSUAL[number - EXPORTS].name}"
    try:
        if number < EXPORTS:
            found, unfit = alarms(right_export(number), folder)
        else:
            found, unfit = unusual_alarms(UNUSUAL[number - EXPORTS], folder)
    except IBNormError as error:  # a refusal of a right file is an alarm too
        found, unfit = (f"{type(error).__name__}: {error}",), False
    return {
        "number": number,
        "case": name,
        "alarms": [alarm[:300] for alarm in found[:3]],
        "unfit": unfit,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _row(name: str, outcomes: list[dict[str, Any]]) -> Row:
    wrong = [outcome for outcome in outcomes if outcome["alarms"]]
    unfit = [outcome["case"] for outcome in outcomes if outcome["unfit"]]
    figures = {
        "false alarms": Figure(len(wrong)),
        "exports": Figure(len(outcomes)),
        "unfit for their dtype": Figure(len(unfit)),
    }
    details = {"alarms": wrong, "unfit": unfit, "exports": [outcome["case"] for outcome in outcomes]}
    return Row(name, figures, targets=(Target("false alarms", 0),), details=details)
