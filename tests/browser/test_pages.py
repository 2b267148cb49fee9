"""The HTML reports in a real browser: they can be read on a phone and at a desk, in light and dark; tables sort."""

from __future__ import annotations

import csv
import io
import json
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
from ibnorm_export.benchmark.baseline import Baseline, compare_baselines
from ibnorm_export.benchmark.html import write_bench, write_comparison
from ibnorm_export.benchmark.report import BenchReport, Latency, Ratio
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.evaluation.html import write_evaluation
from ibnorm_export.evaluation.report import CandidateResult, ChangedAnswer, Comparison, EvaluationReport, Metric
from ibnorm_export.gate.parity import parity_cases
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.report_files import write_report_files
from ibnorm_export.html_page import Section, render
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.verifier.html import write_report
from ibnorm_export.verifier.verify import VerifyOptions, verify

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (pip install 'ibnorm-export[evaluate]')")
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


def bench_report() -> BenchReport:
    times = np.random.default_rng(0).gamma(30.0, 0.1, (2, 30))
    latencies = tuple(
        Latency(name, 900, p50_ms=3.0, p90_ms=3.6, p99_ms=4.4, throughput_per_s=333.0, round_ms=tuple(map(float, row)))
        for name, row in zip(("ort-cpu", "torch.compile"), times, strict=True)
    )
    return BenchReport(
        {"input_ids": (1, 128)},
        1,
        threads=2,
        rounds=30,
        latencies=latencies,
        ratios=(Ratio("ort-cpu", "torch.compile", median=0.24, p25=0.22, p75=0.27),),
        environment={"processor": "x", "packages": {"torch": "2", "onnxruntime": "1"}},
        model="model.onnx",
        warnings=("the machine was busy: a round took twice the median",),
    )


def baseline(scale: float) -> Baseline:
    times = tuple(scale * float(t) for t in np.random.default_rng(1).gamma(50.0, 0.1, 8))
    return Baseline(
        "model.onnx",
        "ort-cpu",
        inputs={"x": [1, 2]},
        threads=1,
        times_ms=times,
        reference_ms=(1.0,) * len(times),
        environment={"processor": "x"},
        precision="fp32",
        kernels="fused",
    )


def evaluation_report() -> EvaluationReport:
    compared = Comparison(
        "drop of top-1",
        0.004,
        low=-0.002,
        high=0.012,
        max_drop=0.01,
        decision=Decision.CANNOT_TELL,
        samples=500,
        samples_needed=1900,
        method="Tango's interval of paired shares",
        details={"p of McNemar": 0.3},
    )
    answers = tuple(ChangedAnswer(f"digits/{i}.png", "3", "3", "8") for i in range(3))
    candidates = (
        CandidateResult("checkpoint (torch)", 500, metrics=(Metric("top-1", 0.95, low=0.93, high=0.97, share=True),)),
        CandidateResult(
            "model.int8.onnx",
            500,
            metrics=(Metric("top-1", 0.946, low=0.92, high=0.966, share=True),),
            comparisons=(compared,),
            changed=3,
            changed_answers=answers,
            curves={"calibration": ((0.2, 0.3), (0.6, 0.5), (0.9, 0.95))},
        ),
    )
    return EvaluationReport(
        "classification",
        "digits",
        candidates=candidates,
        reference="checkpoint (torch)",
        environment={"processor": "x"},
    )


