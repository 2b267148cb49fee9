"""The site: it is built without a warning, its reference has everything, and it loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

import ibnorm_export
from ibnorm_export.cli.main import COMMANDS, app
from ibnorm_export.json_document import json_schema, schema_names
from scripts.reference_pages import PAGES, docstring
from scripts.site_pictures import ASSETS, DRAWN, PLOTS, load_rows, way
from tests.docs.pages import ROOT

pytest.importorskip("material", reason="mkdocs-material is not installed (make test-docs)")


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """A page may link to other hosts. What a browser loads by itself, it finds here."""
    loaded = re.compile(
        r'<(?:script|img|iframe|source)[^>]+(?:src|srcset)="?(https?:)?//|<link[^>]+href="?(https?:)?//'
    )
    imports = re.compile(r"(@import|url\()\s*[\"']?(https?:)?//")
    for path in site.rglob("*.html"):
        assert not loaded.search(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        assert not imports.search(path.read_text(encoding="utf-8")), path


def test_every_command_and_option_is_in_the_reference() -> None:
    page = PAGES["reference/commands.md"]()
    group = get_command(app)
    for name in COMMANDS:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        context = group.make_context("ibnorm-export", [name], resilient_parsing=True)
        _, command, _ = group.resolve_command(context, [name])  # type: ignore[attr-defined]  # a group has it
        for parameter in command.params:
            words = parameter.opts if parameter.opts[0].startswith("-") else [parameter.metavar or parameter.name]
            hidden = getattr(parameter, "hidden", False)
            assert hidden or any(word.upper() in section.upper() for word in words), (name, words)
            assert hidden or parameter.help, (name, words)


def test_every_public_name_is_in_the_reference() -> None:
    page = PAGES["reference/python.md"]()
    for name in ibnorm_export.__all__:
        assert f"\n### {name}\n" in page


def test_arguments_of_docstrings_are_read() -> None:
    read = docstring(ibnorm_export.load).entries("Args")
    assert "path" in read or len(read) >= 2
    assert all(text.strip() for text in read.values())


def test_every_key_of_check_toml_is_described() -> None:
    from dataclasses import fields

    from ibnorm_export.gate import config

    page = PAGES["reference/check-toml.md"]()
    for kind in (config.ExportCheck, config.ParityCheck, config.LatencyBudget, config.EvaluationCheck):
        for field in fields(kind):
            assert re.search(rf"^\| `{field.name}` \|.*\| \S.* \|$", page, re.MULTILINE), field.name


def test_a_table_that_is_too_wide_for_a_phone_can_stack() -> None:
    from scripts.site_hooks import on_page_content

    def table(*words: str) -> str:
        head = "".join(f"<th>head {n}</th>" for n in range(len(words)))
        row = "".join(f"<td>{word}</td>" for word in words)
        return f"<table>\n<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n<tr>{row}</tr>\n</tbody>\n</table>"

    narrow, wide = table("short words wrap " * 20, "1.5"), table("<code>longnameofcode</code>", "x" * 30, "A &amp; b")
    assert on_page_content(narrow) == narrow
    stacked = wide.replace("<table>", "<table data-stack>").replace("<td>x", '<td data-head="head 1">x')
    assert on_page_content(wide) == stacked.replace("<td>A", '<td data-head="head 2">A')
    assert '<span class="whole">4e-07</span>' in on_page_content(table("ViT 4e-07", "1"))
    assert '<td data-head="head 0">3.01' in on_page_content(table("3.01", "x" * 50)), "a number is no heading"


def test_no_line_ends_inside_an_option() -> None:
    from scripts.site_hooks import on_page_content

    def whole(word: str) -> str:
        return f'<span class="whole">{word}</span>'

    text = (
        '<p title="--a">use <code>--dry-run</code>, -o, --maxShapes or <code>ibnorm-export verify --text=a</code>: '
        "a-b - c -- d</p>"
    )
    found = on_page_content(text + "<pre><code>$ x --layers</code></pre>")
    for word in ("--dry-run", "-o", "--maxShapes", "ibnorm-export", "--text"):
        assert whole(word) in found
        text = text.replace(word, whole(word))
    assert found == text + "<pre><code>$ x --layers</code></pre>"


def test_paths_and_names_of_code_break_at_their_joints() -> None:
    from scripts.site_hooks import on_page_content

    text = (
        "<p>a/b.c <code>tests/a_test.py</code> <code>torch.load(path) 0.5 1_000</code></p><pre><code>a/b</code></pre>"
    )
    assert on_page_content(text) == text.replace("tests/a_test.py", "tests/<wbr>a_<wbr>test.<wbr>py").replace(
        "torch.load(path)", "torch.<wbr>load(<wbr>path)"
    )


def test_every_schema_is_published(site: Path) -> None:
    page = PAGES["reference/json.md"]()
    for command in schema_names():
        assert f"\n## {command}\n" in page
        published = json.loads((site / "reference" / "schemas" / f"{command}.schema.json").read_text(encoding="utf-8"))
        assert published == json_schema(command)


def test_the_codes_of_findings_are_listed_on_their_page_only() -> None:
    page = PAGES["reference/json.md"]()
    assert "IBN101" not in page
    assert "| `code` | [code of a finding](findings.md) or null |" in page


def test_the_pictures_are_those_of_the_script() -> None:
    for name, narrow in DRAWN.items():
        assert (ASSETS / name).read_text(encoding="utf-8") == way(narrow=narrow)


def test_text_of_plots_can_be_read_on_a_phone(site: Path) -> None:
    """The smallest text has 11 points; 358 px is the width of a column on a phone of 390 px."""
    plots = [path.read_text(encoding="utf-8") for path in (site / "assets").glob("*-light.svg")]
    assert len(plots) == len(PLOTS)
    for plot in plots:
        (width,) = re.findall(r'<svg [^>]*viewBox="0 0 ([\d.]+) ', plot)
        assert 11.0 * 358.0 / float(width) >= 11.0


def test_figures_of_the_endpoint_under_load_are_recorded() -> None:
    names = "offered", "first token, p50", "first token, p90", "whole text, p50", "whole text, p90"
    page = (ROOT / "docs" / "how-to" / "under-load.md").read_text(encoding="utf-8")
    shown = [
        [float(cell.strip(" %")) for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| [\d.]+ \|.*", page, re.M)
    ]
    recorded = [[row[name] for name in (*names, "tokens per second", "refused")] for row in load_rows("no limit")]
    assert len(recorded) == 8
    assert shown == [[float(f"{value:.3g}") for value in row] for row in recorded]


def test_links_read_as_titles(site: Path) -> None:
    """The text of a link names a page by its title, not by its file."""
    files = [
        (path.name, text)
        for path in site.rglob("*.html")
        for text in re.findall(r">([\w./-]+\.md)</a>", path.read_text(encoding="utf-8"))
    ]
    assert files == []


def test_every_link_leads_somewhere(site: Path) -> None:
    """Links within the site: the file is there, and so is the place in it."""
    places: dict[Path, set[str]] = {}
    for path in site.rglob("*.html"):
        places[path.resolve()] = set(re.findall(r'\sid="?([^"\s>]+)', path.read_text(encoding="utf-8")))
    for path in places:
        text = re.sub(r"<(pre|svg|script).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r'<a [^>]*href="?([^"\s>]+)', text):
            if path.name == "404.html" or re.match(r"[a-z]+:", target):
                continue
            name, _, place = target.partition("#")
            found = (path.parent / name).resolve() if name else path
            assert found.exists(), f"{path.relative_to(site.resolve())}: {target}"
            assert not place or place in places.get(found, {place}), f"{path.relative_to(site.resolve())}: {target}"


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
SOURCES = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_links_outside_the_site(path: Path) -> None:
    """MkDocs checks the links between pages; these files are read in the repository."""
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            where = (path.parent / target).resolve()
            generated = where.is_relative_to(ROOT / "docs") and where.relative_to(ROOT / "docs").as_posix() in PAGES
            assert where.exists() or generated, f"{path.name}: {target}"
