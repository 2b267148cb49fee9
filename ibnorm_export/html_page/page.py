"""A self-contained HTML page: it loads nothing, its script sorts and saves, and equal data gives equal bytes."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup, escape

from ibnorm_export.errors import IBNormError, printable, shortened
from ibnorm_export.files import Kind, new_file
from ibnorm_export.json_text import json_text

__all__ = ["PAGE", "Section", "State", "Verdict", "render"]

#: The pages of this package, of which a later one may take the place.
PAGE: Final = Kind.marked("a page of ibnorm-export", b'<meta name="generator" content="ibnorm-export">')

#: Characters of a cell or paragraph of the page.
_CELL_LIMIT: Final = 2000


class State(enum.StrEnum):
    """The verdict of a page."""

    PASS = "pass"
    FAIL = "fail"
    CANNOT_TELL = "cannot tell"


#: The style of each state, and its sign, so that colour is not all that tells them apart.
_TONES: Final = {"PASS": "pass", "FAIL": "fail", "CANNOT_TELL": "unsure"}
_ICONS: Final = {"PASS": "✓", "FAIL": "✗", "CANNOT_TELL": "?"}

#: Words that a cell shows in colour.
_MARKS: Final = {
    "pass": "pass",
    "yes": "pass",
    "fail": "fail",
    "verification fails": "fail",
    "error": "fail",
    "responsible": "fail",
    "cannot tell": "unsure",
    "not run": "unsure",
    "skipped": "",
}

#: A cell with a number, perhaps with a unit.
_NUMBER: Final = re.compile(
    r"[-+]?(\d[\d,]*(\.\d*)?(e[-+]?\d+)?|inf|nan)( ± [\d.]+)? ?(%|ms|s|MB|KB|GB|bits|times|tokens|samples)?"
)


#: What a browser would break at a hyphen.
_WHOLE: Final = re.compile(r"((?<![\w.])-?\d[\d.]*e-\d+|(?<![\w-])(?:--?[a-z][a-z-]{,20}|ibnorm-export)(?![\w-]))")

#: A name that may be too long for its column, and the places where it is broken: after a dot, an underscore or a slash.
_NAME: Final = re.compile(r"[\w./-]{16,}")
_JOINT: Final = re.compile(r"(?<=\w)[._/](?=\w)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a page states first.

    Args:
        state: pass, fail or cannot tell.
        summary: the verdict in a sentence.
        reasons: what failed and why, the most important first.
        next_steps: what to do; text between backticks is shown as code.
    """

    state: State
    summary: str
    _: KW_ONLY
    reasons: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: a heading, paragraphs, plots with captions, and one table."""

    title: str
    text: tuple[str, ...] = ()
    _: KW_ONLY
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    plots: tuple[tuple[Markup, str], ...] = ()


def _shown(value: object) -> object:
    """A text as the page shows it: readable and not too long; markup as it is."""
    return value if isinstance(value, Markup) else shortened(printable(str(value)), _CELL_LIMIT)


def _code(text: str) -> Markup:
    """A text whose parts between backticks are shown as code."""
    parts = str(_shown(text)).split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner is text
        return _unbroken("`".join(parts))
    return Markup("").join(
        Markup("<code>{}</code>").format(_unbroken(part)) if index % 2 else _unbroken(part)
        for index, part in enumerate(parts)
    )


def _unbroken(text: str) -> Markup:
    """A text in which no line ends inside a number such as 1e-06, an option such as --layers or a part of a name."""
    parts = _WHOLE.split(text)
    return Markup("").join(
        Markup('<span class="whole">{}</span>').format(part) if index % 2 else _jointed(part)
        for index, part in enumerate(parts)
    )


def _jointed(text: str) -> Markup:
    """A text whose long names, such as model.layers.0.input_layernorm, are broken between their parts."""
    return Markup(_NAME.sub(lambda name: _JOINT.sub(r"\g<0><wbr>", name[0]), str(escape(text))))  # escaped before


def _mark(text: str) -> Markup:
    """A cell; a verdict is shown in its colour."""
    tone = _MARKS.get(text.lower())
    return _code(text) if tone is None else Markup('<span class="mark {}">{}</span>').format(tone, text)


def _column_kinds(section: Section) -> list[str]:
    """How each column is set: "num" (right), "long" (room to wrap) or "name"."""
    kinds = []
    for cells in zip(*section.rows, strict=True):
        filled = [cell for cell in cells if cell]
        if filled and all(_NUMBER.fullmatch(cell) for cell in filled):
            kinds.append("num")
        else:
            kinds.append("long" if max(map(len, cells)) > 40 else "name")
    return kinds


def _resource(name: str) -> Markup:
    # trusted: a file of this package
    return Markup((files("ibnorm_export.html_page") / name).read_text(encoding="utf-8"))


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, keep_trailing_newline=True
    )
    filters = {"code": _code, "mark": _mark, "column_kinds": _column_kinds}
    made.filters.update(filters, tone=_TONES.__getitem__, icon=_ICONS.__getitem__)
    return made


def _embedded(data: Mapping[str, Any] | None) -> Markup:
    """The report as JSON inside a script element, which only `</` or `<!--` could leave."""
    return Markup("") if data is None else Markup(json_text(data, indent=1).replace("<", "\\u003c"))


def render(
    path: str | Path,
    title: str,
    *,
    verdict: Verdict | None,
    sections: Sequence[Section],
    environment: Mapping[str, Any],
    summary: str = "",
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        title: the heading of the page.
        verdict: what the page states first; None for a page that judges nothing.
        sections: the parts of the page.
        environment: what the footer shows.
        summary: the paragraph after the verdict.
        data: what the page saves as JSON; None offers nothing.

    Raises:
        IBNormError: the file cannot be written.
    """
    flat = {
        k: ", ".join(f"{n} {v}" for n, v in x.items()) if isinstance(x, Mapping) else x for k, x in environment.items()
    }
    text = (
        _environment()
        .from_string(_resource("page.html.jinja"))
        .render(
            title=title,
            verdict=verdict,
            summary=summary,
            sections=sections,
            environment=flat,
            data=_embedded(data),
            css=_resource("page.css"),
            js=_resource("page.js"),
        )
    )
    path = Path(path)
    with new_file(path, IBNormError, kind=PAGE) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
    return path
