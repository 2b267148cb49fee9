"""Every page of the site in a real browser, on a phone and on a desk: nothing is cut off, and all text can be read."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("material", reason="mkdocs-material is not installed (make test-docs)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test-docs)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")

WIDTHS = (390, 1400)

#: A4 without its margins, in CSS pixels.
PAPER = 718

#: What is wrong with the layout of a page, as texts: parts beyond its right edge that do not scroll, and small text.
PROBLEMS = """() => {
  const width = document.documentElement.clientWidth, found = new Set();
  if (document.documentElement.scrollWidth > width) found.add(`page: ${document.documentElement.scrollWidth} wide`);
  const name = (e) => `${e.tagName.toLowerCase()}.${e.className}: ${(e.textContent || "").trim().slice(0, 60)}`;
  const scrolls = (e) => {
    for (let p = e; p; p = p.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(p).overflowX)) return true;
    return false;
  };
  for (const e of document.querySelectorAll(".md-content *")) {
    const box = e.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    if (box.right > width + 1 && !scrolls(e)) found.add(`beyond the edge: ${name(e)}`);
    if (e.matches("table, .md-typeset__table, .md-typeset__scrollwrap") && e.scrollWidth > e.clientWidth + 1)
      found.add(`a table scrolls: ${name(e)}`);
    if (["hidden", "clip"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1)
      found.add(`cut off: ${name(e)}`);
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const e = text.parentElement;
    if (!text.textContent.trim() || e.closest("script, style, noscript, .md-clipboard, title")) continue;
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!box.width || !box.height || style.visibility === "hidden" || style.opacity === "0") continue;
    if (parseFloat(style.fontSize) < 11) found.add(`${style.fontSize}: ${name(e)}`);
  }
  for (const e of document.querySelectorAll(".md-content img"))
    if (!e.naturalWidth && getComputedStyle(e).display !== "none") found.add(`no picture: ${e.src}`);
  return [...found].slice(0, 10);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("preferred", "scheme"), [("light", "default"), ("dark", "slate")])
def test_a_reader_gets_the_preferred_scheme(browser: Any, site: Path, preferred: str, scheme: str) -> None:
    context = browser.new_context(color_scheme=preferred)
    page = context.new_page()
    page.goto((site / "index.html").as_uri())
    page.wait_for_function("document.body.dataset.mdColorScheme !== undefined")
    assert page.evaluate("document.body.dataset.mdColorScheme") == scheme
    context.close()


def test_every_page_can_be_read(browser: Any, site: Path) -> None:
    """Each page is loaded once, and then shown in both schemes, at both widths and on paper."""
    page = browser.new_page()
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith("file:") else None)
    wrong = {}
    for path in sorted(site.rglob("*.html")):
        if path.name == "404.html":
            continue
        page.set_viewport_size({"width": WIDTHS[0], "height": 900})
        page.goto(path.as_uri())
        page.wait_for_function("document.body.dataset.mdColorScheme !== undefined")
        for scheme in ("default", "slate"):
            page.evaluate("scheme => { document.body.dataset.mdColorScheme = scheme; }", scheme)
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                if problems := page.evaluate(PROBLEMS):
                    wrong[path.relative_to(site).as_posix(), scheme, width] = problems
        page.emulate_media(media="print")
        page.set_viewport_size({"width": PAPER, "height": 900})
        if (printed := page.evaluate("document.documentElement.scrollWidth")) > PAPER:
            wrong[path.relative_to(site).as_posix(), "print", PAPER] = [f"{printed} wide"]
        page.emulate_media(media="screen")
    page.close()
    assert wrong == {}
    assert outside == []


def test_the_search_finds_a_page(browser: Any, site: Path) -> None:
    """The search box of a desk, typed into: the results are there, and name the page."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.click(".md-search__input")
        page.keyboard.type("triton")
        page.wait_for_selector(".md-search-result__item a")
        assert "serve-on-triton" in " ".join(
            page.eval_on_selector_all(".md-search-result__item a", "links => links.map(link => link.href)")
        )
        page.close()
        server.shutdown()


def test_problems_are_found(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_content(
        '<div class="md-content"><p style="font-size: 9px">small</p><pre>' + "long " * 100 + "</pre></div>"
    )
    found = " ".join(page.evaluate(PROBLEMS))
    page.close()
    assert "9px" in found
    assert "wide" in found or "beyond the edge" in found
