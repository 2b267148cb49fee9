"""Damaged and hostile files for every reader, for a number of minutes, in a process with a memory limit.

A reader may accept a file or raise an error of this package. Anything else is a failure: another exception, exit code
70, a traceback, a crash, more memory than the limit, a case that takes too long, or a message of more than 1,000
characters or with control characters. Every case has a number, from which it is made again:
`python -m benchmarks.run fuzz --reader onnx --case 17`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.fuzzing.corpus import make_corpus
from benchmarks.fuzzing.readers import READERS
from benchmarks.fuzzing.worker import SHOW_THREADS
from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target

__all__ = ["add_options", "measure"]

#: Seconds without an answer after which a case hangs. The worker itself gives up after 30 s of processor time.
_SILENCE_S: Final = 120.0

#: Seconds that a process may take to start: it imports torch.
_START_S: Final = 600.0

#: Seconds that a process takes to end after it has closed its output.
_END_S: Final = 5.0

#: Seconds that a process takes to show what its threads do, and characters of it that are kept.
_SHOW_S: Final = 2.0
_SHOWN: Final = 6000

#: Failures of one reader after which it is left alone.
_ENOUGH: Final = 50


@dataclass
class _Found:
    """What one reader has shown so far."""

    next_case: int
    spent_s: float = 0.0
    cases: int = 0
    accepted: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)


class _Worker:
    """The process that reads; it is started again after a crash or a hang."""

    def __init__(self, corpus: Path, memory_mb: int) -> None:
        self._good = {corpus / reader.file: (corpus / reader.file).read_bytes() for reader in READERS.values()}
        self._command = [sys.executable, "-m", "benchmarks.fuzzing.worker", str(corpus), str(memory_mb)]
        self._errors = corpus / "standard-error"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process unless it runs, and wait until it has loaded what it needs."""
        if self._process is None:
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            _line_within(self._process, _START_S)

    def ask(self, reader: str, case: int) -> dict[str, Any]:
        """Run one case, and return what the worker reports; a worker that ends or hangs is a failure."""
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"reader": reader, "case": case}) + "\n")
            process.stdin.flush()
            line = _line_within(process, _SILENCE_S)
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        how, where = f"the process ended with {process.returncode}", ""
        if process.poll() is None:
            how, where = "it hangs", self._threads(process)
        self.stop()
        for file, content in self._good.items():  # the worker could not put back what it had damaged
            file.write_bytes(content)
        return {"failure": how, "where": where, "seconds": 0.0, "peak_mb": 0.0}

    def _threads(self, process: subprocess.Popen[str]) -> str:
        """What the threads of a process that hangs do."""
        before = self._errors.stat().st_size
        process.send_signal(SHOW_THREADS)
        time.sleep(_SHOW_S)
        return self._errors.read_bytes()[before:].decode(errors="replace")[:_SHOWN]

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _line_within(process: subprocess.Popen[str], seconds: float) -> str:
    """A line of the process's output; empty if it ends or says nothing for this long."""
    import select

    assert process.stdout is not None
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([process.stdout], [], [], 1.0)[0]:
            return process.stdout.readline()
    return ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--minutes", type=float, default=5.0, help="How long to go on.")
    parser.add_argument("--seed", type=int, default=0, help="Number of the first case of every reader.")
    parser.add_argument("--memory-mb", type=int, default=1024, help="Private memory of the process that reads.")
    parser.add_argument("--reader", choices=READERS, action="append", help="Only this one; may be repeated.")
    parser.add_argument("--case", type=int, help="Only this case, with its traceback.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Give each case to the reader that has had the least time, until the time is over."""
    readers = options.reader or list(READERS)
    first = options.seed if options.case is None else options.case
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name)
        make_corpus(corpus)
        worker = _Worker(corpus, options.memory_mb)
        found = {reader: _Found(first) for reader in readers}
        worker.start()
        end = time.monotonic() + (0.0 if options.case is not None else options.minutes * 60.0)
        while left := [reader for reader in readers if len(found[reader].failures) < _ENOUGH]:
            reader = min(left, key=lambda name: (found[name].cases > 0, found[name].spent_s))
            if found[reader].cases and time.monotonic() >= end:
                break
            worker.start()
            begin = time.monotonic()
            _note(found[reader], worker.ask(reader, found[reader].next_case))
            found[reader].spent_s += time.monotonic() - begin
        worker.stop()
    report.facts |= {"seed": options.seed, "minutes": options.minutes, "memory_mb": options.memory_mb}
    for reader, seen in found.items():
        report.add(_row(reader, seen, first=first))


def _note(seen: _Found, answer: dict[str, Any]) -> None:
    seen.accepted += bool(answer.get("accepted"))
    seen.seconds = max(seen.seconds, answer["seconds"])
    seen.peak_mb = max(seen.peak_mb, answer["peak_mb"])
    if answer.get("failure"):
        failure = {"case": seen.next_case, "failure": answer["failure"], "where": answer.get("where", "")}
        seen.failures.append(failure)
    seen.cases += 1
    seen.next_case += 1


def _row(reader: str, seen: _Found, *, first: int) -> Row:
    kinds = Counter(str(failure["failure"])[:100] for failure in seen.failures)
    figures = {
        "failures": Figure(len(seen.failures)),
        "cases": Figure(seen.cases),
        "accepted": Figure(seen.accepted),
        "slowest": Figure(seen.seconds, "s"),
        "peak": Figure(seen.peak_mb, "MB"),
    }
    details = {"first_case": first, "failures": seen.failures[:20]}
    note = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3))
    return Row(reader, figures, targets=(Target("failures", 0),), details=details, note=note)
