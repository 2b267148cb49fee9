"""One row of a benchmark: figures with units, and the targets that they must meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

__all__ = ["Figure", "Row", "Target", "Unavailable", "limited"]


class Unavailable(RuntimeError):
    """This machine lacks what a suite needs; the message names it and explains where to get it."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value; a ratio or a count has no unit."""

    value: float
    unit: str = ""

    def __str__(self) -> str:
        number = f"{self.value:.0f}" if float(self.value).is_integer() else f"{self.value:.3g}"
        return f"{number} {self.unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Target:
    """A limit on one figure of a row.

    Args:
        figure: name of the figure.
        limit: the largest value that meets the target, or the smallest.
        at_least: `limit` is the smallest.
        alternative: another target that is enough if this one is missed.
    """

    figure: str
    limit: float
    _: KW_ONLY
    at_least: bool = False
    alternative: Target | None = None

    def is_met(self, figures: Mapping[str, Figure]) -> bool:
        value = figures[self.figure].value
        if value >= self.limit if self.at_least else value <= self.limit:
            return True
        return self.alternative is not None and self.alternative.is_met(figures)

    def __str__(self) -> str:
        own = f"{self.figure} at {'least' if self.at_least else 'most'} {self.limit:g}"
        return own if self.alternative is None else f"{own}, or {self.alternative}"


@dataclass(frozen=True, slots=True)
class Row:
    """One case of a suite.

    Args:
        name: the case, unique within the suite.
        figures: what was measured, by name.
        targets: all of them must be met; a row without targets only informs.
        details: anything else worth recording, as JSON values.
        note: one line for readers.
    """

    name: str
    figures: Mapping[str, Figure]
    _: KW_ONLY
    targets: tuple[Target, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the row meets its targets; None without targets."""
        return all(target.is_met(self.figures) for target in self.targets) if self.targets else None

    def __str__(self) -> str:
        verdict = {True: "met   ", False: "MISSED", None: "      "}[self.met]
        figures = ", ".join(f"{name} {figure}" for name, figure in self.figures.items())
        targets = "".join(f" ({target})" for target in self.targets)
        return f"{verdict} {self.name}: {'; '.join(filter(None, (figures + targets, self.note)))}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "figures": {name: {"value": f.value, "unit": f.unit} for name, f in self.figures.items()},
            "targets": [str(target) for target in self.targets],
            "met": self.met,
            "note": self.note,
            "details": dict(self.details),
        }


def limited(name: str, value: float, *, at_most: float | None = None, at_least: float | None = None, note: str) -> Row:
    """A row with one figure and one target, which is either `at_most` or `at_least`."""
    if (at_most is None) == (at_least is None):
        raise ValueError("give one of at_most and at_least")
    target = Target("value", at_most) if at_most is not None else Target("value", at_least or 0.0, at_least=True)
    return Row(name, {"value": Figure(value)}, targets=(target,), note=note)
