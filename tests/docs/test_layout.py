"""Every page of the site in a real browser, on a phone and on a desk: nothing is cut off, and all text can be read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("material", reason="mkdocs-material is not installed (make test-docs)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test-docs)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")

WIDTHS = (390, 1400)

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
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(made)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_can_be_read(browser: Any, site: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith("file:") else None)
    wrong = {}
    for path in sorted(site.rglob("*.html")):
        if path.name == "404.html":
            continue
        page.goto(path.as_uri())
        page.wait_for_function("document.body.dataset.mdColorScheme !== undefined")
        expected = {"light": "default", "dark": "slate"}[scheme]
        assert page.evaluate("document.body.dataset.mdColorScheme") == expected
        if problems := page.evaluate(PROBLEMS):
            wrong[path.relative_to(site).as_posix()] = problems
    context.close()
    assert wrong == {}
    assert outside == []


def test_problems_are_found(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_content(
        '<div class="md-content"><p style="font-size: 9px">small</p><pre>' + "long " * 100 + "</pre></div>"
    )
    found = " ".join(page.evaluate(PROBLEMS))
    page.close()
    assert "9px" in found
    assert "wide" in found or "beyond the edge" in found
