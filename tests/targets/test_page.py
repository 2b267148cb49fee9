"""`examples/browser` in a headless Chromium: it writes and reads what PyTorch does, and explains failures."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.targets.conftest import PREPROCESSOR, WebModel
from tests.targets.greedy import continued, in_pytorch

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test-targets)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "browser"
#: Chromium's WebGPU on a processor, for machines without a GPU.
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1100, "height": 900}
PROMPT = "The import"
#: Milliseconds that a busy machine may take to compile WebAssembly and the models.
PATIENCE = 120_000


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("browser_example", EXAMPLE / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["browser_example"] = module
    spec.loader.exec_module(module)
    return module


def address(serve: ModuleType, models: Path, modules: Path) -> Iterator[str]:
    with serve.Server(0, serve.folders(models, modules / "node_modules")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def site(serve: ModuleType, web: Path, web_llama: WebModel, web_vit: WebModel, node_folder: Path) -> Iterator[str]:
    yield from address(serve, web, node_folder)


@pytest.fixture(scope="module")
def empty_site(serve: ModuleType, node_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from address(serve, tmp_path_factory.mktemp("nothing"), node_folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *SOFTWARE_GPU])
        yield opened
        opened.close()


Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens a page, and returns it when it has loaded or failed."""
    pages = []

    def opened(site: str, *, before: str = "", **options: Any) -> Any:
        page = browser.new_page(**options)
        pages.append(page)
        page.requests = []
        page.problems = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda problem: page.problems.append(str(problem)))
        if before:
            page.add_init_script(before)
        page.goto(site)
        settled(page)
        return page

    yield opened
    for page in pages:
        page.close()


def settled(page: Any) -> None:
    page.wait_for_function(f"['ready', 'failed'].includes({DATA}.state)", timeout=PATIENCE)


DATA = "document.documentElement.dataset"