@pytest.fixture(scope="module")
def folder(
    vit_checkpoint: Path, llama_checkpoint: Path, exported_vit: ExportedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every report but the demo's; those of `verify` and `check` are about a faulty file too."""
    made = tmp_path_factory.mktemp("pages")
    proto = onnx.load(exported_vit.path)
    node = next(n for n in proto.graph.node if n.domain == DOMAIN)
    next(a for a in node.attribute if a.name == "lambd").f *= 1.05
    onnx.save(proto, made / "bad.onnx")
    report = verify(ExportedModel(made / "bad.onnx"), models.load(vit_checkpoint), options=VerifyOptions(layers=True))
    write_report(report, made / "parity.html")
    cases = parity_cases("vit", "ort-cpu", report=report, max_error=None)
    write_report_files(
        CheckReport("check.toml", tuple(cases), parity={"vit": report}, environment={"processor": "x"}, seconds=1.0),
        made,
    )
    write_report(
        verify(exported_vit, models.load(vit_checkpoint), options=VerifyOptions(layers=True)), made / "pass.html"
    )
    write_bench(bench_report(), made / "bench.html")
    write_comparison(compare_baselines(baseline(1.0), baseline(1.06)), made / "compare.html")
    write_evaluation(evaluation_report(), made / "evaluation.html")
    model = models.load(llama_checkpoint)
    inputs = model.sample(np.random.default_rng(0), 0)
    write_analysis(analyze(model, inputs, options=AnalysisOptions((8.0,))), made / "analysis.html")
    return made


PAGES = {
    "parity.html": 2,
    "pass.html": 2,
    "report.html": 2,
    "analysis.html": 18,
    "bench.html": 1,
    "compare.html": 2,
    "evaluation.html": 3,
}

#: What a page may not contain, measured in the browser: the layout as it is, not as the style sheet intends it.
LAYOUT = """() => {
  const visible = e => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim() !== "");
  const all = selector => [...document.querySelectorAll(selector)];
  const shown = all("body *").filter(e => visible(e) && own(e) && !e.closest(".hidden, .skip"));
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(colour).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      const parts = numbers(colour);
      if (parts.length === 3 || parts[3] === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const size = e => {
    const svg = e.closest("svg");
    const scale = svg && e !== svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(e).fontSize) * scale;
  };
  const contrast = e => {
    const style = getComputedStyle(e);
    const [a, b] = [light(e.closest("svg") ? style.fill : style.color), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const name = e => `${e.tagName.toLowerCase()} ${e.textContent.trim().slice(0, 40)}`;
  const width = document.documentElement.clientWidth;
  const outside = e => { const box = e.getBoundingClientRect(); return box.left < -0.5 || box.right > width + 0.5; };
  return {
    texts: shown.length,
    overflow: document.documentElement.scrollWidth - width,
    clipped: all(".scroll, table, td, figure").filter(e => e.scrollWidth > e.clientWidth + 1).map(name),
    outside: shown.filter(outside).map(name),
    small: shown.filter(e => size(e) < 11).map(e => `${size(e)} ${name(e)}`),
    faint: shown.filter(e => contrast(e) < 4.5).map(e => `${contrast(e).toFixed(2)} ${name(e)}`),
    unnamed: all("figure svg").filter(e => !e.getAttribute("aria-label")).length,
  };
}"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1400, "height": 900}], ids=["phone", "desk"])
def test_a_page_can_be_read(browser: Any, folder: Path, name: str, size: dict[str, int], scheme: str) -> None:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((folder / name).as_uri())
    page.screenshot(path=folder / f"{name}.{size['width']}.{scheme}.png", full_page=True)
    found = page.evaluate(LAYOUT)
    assert found.pop("texts") > 20
    assert found == {"overflow": 0, "clipped": [], "outside": [], "small": [], "faint": [], "unnamed": 0}
    assert requests == [(folder / name).as_uri()], "the page loads nothing"
    assert problems == []
    plots = page.locator("figure > svg").all()
    assert len(plots) == PAGES[name]
    for plot in plots:
        box = plot.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 80
        assert plot.locator("path, image, use").count() >= 5  # axes, and curves or dots
        assert plot.locator("text").count() >= 5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark != "rgb(255, 255, 255)") == (scheme == "dark")
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_paper(browser: Any, folder: Path, name: str) -> None:
    """A4 without its margins is 718 CSS pixels wide."""
    page = browser.new_page(viewport={"width": 718, "height": 900})
    page.emulate_media(media="print")
    page.goto((folder / name).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    page.close()


def test_the_layout_is_measured(browser: Any, folder: Path) -> None:
    """What the test above looks for is found in a page that has it."""
    page = browser.new_page(viewport=PHONE)
    page.goto((folder / "pass.html").as_uri())
    page.add_style_tag(
        content="td { display: block !important; width: 900px; } figcaption { font-size: 10px !important; }"
        ".lead { color: #bbb; } svg { --ink: #bbbbbb; }"
    )
    found = page.evaluate(LAYOUT)
    assert found["overflow"] > 0
    assert found["clipped"]
    assert found["outside"]
    assert any("10 " in entry for entry in found["small"])
    assert any("p Compared" in entry for entry in found["faint"])
    assert any("text " in entry for entry in found["faint"])
    page.close()


def column(page: Any, table: int, index: int) -> list[str]:
    cells: list[str] = page.locator("table").nth(table).locator(f"tbody tr td:nth-child({index + 1})").all_inner_texts()
    return cells


@pytest.mark.parametrize("size", [PHONE, {"width": 1400, "height": 900}], ids=["phone", "desk"])
def test_a_heading_sorts_its_table_both_ways_and_back(browser: Any, folder: Path, size: dict[str, int]) -> None:
    page = browser.new_page(viewport=size)
    page.goto((folder / "analysis.html").as_uri())
    table = next(
        i
        for i, t in enumerate(page.locator("table").all())
        if "kurtosis before" in t.inner_text() and "norm" in t.locator("th").first.inner_text()
    )
    heads = page.locator("table").nth(table).locator("th").all()
    which = next(i for i, head in enumerate(heads) if head.inner_text() == "kurtosis before")
    shown = column(page, table, which)
    before = [float(v) for v in shown]
    assert before != sorted(before)
    heads[which].locator("button").click()
    assert [float(v) for v in column(page, table, which)] == sorted(before)
    assert heads[which].get_attribute("aria-sort") == "ascending"
    heads[which].locator("button").press("Enter")
    assert [float(v) for v in column(page, table, which)] == sorted(before, reverse=True)
    assert heads[which].get_attribute("aria-sort") == "descending"
    heads[which].locator("button").click()
    assert column(page, table, which) == shown
    assert heads[which].get_attribute("aria-sort") is None
    page.close()


def test_numbers_inside_names_sort_as_numbers(browser: Any, folder: Path) -> None:
    names = ("layers.10.norm", "layers.9.norm", "layers.1.norm")
    rows = tuple((name, value) for name, value in zip(names, ("2e-3", "1,200", ""), strict=True))
    section = Section("s", head=("name", "value"), rows=rows)
    render(folder / "sorted.html", "t", verdict=None, sections=[section], environment={})
    page = browser.new_page(viewport=PHONE)
    page.goto((folder / "sorted.html").as_uri())
    page.locator("th button").first.click()
    assert column(page, 0, 0) == ["layers.1.norm", "layers.9.norm", "layers.10.norm"]
    page.locator("th button").nth(1).click()
    assert column(page, 0, 0) == ["layers.10.norm", "layers.9.norm", "layers.1.norm"], "an empty cell is last"
    page.close()


def test_what_is_saved(browser: Any, folder: Path) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme="dark")
    page.goto((folder / "parity.html").as_uri())

    def saved(action: str) -> bytes:
        with page.expect_download() as download:
            page.locator(f"button[data-action={action}]").first.click()
        return Path(download.value.path()).read_bytes()

    assert json.loads(saved("json"))["verdict"] == "fail"
    head, *rows = csv.reader(io.StringIO(saved("csv").decode()))
    assert head == ["cause", "code", "where", "what"]
    assert len(rows) == page.locator("table").first.locator("tbody tr").count() > 0
    picture = Image.open(io.BytesIO(saved("png"))).convert("RGB")
    assert picture.width > 1000
    assert picture.getpixel((2, 2)) == (11, 18, 32), "in the colours of the page"
    assert len(picture.getcolors(1 << 24)) > 20
    page.close()
