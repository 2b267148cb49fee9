"""Faults that verification must find: every kind, in every form that it is planted in.

The outcome of each is written to a file as soon as it is known, with the code that judged it, so an interrupted run
continues where it stopped, and several processes can share the work. A fault that is not found must be one that cannot
be seen: it has a reason, and its change of the output on further inputs is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from benchmarks.outcomes import Outcomes
from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export import verifier
from tests.verifier.faults.kind import Kind
from tests.verifier.faults.table import KINDS, cases, judge

#: The smallest number of kinds.
MIN_KINDS: Final = 120


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--folder", type=Path, help="Keep right files and outcomes here, and continue from them.")
    parser.add_argument("--part", default="0:1", help="Which part of the cases: INDEX:PARTS (%(default)s).")
    parser.add_argument("--only", default="", help="Judge only kinds whose group or name contains this text.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Judge no further fault after this time.")
    parser.add_argument("--again", action="store_true", help="Judge those again that were not found.")
    parser.add_argument("--stale", action="store_true", help="Judge those again that other code judged.")
    parser.add_argument("--first", action="store_true", help="Run a file only if reading it finds nothing.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Plant every fault in every form, and list what found it."""
    part, parts = map(int, options.part.split(":"))
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes, code = Outcomes(folder, key=("group", "kind", "form")), _code()
        known = outcomes.read()
        end = time.monotonic() + 60.0 * options.minutes
        for number, (kind, name) in enumerate(cases()):
            earlier = known.get((kind.group, kind.name, name))
            if time.monotonic() > end:
                break
            stale = options.stale and earlier and earlier.get("code") != code
            if options.only not in f"{kind.group}: {kind.name}":
                continue
            if number % parts != part or (earlier and not stale and (earlier["found"] or not options.again)):
                continue
            outcomes.add({**_judge(kind, name, folder, first=options.first), "code": code})
        known = outcomes.read()
    by_kind = defaultdict(list)
    for (group, kind_name, _), outcome in known.items():
        by_kind[group, kind_name].append(outcome)
    for kind in KINDS:
        if judged := by_kind.get((kind.group, kind.name), []):
            report.add(_row(kind, judged))
    all_cases = {(kind.group, kind.name, name) for kind, name in cases()}
    present = sum(key in all_cases and outcome.get("code") == code for key, outcome in known.items())
    report.facts["judged"] = f"{len(all_cases & known.keys())} of {len(all_cases)} faults"
    report.facts["judged by the present code"] = f"{present} of {len(all_cases)} faults"
    figures = {
        "kinds": Figure(len(by_kind)),
        "faults": Figure(sum(map(len, by_kind.values()))),
        "found": Figure(sum(bool(o["found"]) for group in by_kind.values() for o in group)),
    }
    report.add(Row("all faults", figures, targets=(Target("kinds", MIN_KINDS, at_least=True),)))


def _code() -> str:
    """What stands for the code that judges: a hash of the verifier's sources."""
    sources = sorted(Path(verifier.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def _judge(kind: Kind, name: str, folder: Path, *, first: bool) -> dict[str, Any]:
    start = time.perf_counter()
    outcome = judge(kind, name, folder, first=first)
    return {
        "group": kind.group,
        "kind": kind.name,
        "form": name,
        "found": list(outcome.found),
        "message": outcome.message,
        "change": outcome.change,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _row(kind: Kind, outcomes: list[dict[str, Any]]) -> Row:
    """One kind: the forms, and what found the fault in each."""
    missed = [o for o in outcomes if not o["found"] and not kind.cannot]
    details: dict[str, Any] = {
        "found by": {o["form"]: ", ".join(o["found"]) or "not found" for o in outcomes},
        "finding": next((o["message"] for o in outcomes if o["found"]), ""),
    }
    if unseen := [o for o in outcomes if not o["found"]]:
        details["error over its tolerance on further inputs"] = {o["form"]: o["change"] for o in unseen}
    figures = {"missed": Figure(len(missed)), "forms": Figure(len(outcomes))}
    note = f"cannot be seen: {kind.cannot}" if kind.cannot else ""
    name = f"{kind.group}: {kind.name}"
    return Row(name, figures, targets=(Target("missed", 0),), details=details, note=note)
