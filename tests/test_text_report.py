"""Reports as text and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ibnorm_export.text_report import Report, text_table


@dataclass(frozen=True, slots=True)
class Two(Report):
    good: bool

    def __bool__(self) -> bool:
        return self.good

    def __str__(self) -> str:
        return "a < b"


def test_a_table_aligns_names_left_and_numbers_right() -> None:
    text = text_table("title", ("name", "ms"), rows=[("a", "1.5"), ("longer", "10.25")])
    assert text.splitlines() == ["title", "name       ms", "a         1.5", "longer  10.25"]


def test_a_table_without_rows_is_its_head() -> None:
    assert text_table("", ("name", "ms"), rows=[]) == "name  ms"


def test_a_row_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        text_table("", ("name", "ms"), rows=[("a",)])


@pytest.mark.parametrize("good", [True, False])
def test_a_report_passes_when_it_is_true(good: bool) -> None:
    assert Two(good).passed is good


def test_a_notebook_shows_the_escaped_text() -> None:
    assert Two(True)._repr_html_() == "<pre>a &lt; b</pre>"
