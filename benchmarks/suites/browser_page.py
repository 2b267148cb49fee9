"""The page of examples/browser in a headless Chromium: time until it is ready, and tokens/s of the demo's LLaMA.

Targets, for two cores: ready in at most 3 s, at least 50 tokens/s, as medians of five visits with an empty cache. The
models have the demo's sizes and random weights, on which the time does not depend. It needs what `make test-targets`
installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from ibnorm_export import ExportOptions, export, load
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.cli.demo_app.tasks import plan, write_preprocessor
from ibnorm_export.models.new_models import new_model, save

ROOT = Path(__file__).resolve().parents[2]
VISITS = 5
MAX_READY_S = 3.0
MIN_TOKENS_PER_S = 50.0
DATA = "document.documentElement.dataset"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--visits", type=int, default=VISITS, help="default: %(default)s")
    parser.add_argument("--models", type=Path, help="Folder that keeps the exported models (a temporary one).")
    parser.add_argument("--prepare", action="store_true", help="Export the models into --models, and measure nothing.")


def _server_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("browser_example", ROOT / "examples" / "browser" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _export(web: Path, checkpoints: Path) -> None:
    """Export both models of the demo, untrained; no token ends a text."""
    for name in ("llama", "vit"):
        if (web / name).is_dir():
            continue
        planned = plan(name)
        save(new_model(planned.config, planned.spec), checkpoints / name)
        if name == "llama":
            write_byte_tokenizer(checkpoints / name)
            for file in (checkpoints / name / "config.json", checkpoints / name / "generation_config.json"):
                content = json.loads(file.read_text(encoding="utf-8"))
                file.write_text(json.dumps(content | {"eos_token_id": None}), encoding="utf-8")
        else:
            write_preprocessor(checkpoints / name)
        model = load(checkpoints / name, task="text-generation" if name == "llama" else "forward")
        export(model, web / name, target="transformers.js", options=ExportOptions())


def _visit(browser: Any, address: str) -> dict[str, float]:
    """The figures of one visit, which has its own cache."""
    page = browser.new_context().new_page()
    page.goto(address)
    page.wait_for_function(f"['ready', 'failed'].includes({DATA}.state)", timeout=120_000)
    page.click("#write")
    page.wait_for_function(f"{DATA}.written", timeout=120_000)
    figures = {name: float(page.evaluate(f"{DATA}.{name}")) for name in ("seconds", "rate")}
    page.context.close()
    return figures


def measure(options: argparse.Namespace, report: Report) -> None:
    chromium, modules = shutil.which("chromium"), ROOT / "build" / "node" / "node_modules"
    if importlib.util.find_spec("playwright") is None or chromium is None or not modules.is_dir():
        raise Unavailable(
            "Chromium, playwright or transformers.js is missing: apt-get install chromium, then make test-targets"
        )
    from playwright.sync_api import sync_playwright

    serve = _server_module()
    with tempfile.TemporaryDirectory() as folder:
        web = options.models or Path(folder) / "web"
        web.mkdir(parents=True, exist_ok=True)
        _export(web, Path(folder) / "checkpoints")
        if options.prepare:
            raise SystemExit(0)
        with serve.Server(0, serve.folders(web, modules)) as server, sync_playwright() as playwright:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            address = f"http://127.0.0.1:{server.server_port}/"
            visits = [_visit(browser, address) for _ in range(options.visits)]
            version = browser.version
            browser.close()
            server.shutdown()
    figures = {
        "ready": Figure(statistics.median(visit["seconds"] for visit in visits), "s"),
        "rate": Figure(statistics.median(visit["rate"] for visit in visits), "tokens/s"),
    }
    targets = (Target("ready", MAX_READY_S), Target("rate", MIN_TOKENS_PER_S, at_least=True))
    details = {"visits": visits, "chromium": version}
    report.add(Row("the demo's models in WebAssembly", figures, targets=targets, details=details))
