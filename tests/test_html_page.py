"""The HTML page: self-contained, escaped, deterministic, and written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ibnorm_export.errors import IBNormError
from ibnorm_export.html_page import Curve, Section, bars, curves, heat_map, render


def page(path: Path, title: str = "A page") -> str:
    section = Section(
        "Part <b>",
        ("text & more",),
        head=("name", "value"),
        rows=(("<script>alert(1)</script>", "1"),),
        plots=(
            (
                curves(
                    "c",
                    "x",
                    y_label="y",
                    lines=[Curve("a", [0, 1], [1, 2]), Curve("b", [0, 1], [3, 4], right=True)],
                    right_label="r",
                ),
                "cap",
            ),
            (bars("b", "y", groups=["g"], series={"one": [1.0], "two": [2.0]}, log=True), "cap"),
        ),
    )
    render(
        path,
        title,
        passed=True,
        summary="summary",
        sections=[section],
        environment={"processor": "x", "packages": {"torch": "2"}},
    )
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path / "r.html")
    assert text.count("<svg") == 2
    assert text.count("<script") == 1, "only the script that sorts"
    assert "&lt;script&gt;" in text
    loads = re.findall(r'(?:src|href)="(?!#)([^"]*)"', text)
    assert loads == [], "a reference to anything outside the page would be a request"


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page(tmp_path / "a.html") == page(tmp_path / "b.html")


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(IBNormError, match="does not exist"):
        page(tmp_path / "missing" / "r.html")


@pytest.mark.parametrize(
    "name", [r"$\frac{1$", r"a$x_{$b", "$$", "_hidden", "\x1b[31mred", "\ud800", "a\x00b", "n" * 100_000]
)
def test_a_name_is_text_and_not_an_instruction(tmp_path: Path, name: str) -> None:
    """Names come from files: matplotlib would read TeX between dollar signs, a terminal obeys control characters."""
    lines = [Curve(name, [0, 1], [1, 2]), Curve("b", [0, 1], [3, 4], right=True)]
    plots = (
        (curves(name, name, y_label=name, lines=lines, right_label=name), name),
        (bars(name, name, groups=[name], series={name: [1.0], "two": [2.0]}), name),
        (heat_map(name, [name], columns=[name], values=[[1.0]]), name),
    )
    section = Section(name, (name,), head=(name,), rows=((name,),), plots=plots)
    render(tmp_path / "r.html", name, passed=True, summary=name, sections=[section], environment={name: name})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    shown = {"\x1b[31mred": r"\x1b[31mred", "\ud800": r"\ud800", "a\x00b": r"a\x00b"}.get(name, name)[:60]
    assert text.count(f">{shown}") + text.count(f"> {shown}") >= 8, "in the title, the table and the three plots"
    assert not {"\x1b", "\x00"} & set(text)
    assert len(text) < 200_000


def test_a_page_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    assert page(tmp_path / "r.html") == page(tmp_path / "r.html")
    (tmp_path / "index.html").write_text("<!doctype html><title>mine</title>")
    with pytest.raises(IBNormError, match=r"index\.html exists and is not a page of ibnorm-export: it would be lost"):
        page(tmp_path / "index.html")
