"""Outcomes of a long measurement in a file, from which an interrupted one continues. Processes can share the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Outcomes"]

#: One JSON object a line.
_FILE = "outcomes.jsonl"


class Outcomes:
    """The outcomes in a folder.

    Args:
        folder: the folder, which exists.
        key: names of the entries that say what was measured. The last outcome of each counts.
    """

    def __init__(self, folder: Path, *, key: tuple[str, ...]) -> None:
        self._file = folder / _FILE
        self._key = key

    def add(self, outcome: dict[str, Any]) -> None:
        """Write an outcome at once."""
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(outcome) + "\n")

    def read(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return what is known so far, also from other processes, by the values of the key."""
        if not self._file.is_file():
            return {}
        found = (json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines())
        return {tuple(outcome[name] for name in self._key): outcome for outcome in found}
