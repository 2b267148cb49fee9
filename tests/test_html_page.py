"""The HTML page: self-contained, escaped, deterministic, and written whole or not at all."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from ibnorm_export.errors import IBNormError
from ibnorm_export.html_page import (
    Curve,
    Distribution,
    Point,
    Section,
    State,
    Verdict,
    curves,
    distributions,
    dots,
    histograms,
    images,
    intervals,
    render,
    scatter,
    tolerance_dots,
)


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
            (tolerance_dots("t", names=["g"], series={"one": [1.0], "two": [200.0]}), "cap"),
        ),
    )
    render(
        path,
        title,
        verdict=Verdict(State.PASS, "All agree."),
        summary="summary",
        data={"name": "</script><script>alert(1)</script><!--"},
        sections=[section],
        environment={"processor": "x", "packages": {"torch": "2"}},
    )
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path / "r.html")
    assert text.count("<svg") == 2
    assert text.count("<script") == 2, "the report's data, and the script that sorts and saves"
    assert text.count("</script") == 2
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
        (tolerance_dots(name, names=[name], series={name: [1.0], "two": [200.0]}), name),
        (dots(name, name, names=[name, "b"], series={name: [1.0, 2.0], "two": [2.0, 1.0]}), name),
        (distributions(name, name, rows=[Distribution(name, [1.0, 2.0], (1.0, 2.0, 3.0))]), name),
        (histograms(name, name, edges=[0.0, 1.0, 2.0], series={name: [0.5, 0.5]}), name),
        (intervals(name, name, rows=[(name, 1.0, 0.5, 2.0)]), name),
        (images(name, pictures=[([[0.0, 1.0]], name, True)]), name),
    )
    section = Section(name, (name,), head=(name,), rows=((name,),), plots=plots)
    verdict = Verdict(State.FAIL, name, reasons=(name,), next_steps=(name,))
    render(tmp_path / "r.html", name, verdict=verdict, summary=name, sections=[section], environment={name: name})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    shown = {"\x1b[31mred": r"\x1b[31mred", "\ud800": r"\ud800", "a\x00b": r"a\x00b"}.get(name, name)[:20]
    assert len(re.findall(rf">\s*{re.escape(shown)}", text)) >= 14, "in the title, verdict, table and plots"
    assert not {"\x1b", "\x00"} & set(text)
    assert len(text) < 400_000


def test_a_page_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    assert page(tmp_path / "r.html") == page(tmp_path / "r.html")
    (tmp_path / "index.html").write_text("<!doctype html><title>mine</title>")
    with pytest.raises(IBNormError, match=r"index\.html exists and is not a page of ibnorm-export: it would be lost"):
        page(tmp_path / "index.html")


def shown_state(text: str) -> str:
    (found,) = re.findall(r'<div class="verdict (\w+)"', text)
    return found


@pytest.mark.parametrize(
    ("state", "style"), [(State.PASS, "pass"), (State.FAIL, "fail"), (State.CANNOT_TELL, "unsure")]
)
def test_each_verdict_has_its_own_style_and_words(tmp_path: Path, state: State, style: str) -> None:
    verdict = Verdict(state, "In a sentence.", reasons=("because `x` < 1",), next_steps=("run `a --b`",))
    render(tmp_path / "r.html", "t", verdict=verdict, sections=[], environment={})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert shown_state(text) == style
    assert f"</span> {state.value.capitalize()}</p>" in text
    run = 'run <code>a <span class="whole">--b</span></code>'
    for words in ("In a sentence.", "because <code>x</code> &lt; 1", run):
        assert words in text


def test_a_page_without_a_verdict_has_none(tmp_path: Path) -> None:
    render(tmp_path / "r.html", "t", verdict=None, sections=[], environment={})
    assert 'class="verdict' not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_numbers_are_set_to_the_right_and_verdicts_in_colour(tmp_path: Path) -> None:
    rows = (("a", "1.2e-05", "12.3%", "pass"), ("b", "nan", "4 ms", "FAIL"), ("c", "1", "2 s", "verification fails"))
    section = Section("s", head=("name", "error", "mixed", "verdict"), rows=rows)
    render(tmp_path / "r.html", "t", verdict=None, sections=[section], environment={})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall(r'<td role="cell" class="(\w+)"', text)[:4] == ["name", "num", "num", "name"]
    assert re.findall(r'<span class="mark (\w+)">([\w ]+)<', text) == [
        ("pass", "pass"),
        ("fail", "FAIL"),
        ("fail", "verification fails"),
    ]


def test_a_long_name_is_broken_between_its_parts(tmp_path: Path) -> None:
    """Nothing else is changed, and the name is still escaped. Commands are broken between their words."""
    names = ("model.layers.1.input_layernorm", "`ibnorm-export export -o x`", "short.name", "a/long_name.of<b>&amp;")
    section = Section("s", head=("name",), rows=tuple((name,) for name in names))
    render(tmp_path / "r.html", "t", verdict=None, sections=[section], environment={})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "model.<wbr>layers.<wbr>1.<wbr>input_<wbr>layernorm<" in text
    assert '<code><span class="whole">ibnorm-export</span> export <span class="whole">-o</span> x</code>' in text
    assert ">short.name<" in text
    assert "a/long_name.of&lt;b&gt;&amp;amp;<" in text


def test_dots_are_red_beyond_the_tolerance_only() -> None:
    plot = tolerance_dots("t", names=["a", "b"], series={"fused": [99.9, 100.1]})
    assert 'aria-label="t: 1 of 2 errors are above 100% of the tolerance; the largest is 100% (b)."' in plot
    within = tolerance_dots("t", names=["a", "b"], series={"fused": [99.9, 50.0]})
    bold = re.findall(r"<text [^>]*var\(--fail\)[^>]*>([^<]*)<", plot)
    assert bold == ["b"]
    assert "0 of 2 errors" in within
    assert within.count("fill: var(--pass)") > plot.count("fill: var(--pass)") > 0


def test_labels_of_points_stay_between_the_axes_and_apart() -> None:
    """Eight points close to each other at the lower edge, below a limit that is far above them."""
    names = [f"int4-block{index}, 0.7 MB" for index in range(8)]
    places = [(0.2 + 0.01 * index, -0.1) for index in range(8)] + [(0.9, 0.0)]
    points = [
        Point(name, x, y=y, low=y, high=y, area=0.2) for name, (x, y) in zip([*names, "fp16"], places, strict=True)
    ]
    plot = scatter("t", "x", y_label="y", points=points, limit=1.0)
    axis = float(re.findall(r'd="M [\d.]+ ([\d.]+) \nL', plot)[1])  # the lower edge, after that of the figure
    heights = sorted(float(y) for y in re.findall(r'<text [^>]* y="([\d.]+)" [^>]*>int4-block', plot))
    assert len(heights) == len(names)
    assert max(heights) < axis
    assert min(below - above for above, below in itertools.pairwise(heights)) > 10.0


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["vit.onnx", "vit.fp16.onnx"], ["vit.onnx", "vit.fp16.onnx"]),
        (["vit.layers.0.layernorm_after", "vit.layers.1"], ["0.layernorm_after", "1"]),
    ],
)
def test_names_of_rows_are_cut_only_where_one_is_too_long(names: list[str], shown: list[str]) -> None:
    plot = dots("t", "x", names=names, series={"one": [1.0, 2.0]})
    assert set(shown) <= set(re.findall(r"<text [^>]*>([^<]*)<", plot))


def test_an_error_that_is_no_number_or_missing() -> None:
    plot = tolerance_dots("t", names=["a", "b"], series={"fused": [float("inf"), float("nan")]})
    assert "1 of 1 errors" in plot


def test_plots_use_only_colours_of_the_page() -> None:
    """A fixed colour would not follow dark mode."""
    plots = (
        curves("c", "x", y_label="y", lines=[Curve("a", [0, 1], [1, 2]), Curve("b", [0, 1], [3, 4], right=True)]),
        tolerance_dots("t", names=["a"], series={"fused": [99.9]}, baseline=[3.0]),
        dots("t", "x", names=["a", "b"], series={"one": [1.0, 2.0], "two": [1.0, 3.0]}),
        distributions("t", "ms", rows=[Distribution("a", [1.0, 2.0], (1.0, 2.0, 3.0))]),
        histograms("t", "x", edges=[0.0, 1.0, 2.0], series={"before": [0.5, 0.5], "after": [1.0, 0.0]}),
        intervals("t", "x", rows=[("a", 1.0, 0.5, 2.0)], limit=1.5),
    )
    for plot in plots:
        assert re.findall(r"#[0-9a-f]{6}\b", plot) == []
        assert plot.startswith('<svg role="img" aria-label="')
        assert 'id="figure' not in plot
