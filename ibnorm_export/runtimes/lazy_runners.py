"""Runners of one file, of which one is open at a time: a session holds the weights once or twice over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.runtimes.runner import Runner

__all__ = ["Corners"]


class _Corner:
    """Opens itself where it is closed."""

    def __init__(self, corners: Corners, norms: str) -> None:
        self._corners = corners
        self._norms = norms

    @property
    def name(self) -> str:
        return self._corners.open(self._norms).name

    def run(self, inputs: Arrays) -> Arrays:
        return self._corners.open(self._norms).run(inputs)


class Corners(Mapping[str, Runner]):
    """Runners by how the norms run. One that is looked up is open, and every other one is closed.

    Args:
        makers: what opens each of them, and raises where it cannot be opened.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Runner]]) -> None:
        self._makers = makers
        self._open: tuple[str, Runner] | None = None

    def open(self, norms: str) -> Runner:
        """The runner itself; whoever keeps it keeps it open."""
        if self._open is None or self._open[0] != norms:
            self.close()
            self._open = (norms, self._makers[norms]())
        return self._open[1]

    def close(self) -> None:
        """Close the one that is open."""
        self._open = None

    def __getitem__(self, norms: str) -> Runner:
        self.open(norms)
        return _Corner(self, norms)

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
