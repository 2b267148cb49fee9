"""How long work reports where it is: the library says it, the caller decides what to show."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

#: (what is being done, steps done, steps in all); 0 steps in all means "not known".
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
