"""What the benchmarks have in common: a bar with its verdict, two options, and where a report goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ibnorm_export.environment import environment

__all__ = ["Row", "parser", "publish"]


@dataclass(frozen=True)
class Row:
    """One bar: true when it is met."""

    what: str
    value: float
    bar: float
    at_most: bool
    note: str

    def __bool__(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": "met" if self else "missed"}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with --json and --record; its description is the first line of `doc`."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--record", type=Path, help="write the JSON here too")
    return made


def publish(
    name: str, content: dict[str, Any], good: bool, lines: Iterable[object], options: argparse.Namespace
) -> int:
    """Write and print a report with its verdict and the environment; gives the exit status.

    Args:
        name: of the benchmark.
        content: what it measured; JSON.
        good: whether every bar is met.
        lines: the same for people, printed without --json.
        options: of `parser`.
    """
    report = {"benchmark": name, **content, "verdict": "met" if good else "missed", "environment": environment()}
    text = json.dumps(report, indent=2)
    if options.record:
        options.record.write_text(text + "\n", encoding="utf-8")
    print(text if options.json else "\n".join(map(str, lines)))
    return 0 if good else 1
