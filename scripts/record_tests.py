#!/usr/bin/env python3
"""Record how long a test suite took and how many tests passed.

    python scripts/record_tests.py LABEL JUNIT_XML [--processor-seconds S] [--processor TEXT] [--note TEXT]

The entry LABEL of benchmarks/results/test_suite.json is replaced. The Makefile's targets leave the JUnit files in
build/test-results.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from ibnorm_export.environment import environment

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "test_suite.json"


def summary(junit: Path) -> dict[str, Any]:
    """Seconds and counts of the test runs in a JUnit file."""
    suites = list(ElementTree.parse(junit).iter("testsuite"))
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    return {
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites), 1),
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Record a test run in benchmarks/results/test_suite.json.")
    parser.add_argument("label", help="name of the entry, e.g. core or qemu-Haswell")
    parser.add_argument("junit", type=Path, help="what pytest --junit-xml wrote")
    parser.add_argument("--processor-seconds", type=float, help="user and system time of the run with its children")
    parser.add_argument("--processor", help="what the tests saw, if instruction sets were hidden from them")
    parser.add_argument("--note", help="what else a reader must know, e.g. the load of the machine")
    arguments = parser.parse_args()
    recorded = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"benchmark": "test_suite"}
    entry = summary(arguments.junit)
    if arguments.processor_seconds is not None:
        entry["processor_seconds"] = round(arguments.processor_seconds, 1)
    if arguments.note:
        entry["note"] = arguments.note
    about = environment()
    if arguments.processor:
        about["processor"] = f"{about['processor']}, {arguments.processor}"
    recorded.setdefault("runs", {})[arguments.label] = {**entry, "environment": about}
    RESULTS.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    print(f"{arguments.label}: {entry}")


if __name__ == "__main__":
    main()
