"""What every report has in common: it is true or false, prints itself, and shows itself in a notebook."""

from __future__ import annotations

import contextlib
import html
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Final

from ibnorm_export.errors import printable, shortened

__all__ = ["Report", "counted", "ratio_text", "text_table", "text_width", "three_digits"]

#: Columns that a table may take; None sets no limit. It belongs to the caller's context, such as a thread.
_WIDTH: Final[ContextVar[int | None]] = ContextVar("columns that a table may take", default=None)


@contextlib.contextmanager
def text_width(columns: int | None) -> Iterator[None]:
    """Write the tables of reports for a page of some columns while the block runs: a wider one is stacked.

    Args:
        columns: columns of the page; None sets no limit.
    """
    before = _WIDTH.set(columns)
    try:
        yield
    finally:
        _WIDTH.reset(before)


class Report:
    """Base of the results of this package; a subclass defines `__bool__` and `__str__`.

    `str(report)` is the text that the command line prints.
    """

    __slots__ = ()

    @property
    def passed(self) -> bool:
        """Whether the report contains no failure."""
        return bool(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(printable(str(self)))}</pre>"


def counted(number: int, noun: str) -> str:
    """The number and the noun, e.g. "1 sample" or "2 samples"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def three_digits(value: float) -> str:
    """A number with three significant digits, and never with an exponent unless it is tiny."""
    rounded = float(f"{value:.3g}") if math.isfinite(value) else value
    if not math.isfinite(value) or 0.0 < abs(rounded) < 1e-4:
        return f"{value:.3g}"
    decimals = 2 - math.floor(math.log10(abs(rounded))) if rounded else 2
    return f"{rounded:.{max(decimals, 0)}f}"


def ratio_text(ratio: float) -> str:
    """A ratio of times; one below 0.1 or above 10 is followed by "N times faster" or "N times slower"."""
    if 0.0 < ratio < 0.1:
        return f"{three_digits(ratio)}, {three_digits(1.0 / ratio)} times faster"
    return f"{three_digits(ratio)}, {three_digits(ratio)} times slower" if ratio > 10.0 else three_digits(ratio)


def _cell(text: str) -> str:
    """A cell on one line: a name from a file could otherwise add lines to the output."""
    return shortened(printable(text).replace("\n", "\\n").replace("\t", "\\t"))


def text_table(title: str, columns: Sequence[str], *, rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, the first column aligned left and the others right.

    Args:
        title: the line above the table; none if it is empty.
        columns: the heading of each column.
        rows: cells, as many in each row as there are columns.

    Returns:
        Lines without trailing spaces, joined by newlines. A table that is wider than `text_width` is stacked: each row
        becomes a block with a line for each column, so that no cell is ever broken.
    """
    rows = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [title] if title else []
    limit = _WIDTH.get()
    if limit is not None and sum(widths) + 2 * (len(widths) - 1) > limit:
        column = max(map(len, columns))
        for row in rows:
            lines.append(f"{columns[0]} {row[0]}")
            lines += [
                f"  {name.ljust(column)}  {cell}" for name, cell in zip(columns[1:], row[1:], strict=True) if cell
            ]
        return "\n".join(lines)
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
