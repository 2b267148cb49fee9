"""Hooks of MkDocs: what is written from the code and from records is added, and wide tables stack on a phone."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from ibnorm_export.json_document import json_schema, schema_names
from scripts.reference_pages import PAGES
from scripts.site_pictures import PLOTS

__all__ = ["on_files", "on_page_content"]

ROOT = Path(__file__).resolve().parents[1]

#: Characters of a line on a phone of 390 px, those that the space beside a cell takes, and the width of one of code.
PHONE = 50
BESIDE = 3
CODE = 1.2

#: What a browser would break at a hyphen.
OPTION = re.compile(r"(?<![\w-])(?:--?[a-z][\w-]*|ibnorm-export)(?![\w-])")

#: After what a line may end in a path or in a name of code.
JOINT = re.compile(r"(?<=\w)[/_.(](?=[A-Za-z])")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the generated pages and plots to those of docs/."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    for name, draw in PLOTS.items():
        for dark in (False, True):
            path = f"assets/{name}-{'dark' if dark else 'light'}.svg"
            files.append(File.generated(config, path, content=draw(pyplot, dark=dark)))
    for command in schema_names():
        text = json.dumps(json_schema(command), indent=1) + "\n"
        files.append(File.generated(config, f"reference/schemas/{command}.schema.json", content=text))
    files.append(File.generated(config, "development/benchmarks.md", content=_benchmarks()))
    return files


def _benchmarks() -> str:
    """benchmarks/README.md as a page: its links to pages are moved, and those to other files become names."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(\.\./docs/([^)]+)\)", r"](../\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!\.\./|https?://|#)([^)]+)\)", r"`benchmarks/\2`", text)


def on_page_content(content: str, **_: Any) -> str:
    """Mark the tables that are too wide for a phone, and give each of their cells the head of its column.

    No line of the page ends inside an option, or in the middle of the command's name. Long paths and names of code may
    break at their joints.
    """
    content = re.sub(
        r"<table>.*?</table>", lambda match: _stackable(_whole_numbers(match[0])), content, flags=re.DOTALL
    )
    parts = re.split(r"(<pre.*?</pre>|<[^>]+>)", content, flags=re.DOTALL)
    in_code = [False, *(tag == "<code>" for tag in parts[1::2])]
    texts = [JOINT.sub(r"\g<0><wbr>", text) if code else text for text, code in zip(parts[::2], in_code, strict=True)]
    parts[::2] = [OPTION.sub(r'<span class="whole">\g<0></span>', text) for text in texts]
    return "".join(parts)


def _whole_numbers(table: str) -> str:
    """A table in which no line ends inside a number such as 4e-07."""
    return re.sub(r"(?<=[\s>(])\d[\d.]*e-\d+", r'<span class="whole">\g<0></span>', table)


def _stackable(table: str) -> str:
    """A table whose rows can stand as blocks, if its longest words do not fit beside each other."""
    head, end, body = table.partition("</thead>")
    rows = [re.findall(r"<(?:th|td)(?:\s[^>]*)?>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("</tr>")]
    columns = list(zip(*filter(None, rows), strict=True))
    if sum(max(map(_longest, column)) + BESIDE for column in columns) <= PHONE:
        return table
    heads: list[str | None] = [_text(column[0]) for column in columns]
    if not all(_text(cell)[:1].isdigit() for cell in columns[0][1:]):
        heads[0] = None  # names: the first cell is the heading of its block
    body = re.sub(r"<tr>(.*?)</tr>", lambda row: f"<tr>{_with_heads(row[1], heads)}</tr>", body, flags=re.DOTALL)
    return head.replace("<table>", "<table data-stack>", 1) + end + body


def _text(cell: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", cell))


def _longest(cell: str) -> float:
    """Characters of the longest word of a cell; those of code are wider."""
    width = CODE if "<code>" in cell else 1.0
    return width * max((len(word) for word in _text(cell).split()), default=0)


def _with_heads(row: str, heads: list[str | None]) -> str:
    names = iter(heads)

    def with_head(_: re.Match[str]) -> str:
        name = next(names)
        return "<td" if name is None else f'<td data-head="{html.escape(name)}"'

    return re.sub(r"<td", with_head, row)