def draw(page: Any, points: list[tuple[float, float]]) -> None:
    """Draw lines in the black square, and wait for the digit; points are shares of its sides."""
    page.locator("#ink").scroll_into_view_if_needed()
    box = page.locator("#ink").bounding_box()
    (x, y), *others = [(box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in points]
    page.mouse.move(x, y)
    page.mouse.down()
    for x, y in others:
        page.mouse.move(x, y, steps=8)
    page.mouse.up()
    page.wait_for_function(f"{DATA}.digit", timeout=PATIENCE)


SEVEN = [(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)]


def class_in_python(page: Any, model: Any) -> str:
    """What PyTorch reads in float64 in the 8 by 8 pixels that the page shows."""
    script = "[...document.getElementById('seen').getContext('2d').getImageData(0, 0, 8, 8).data]"
    pixels = np.array(page.evaluate(script), dtype=np.float64).reshape(8, 8, 4)[..., 0]
    assert pixels.max() > 200  # white
    assert (pixels == 0).any()  # black
    values = (pixels * PREPROCESSOR["rescale_factor"] - 4.9) / 6.0
    with torch.no_grad():
        return str(int(model.truth()(pixel_values=torch.from_numpy(values)[None, None]).logits.argmax()))


def test_it_writes_what_pytorch_writes(visit: Open, site: str, web_llama: WebModel) -> None:
    page = visit(site, viewport=DESK)
    assert page.locator("#problem").is_hidden(), page.locator("#problem").inner_text()
    assert page.evaluate(f"{DATA}.device") == "wasm"
    assert page.evaluate("crossOriginIsolated")  # threads
    page.fill("#prompt", PROMPT)
    page.select_option("#temperature", "0")
    page.click("#write")
    page.wait_for_function(f"{DATA}.written", timeout=PATIENCE)
    ids = list(PROMPT.encode())
    room = 64 - len(ids)
    written = [int(token) for token in page.evaluate(f"{DATA}.written").split()]
    truth = continued(in_pytorch(web_llama.model), ids, tokens=room)
    assert written == truth[: len(written)]
    assert len(written) == 64 or written[-1] == 2  # the token that ends a text
    assert page.locator("#text").inner_text().startswith(PROMPT)
    assert page.locator("#write").is_enabled()
    assert page.problems == []
    assert all(url.startswith((site, "data:", "blob:")) for url in page.requests)


def test_it_reads_what_pytorch_reads(visit: Open, site: str, web_vit: WebModel) -> None:
    page = visit(site, viewport=DESK)
    draw(page, SEVEN)
    digit = class_in_python(page, web_vit.model)
    assert page.evaluate(f"{DATA}.digit") == digit
    assert page.locator("#scores .best").inner_text().split()[0] == digit
    assert page.locator("#digit").inner_text() == f"It reads {digit}."
    page.click("#clear")
    assert page.evaluate(f"{DATA}.digit") == ""
    assert page.locator("#scores .best").count() == 0
    assert page.problems == []


def test_webgpu_gives_the_same(visit: Open, site: str, web_llama: WebModel, web_vit: WebModel) -> None:
    page = visit(site, viewport=DESK)
    if page.locator("#device option[value=webgpu]").is_disabled():
        pytest.skip("this Chromium has no WebGPU, not even on the processor")
    page.select_option("#device", "webgpu")
    page.wait_for_function(f"{DATA}.device === 'webgpu' && {DATA}.state === 'ready'", timeout=PATIENCE)
    draw(page, SEVEN)
    assert page.evaluate(f"{DATA}.digit") == class_in_python(page, web_vit.model)
    page.fill("#prompt", PROMPT)
    page.select_option("#temperature", "0")
    page.click("#write")
    page.wait_for_function(f"{DATA}.rate", timeout=PATIENCE)
    page.click("#stop")  # a GPU that is emulated writes a token in half a second
    page.wait_for_function(f"{DATA}.written", timeout=PATIENCE)
    written = [int(token) for token in page.evaluate(f"{DATA}.written").split()]
    ids = list(PROMPT.encode())
    assert len(written) >= len(ids) + 4
    assert written == continued(in_pytorch(web_llama.model), ids, tokens=len(written) - len(ids))


def test_a_device_that_fails_leaves_the_other(visit: Open, site: str) -> None:
    page = visit(site, viewport=DESK)
    if page.locator("#device option[value=webgpu]").is_disabled():
        pytest.skip("this Chromium has no WebGPU, not even on the processor")
    page.route("**/models/**", lambda route: route.abort())
    page.select_option("#device", "webgpu")
    page.wait_for_function(f"{DATA}.state === 'failed'", timeout=PATIENCE)
    assert page.locator("#problem").is_visible()
    page.unroute_all()
    page.select_option("#device", "wasm")
    page.wait_for_function(f"{DATA}.state === 'ready'", timeout=PATIENCE)
    assert page.locator("#problem").is_hidden()
    assert page.locator("#write").is_enabled()


def test_writing_can_be_stopped(visit: Open, site: str) -> None:
    page = visit(site, viewport=DESK)
    page.fill("#prompt", "a")
    page.evaluate("document.getElementById('write').click(); document.getElementById('stop').click()")
    page.wait_for_function(f"{DATA}.written", timeout=PATIENCE)
    assert len(page.evaluate(f"{DATA}.written").split()) <= 1 + 4
    assert page.locator("#write").is_enabled()
    assert page.locator("#stop").is_disabled()


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "dark"), (DESK, "light")], ids=["phone", "desk"])
def test_it_fits_the_screen(visit: Open, site: str, size: dict[str, int], scheme: str, tmp_path: Path) -> None:
    page = visit(site, viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, li, button, label, textarea, output')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    page.screenshot(path=tmp_path / "page.png", full_page=True)


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("WebAssembly.validate = () => false", "no SIMD instructions in WebAssembly"),
        ("delete globalThis.WebAssembly", "has no WebAssembly, or it is switched off"),
        ("delete Object.hasOwn", "JavaScript is older than transformers.js needs"),
    ],
)
def test_a_browser_that_is_too_old(visit: Open, site: str, before: str, words: str) -> None:
    page = visit(site, before=before)
    text = page.locator("#problem").inner_text()
    assert words in text
    assert "Use Chrome or Edge 93, Firefox 114, Safari 16.4, or a later version." in text
    assert page.locator("#write").is_disabled()


def test_a_browser_without_webgpu(visit: Open, site: str) -> None:
    page = visit(site, before="Object.defineProperty(navigator, 'gpu', { value: undefined })")
    option = page.locator("#device option[value=webgpu]")
    assert option.is_disabled()
    assert option.inner_text() == "WebGPU: not in this browser"
    assert page.evaluate(f"{DATA}.state") == "ready"
    assert not any("asyncify" in url for url in page.requests)  # the build with WebGPU is twice as large


def test_models_that_are_not_there(visit: Open, empty_site: str) -> None:
    page = visit(empty_site)
    text = page.locator("#problem").inner_text()
    assert text.startswith("The models cannot be loaded: ")
    assert "examples/browser/serve.py says how to export them" in text


def test_the_server_explains_what_is_missing(
    serve: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = sys.argv
    sys.argv = ["serve.py", str(tmp_path)]
    try:
        with pytest.raises(SystemExit) as left:
            serve.main()
    finally:
        sys.argv = original
    assert left.value.code == 2
    assert "transformers.min.js is missing; the top of serve.py has the commands" in capsys.readouterr().err
