"""The HTML reports in a real browser: plots are drawn, tables sort, nothing is loaded, a phone can show them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ibnorm_export import models
from ibnorm_export.analysis.html import write_analysis
from ibnorm_export.analysis.norms import analyze
from ibnorm_export.analysis.options import AnalysisOptions
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.gate.parity import parity_cases
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.report_files import write_report_files
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.html import write_report
from ibnorm_export.verifier.verify import VerifyOptions, verify

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test-browser)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")

#: CSS pixels of a common phone.
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(
    vit_checkpoint: Path, llama_checkpoint: Path, exported_vit: ExportedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A report of `verify` on a faulty file, a report of `check` on it, and a report of `analyze`."""
    made = tmp_path_factory.mktemp("pages")
    proto = onnx.load(exported_vit.path)
    node = next(n for n in proto.graph.node if n.domain == DOMAIN)
    next(a for a in node.attribute if a.name == "lambd").f *= 1.05
    onnx.save(proto, made / "bad.onnx")
    report = verify(ExportedModel(made / "bad.onnx"), models.load(vit_checkpoint), options=VerifyOptions(layers=True))
    write_report(report, made / "parity.html")
    cases = parity_cases("vit", "ort-cpu", report=report, max_error=None, seconds=1.0)
    write_report_files(
        CheckReport("check.toml", tuple(cases), parity={"vit": report}, environment={"processor": "x"}, seconds=1.0),
        made,
    )
    model = models.load(llama_checkpoint)
    inputs = model.sample(np.random.default_rng(0), 0)
    write_analysis(analyze(model, inputs, options=AnalysisOptions((8.0,))), made / "analysis.html")
    return made


PAGES = {"parity.html": 3, "report.html": 3, "analysis.html": 8}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_a_page_is_drawn_and_loads_nothing(browser: Any, folder: Path, name: str, size: dict[str, int]) -> None:
    page = browser.new_page(viewport=size)
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((folder / name).as_uri())
    assert requests == [(folder / name).as_uri()]
    assert problems == []
    boxes = [plot.bounding_box() for plot in page.locator("figure > svg").all()]
    assert len(boxes) == PAGES[name]
    for box in boxes:
        assert box["width"] > 250
        assert box["height"] > 80
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
    for plot in page.locator("figure > svg").all():
        assert plot.locator("path, image, use").count() >= 5  # axes, and curves, bars or cells
        assert plot.locator("text").count() >= 5
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td, th, figcaption, footer')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    page.screenshot(path=folder / f"{name}.{size['width']}.png", full_page=True)
    page.close()


def column(page: Any, table: int, index: int) -> list[str]:
    cells: list[str] = page.locator("table").nth(table).locator(f"tbody tr td:nth-child({index + 1})").all_inner_texts()
    return cells


def test_a_heading_sorts_its_table_in_both_directions(browser: Any, folder: Path) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto((folder / "analysis.html").as_uri())
    table = next(
        i
        for i, t in enumerate(page.locator("table").all())
        if "kurtosis before" in t.inner_text() and "norm" in t.locator("th").first.inner_text()
    )
    heads = page.locator("table").nth(table).locator("th").all()
    which = next(i for i, head in enumerate(heads) if head.inner_text() == "kurtosis before")
    before = [float(v) for v in column(page, table, which)]
    assert before != sorted(before)
    heads[which].click()
    assert [float(v) for v in column(page, table, which)] == sorted(before)
    assert heads[which].get_attribute("aria-sort") == "ascending"
    heads[which].press("Enter")
    assert [float(v) for v in column(page, table, which)] == sorted(before, reverse=True)
    heads[0].click()
    assert column(page, table, 0) == sorted(column(page, table, 0))
    assert heads[which].get_attribute("aria-sort") is None
    page.close()
