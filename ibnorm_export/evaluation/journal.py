"""The results of each sample on disk: what a stopped run goes on from, and what keeps a model from running twice.

A journal is a text file. Its first line states what the results belong to: candidate, data and settings, each by hash.
Every further line is one sample. A journal of anything else is refused.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import numpy as np

from ibnorm_export.errors import IBNormError, quoted, shortened
from ibnorm_export.evaluation.samples import PerSampleResult, ResultTable
from ibnorm_export.files import lock_file, sha256_of
from ibnorm_export.parsing import parse_json

__all__ = ["Journal"]

_FORMAT: Final = 1

#: What each entry of the first line is, for the message about another one.
_ENTRIES: Final = {
    "format": "another version of this package",
    "candidate": "another checkpoint, file or runtime",
    "data": "other data",
    "settings": "other settings",
}


class Journal:
    """The results of one candidate.

    Args:
        folder: where the journal is; created if missing.
        name: name of the candidate.
        key: what the results belong to: hashes by "candidate", "data" and "settings".
        columns: names of the numbers of each result.

    Raises:
        IBNormError: the folder cannot be written, or the file there has results of something else.
    """

    def __init__(self, folder: Path, name: str, *, key: Mapping[str, str], columns: Sequence[str]) -> None:
        self.head: dict[str, str] = {"format": str(_FORMAT), **key}
        self.columns = tuple(columns)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "candidate"
        own = {**self.head, **({} if plain == name else {"name": name})}  # two names may look alike in a file name
        short = sha256_of(json.dumps(own, sort_keys=True).encode())[:12]
        self.path = folder / f"{plain}-{short}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.done = self._open()
        except OSError as error:
            raise IBNormError(
                f"cannot write {self.path}: {error.strerror or error}; name another folder with --results"
            ) from error
        self.found = self.done
        """Number of results that an earlier run had left."""

    def _open(self) -> int:
        """Check the first line, cut off a line that an interrupted run left unfinished, and count the results."""
        self._lock: IO[bytes] | None = None
        lines, whole = self._whole_lines()
        self._size = whole
        if lines and whole == self.path.stat().st_size:
            return lines - 1
        self._take()
        os.truncate(self.path, whole)
        if lines:
            return lines - 1
        self.path.write_text(f"{json.dumps(self.head)}\n", encoding="utf-8")
        self._size = self.path.stat().st_size
        return 0

    def _whole_lines(self) -> tuple[int, int]:
        """Number and bytes of the lines that end."""
        lines = whole = 0
        if self.path.exists():
            with self.path.open("rb") as stream:
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    if lines == 0:
                        self._check_head(line)
                    lines += 1
                    whole += len(line)
        return lines, whole

    def _take(self) -> None:
        """Make sure that no other run writes here, before this one does.

        Raises:
            IBNormError: another one does, or has since this one read the file.
        """
        if self._lock is not None:
            return
        stream = self.path.open("ab")
        try:
            lock_file(stream)
        except BlockingIOError as error:
            stream.close()
            raise IBNormError(
                f"another evaluation is writing {self.path}; wait until it ends, or name another folder with --results"
            ) from error
        self._lock = stream
        if self._whole_lines()[1] != self._size:
            self.close()
            raise IBNormError(f"another evaluation has written to {self.path} meanwhile; start the command again")

    def close(self) -> None:
        """Let other runs write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_head(self, line: bytes) -> None:
        try:
            head = parse_json(line)
        except ValueError:
            head = None
        if not isinstance(head, dict):
            raise IBNormError(f"{self.path} is not a file of results; remove it, or name another folder with --results")
        for entry, text in _ENTRIES.items():
            if head.get(entry) != self.head[entry]:
                raise IBNormError(
                    f"{self.path} has results of {text} ({entry} {shortened(str(head.get(entry)), 16)}, not "
                    f"{shortened(self.head[entry], 16)}); remove it, or name another folder with --results"
                )

    def keep(self, count: int) -> None:
        """Forget all results after the first `count`."""
        if count >= self.done:
            return
        self._take()
        with self.path.open("rb") as stream:
            size = sum(len(next(stream)) for _ in range(count + 1))
        os.truncate(self.path, size)
        self.done = count
        self.found = min(self.found, count)

    def append(self, results: Sequence[PerSampleResult]) -> None:
        """Add results, all of a batch at once.

        Raises:
            IBNormError: the file cannot be written.
        """
        lines = [json.dumps([r.name, r.answer, list(r.values), r.unreadable], ensure_ascii=False) for r in results]
        try:
            self._take()
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise IBNormError(
                f"cannot write {self.path}: {error.strerror or error}; make room, or name another folder with "
                "--results. The same command goes on after the samples that were written"
            ) from error
        self.done += len(results)

    def results(self) -> Iterator[PerSampleResult]:
        """Yield the results in the order of the samples.

        Raises:
            IBNormError: a line is damaged.
        """
        with self.path.open(encoding="utf-8") as stream:
            next(stream)
            for number, line in enumerate(stream, 2):
                yield self._parsed(line, number)

    def _parsed(self, line: str, number: int) -> PerSampleResult:
        try:
            name, answer, values, unreadable = parse_json(line)
            numbers = tuple(float(value) for value in values)
            if len(numbers) != (0 if unreadable else len(self.columns)):
                raise ValueError
            return PerSampleResult(str(name), str(answer), values=numbers, unreadable=str(unreadable))
        except (ValueError, TypeError) as error:
            raise IBNormError(
                f"{self.path}: line {number} is damaged: {quoted(line)}; remove the file, and the results are computed "
                "again"
            ) from error

    def table(self) -> ResultTable:
        """The numbers of all readable samples, 8 bytes each."""
        columns = [array("d") for _ in self.columns]
        for result in self.results():
            if not result.unreadable:
                for column, value in zip(columns, result.values, strict=True):
                    column.append(value)
        values = {name: np.frombuffer(column) for name, column in zip(self.columns, columns, strict=True)}
        return ResultTable(values)

    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """Name and reason of every sample that could not be read."""
        return tuple((result.name, result.unreadable) for result in self.results() if result.unreadable)
