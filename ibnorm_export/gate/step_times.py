"""How long each step of a comparison took, read from its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from ibnorm_export.gate.case import Case
from ibnorm_export.progress import Progress

__all__ = ["StepTimes"]

_START: Final = "preparing"


class StepTimes:
    """Passes progress on, and adds up the seconds of each step until the next one begins.

    Args:
        progress: receives the progress.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._what = _START
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        self._add(what)
        self._progress(what, done, total)

    def _add(self, what: str) -> None:
        now = time.perf_counter()
        self._seconds[self._what] = self._seconds.get(self._what, 0.0) + now - self._since
        self._what, self._since = what, now

    def share(
        self, cases: Sequence[Case], *, of_case: Callable[[Case], str], of_step: Callable[[str], str]
    ) -> tuple[Case, ...]:
        """Give each case its part of the seconds so far, whose sum stays the same.

        Cases and steps of the same part of a comparison share the seconds of that part evenly, because one run decides
        them. What belongs to no part of a case, such as running PyTorch, is shared by all cases.

        Args:
            cases: the cases of one comparison.
            of_case, of_step: the part of the comparison that a case or a step belongs to; empty for none.
        """
        self._add(self._what)
        parts = [of_case(case) for case in cases]
        seconds: dict[str, float] = {}
        for step, value in self._seconds.items():
            part = of_step(step)
            seconds[part] = seconds.get(part, 0.0) + value
        rest = sum(value for part, value in seconds.items() if not part or part not in parts)
        own = [seconds.get(part, 0.0) / parts.count(part) if part else 0.0 for part in parts]
        return tuple(replace(case, seconds=one + rest / len(cases)) for case, one in zip(cases, own, strict=True))
