"""Several runners of one file. Each session holds the weights in memory, so those of a large file are open in turn."""

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
    """Runners by key, each opened when it is looked up.

    Args:
        openers: for each key, a function that opens the runner or raises an error.
        together: whether runners stay open beside each other, as those of a small file may. If not, looking one up
            closes the one that was open.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Runner]], *, together: bool = False) -> None:
        self._openers = openers
        self._together = together
        self._open: dict[str, Runner] = {}

    def open(self, key: str) -> Runner:
        """Return the runner of `key` itself; a caller that keeps a reference keeps it open."""
        if key not in self._open:
            if not self._together:
                self.close()
            self._open[key] = self._openers[key]()
        return self._open[key]

    def put(self, key: str, runner: Runner) -> None:
        """Take over a runner that is open already."""
        self.make_room()
        self._open[key] = runner

    def make_room(self) -> None:
        """Close the open runners for something else that holds the weights, unless the file is small."""
        if not self._together:
            self.close()

    def close(self) -> None:
        """Close the open runners."""
        self._open.clear()

    def __getitem__(self, key: str) -> Runner:
        self.open(key)
        return _LazyRunner(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)
