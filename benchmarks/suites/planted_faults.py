"""Regenerate the tables of planted faults and of false alarms.

Bars: every fault fails, named (at least 20 kinds, 15 by the numeric verdict alone); of the right
exports none fails. Exit status 1 where a bar is missed.

    python -m benchmarks.suites.planted_faults --json --record benchmarks/results/planted_faults.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from ibnorm_export.environment import environment
from tests.verifier.faults.planted import FAULTS, bases, correct, false_alarm, judge, row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--correct", type=int, default=200, help="right exports to verify [200]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--record", type=Path, help="write the JSON here")
    arguments = parser.parse_args()
    start = time.perf_counter()
    outcomes, alarms = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = bases(folder)
        for fault in FAULTS:
            outcomes.append(judge(fault, files[fault.base], folder))
            print(f"{outcomes[-1].failed and outcomes[-1].named!s:5} {fault.name}", file=sys.stderr, flush=True)
        for index in range(arguments.correct):
            case = correct(index)
            if said := false_alarm(case, folder):
                alarms.append({**row(case), "said": said})
            print(f"\r{index + 1} right exports, {len(alarms)} false alarms", end="", file=sys.stderr, flush=True)
    found = sum(outcome.failed and outcome.named for outcome in outcomes)
    alone = sum(outcome.numeric_only for outcome in outcomes)
    good = found == len(FAULTS) >= 20 and alone >= 15 and not alarms
    result = {
        "verdict": "pass" if good else "fail",
        "faults": len(FAULTS),
        "found_and_named": found,
        "numeric_alone": alone,
        "outcomes": [row(outcome) for outcome in outcomes],
        "right_exports": arguments.correct,
        "false_alarms": alarms,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
    }
    text = json.dumps(result, indent=1)
    if arguments.record is not None:
        arguments.record.write_text(f"{text}\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        for o in outcomes:
            print(f"{o.name}\n  static: {o.static or '-'}\n  numeric: {o.numeric or '-'}\n  link: {o.link or '-'}")
        print(f"{found} of {len(FAULTS)} found and named, {alone} by the numeric verdict alone")
        print(f"{arguments.correct} right exports, {len(alarms)} false alarms")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
