"""Run files by onnxruntime-web with WebGPU in a headless Chromium, whose adapter is a GPU emulated on the processor."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.suites.runtimes_cases import Case
from benchmarks.suites.runtimes_worker import largest_error
from ibnorm_export.errors import BackendUnavailable

__all__ = ["RUNTIME", "package_version", "run_webgpu"]

RUNTIME: Final = "ort-webgpu"
_SOFTWARE: Final = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
_PATIENCE_MS: Final = 120_000
_SITE: Final = "http://localhost/"  # a page of this machine is secure, which WebGPU asks for

#: Types of onnxruntime-web, and the arrays of JavaScript that hold them.
_TYPES: Final = {"float32": "Float32Array", "int64": "BigInt64Array", "bool": "Uint8Array"}

_SCRIPT: Final = """async ({ model, inputs }) => {
  const ort = await import("/ort/ort.webgpu.min.mjs");
  ort.env.wasm.wasmPaths = "/ort/";
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "fatal";
  if (!(await navigator.gpu?.requestAdapter())) return { absent: true };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const text = (array) => btoa(Array.from(array, (b) => String.fromCharCode(b)).join(""));
  try {
    const session = await ort.InferenceSession.create(model, { executionProviders: ["webgpu"], logSeverityLevel: 4 });
    const feeds = {};
    for (const { name, type, array, dims, data } of inputs) {
      feeds[name] = new ort.Tensor(type, new globalThis[array](bytes(data).buffer), dims);
    }
    const outputs = {};
    for (const [name, tensor] of Object.entries(await session.run(feeds))) {
      const data = await tensor.getData();
      outputs[name] = {
        type: tensor.type, dims: tensor.dims, data: text(new Uint8Array(data.buffer, data.byteOffset, data.byteLength)),
      };
    }
    await session.release();
    return { outputs };
  } catch (error) {
    return { refuses: String(error.message ?? error) };
  }
}"""


def package_version(npm: Path | None) -> str:
    """The version of onnxruntime-web below `npm`.

    Raises:
        BackendUnavailable: it, playwright or Chromium is missing.
    """
    described = (npm or Path()) / "node_modules" / "onnxruntime-web" / "package.json"
    if not described.is_file() or importlib.util.find_spec("playwright") is None or shutil.which("chromium") is None:
        raise BackendUnavailable(f"{RUNTIME} needs Chromium, playwright, and --npm with onnxruntime-web")
    return str(json.loads(described.read_text(encoding="utf-8"))["version"])


def run_webgpu(cases: Sequence[Case], *, npm: Path) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Run files, each in its own page.

    Raises:
        BackendUnavailable: this Chromium has no WebGPU, not even on the processor.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", *_SOFTWARE]
        )
        for case in cases:
            yield case, _run(browser, case, npm=npm)
        browser.close()


def _run(browser: Any, case: Case, *, npm: Path) -> dict[str, Any]:
    inputs, expected, valid = (
        dict(np.load(case.folder / f"{name}.npz").items()) for name in ("inputs", "expected", "valid")
    )
    if unknown := {str(array.dtype) for array in inputs.values()} - _TYPES.keys():
        return {"refuses": f"a browser has no arrays of {', '.join(sorted(unknown))}"}
    page = browser.new_page()
    page.set_default_timeout(_PATIENCE_MS)

    def answer(route: Any) -> None:
        path = route.request.url.removeprefix(_SITE)
        if path == "":
            route.fulfill(body="<!doctype html>", content_type="text/html")
        elif path == "model.onnx":
            route.fulfill(path=case.folder / "model.onnx")
        else:
            kind = "application/wasm" if path.endswith(".wasm") else "text/javascript"
            file = npm / "node_modules" / "onnxruntime-web" / "dist" / Path(path).name
            route.fulfill(path=file, content_type=kind)

    page.route(f"{_SITE}**", answer)
    page.goto(_SITE)
    given = [
        {
            "name": name,
            "type": str(array.dtype),
            "array": _TYPES[str(array.dtype)],
            "dims": array.shape,
            "data": base64.b64encode(array.tobytes()).decode(),
        }
        for name, array in inputs.items()
    ]
    found = page.evaluate(_SCRIPT, {"model": "/model.onnx", "inputs": given})
    page.close()
    if found.get("absent"):
        raise BackendUnavailable("this Chromium has no WebGPU, not even on the processor")
    if "refuses" in found:
        return {"refuses": " ".join(found["refuses"].split())[:200]}
    arrays = {
        name: np.frombuffer(base64.b64decode(tensor["data"]), tensor["type"]).reshape(tensor["dims"])
        for name, tensor in found["outputs"].items()
    }
    return {"error": largest_error(arrays, expected, valid)}
