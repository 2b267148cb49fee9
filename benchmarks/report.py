"""What a suite has measured so far, and where it goes: lines, JSON, a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from benchmarks.rows import Row
from ibnorm_export.environment import environment

__all__ = ["Report"]


class Report:
    """What a suite has measured so far.

    Args:
        suite: its name.
        record: file to write, or None.
        lines: stream for one line about each row.
    """

    def __init__(self, suite: str, *, record: Path | None, lines: TextIO) -> None:
        self.suite = suite
        self.record = record
        self.rows: list[Row] = []
        #: Rows of an earlier record that stay in it, as JSON values.
        self.recorded: list[dict[str, Any]] = []
        #: Settings and limits that hold for all rows, as JSON values.
        self.facts: dict[str, Any] = {}
        self._lines = lines

    def add(self, row: Row) -> None:
        """Add a row and print its line."""
        self.rows.append(row)
        print(row, file=self._lines, flush=True)

    @property
    def met(self) -> bool:
        """Whether something was measured and no target was missed."""
        missed = any(row["met"] is False for row in self.recorded) or any(row.met is False for row in self.rows)
        return bool(self.rows) and not missed

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "suite": self.suite,
            "met": self.met,
            **self.facts,
            "rows": [*self.recorded, *(row.to_dict() for row in self.rows)],
            "environment": environment(),
        }

    def recorded_rows(self) -> list[dict[str, Any]]:
        """The rows that the record file already holds, in the format of any version."""
        if self.record is None or not self.record.is_file():
            return []
        rows: list[dict[str, Any]] = json.loads(self.record.read_text(encoding="utf-8"))["rows"]
        return rows

    def save(self) -> None:
        """Write the record file, if there is one; a long suite calls this after each row."""
        if self.record is not None:
            new = self.record.with_name(f"{self.record.name}.partial")
            new.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            new.replace(self.record)
