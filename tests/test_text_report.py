"""Reports as text and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ibnorm_export.errors import IBNormError, ModelFileError, printable, quoted
from ibnorm_export.text_report import Report, ratio_text, text_table, three_digits


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


def test_a_cell_stays_on_its_line_and_shows_control_characters() -> None:
    table = text_table("", ("name", "value"), rows=[("a\nverdict: pass\x1b[2J", "1"), ("b" * 1000, "2")])
    assert table.splitlines()[1].split() == [r"a\nverdict:", r"pass\x1b[2J", "1"]
    assert len(table.splitlines()) == 3
    assert max(map(len, table.splitlines())) < 230


def test_printable_keeps_text_and_escapes_what_a_terminal_obeys() -> None:
    kept = "naïve 日本語 👩‍👧\tx\ny"
    assert printable(kept) == kept
    assert printable("\x1b[31m\r\x9b\x7f\u202e\ud800") == r"\x1b[31m\r\x9b\x7f\u202e\ud800"


def test_values_and_messages_are_cut() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert [len(quoted(value)) for value in ("x" * 10**6, 10**200 * 10, deep)][:2] == [203, 203]
    assert quoted(deep) == "a list that cannot be printed"
    assert quoted(10**5000) == "a int that cannot be printed"
    error = ModelFileError("begin " + "xxx " * 10**5 + "; do this")
    assert str(error).startswith("begin xxx") and str(error).endswith("xxx ; do this")
    assert len(str(error)) < 2100
    assert str(IBNormError("short")) == "short"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.2345, "1.23"),
        (0.012345, "0.0123"),
        (123.45, "123"),
        (1234.5, "1230"),
        (9.999, "10.0"),
        (2.0, "2.00"),
        (0.0, "0.00"),
        (1e-6, "1e-06"),
        (float("nan"), "nan"),
        (99950.0, "100000"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.5, "0.500"), (10.0, "10.0"), (25.0, "25.0, 25.0 times slower"), (0.04, "0.0400, 25.0 times faster")],
)
def test_an_extreme_ratio_is_also_printed_as_times_faster(ratio: float, text: str) -> None:
    assert ratio_text(ratio) == text
