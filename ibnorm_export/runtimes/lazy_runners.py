"""Several runners of one file, only one of which is open at a time, since each session holds the weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.runtimes.runner import Runner

__all__ = ["LazyRunners"]


class _LazyRunner:
    """Opens its runner again if it has been closed since the last call."""

    def __init__(self, runners: LazyRunners, key: str) -> None:
        self._runners = runners
        self._key = key

    @property
    def name(self) -> str:
        return self._runners.open(self._key).name

    def run(self, inputs: Arrays) -> Arrays:
        return self._runners.open(self._key).run(inputs)


class LazyRunners(Mapping[str, Runner]):
    """Runners by key. Looking one up opens it and closes the one that was open before.

    Args:
        openers: for each key, a function that opens the runner or raises an error.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Runner]]) -> None:
        self._openers = openers
        self._current: tuple[str, Runner] | None = None

    def open(self, key: str) -> Runner:
        """Return the runner of `key` itself; a caller that keeps a reference keeps it open."""
        if self._current is None or self._current[0] != key:
            self.close()
            self._current = (key, self._openers[key]())
        return self._current[1]

    def close(self) -> None:
        """Close the open runner, if there is one."""
        self._current = None

    def __getitem__(self, key: str) -> Runner:
        self.open(key)
        return _LazyRunner(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)
