"""How long tasks report their progress: the library calls a function, and the caller decides what to show."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

#: Called with the name of the current step, the number of steps done, and their total; 0 if that is unknown.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
