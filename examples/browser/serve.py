"""Serve the page of this folder on this machine, with the headers that WebAssembly threads need.

    ibnorm-export demo --out demo
    mkdir web
    ibnorm-export export demo/llama -o web/llama --target transformers.js --dtype fp32
    ibnorm-export export demo/vit -o web/vit --target transformers.js --dtype fp32
    npm install --prefix web --ignore-scripts @huggingface/transformers@4.3.2
    python examples/browser/serve.py web

It needs only Python's standard library. A server of your own must send the same headers (`HEADERS`), and
`application/wasm` for .wasm files.
"""

from __future__ import annotations

import argparse
import http.server
from pathlib import Path
from typing import ClassVar

HERE = Path(__file__).resolve().parent

#: Browsers share memory between threads only in a page that is isolated from those of others.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",
}


def folders(models: Path, modules: Path) -> dict[str, Path]:
    """Return the folder of each address that begins with a name; the page itself is at /.

    Args:
        models: has the exported folders llama and vit.
        modules: the node_modules with transformers.js. It may have its own ONNX Runtime below it.
    """
    library = modules / "@huggingface" / "transformers"
    own = library / "node_modules" / "onnxruntime-web" / "dist"
    runtime = own if own.is_dir() else modules / "onnxruntime-web" / "dist"
    return {"lib": library / "dist", "ort": runtime, "models": models}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the page, and of the folders of the server."""

    extensions_map: ClassVar[dict[str, str]] = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def translate_path(self, path: str) -> str:
        assert isinstance(self.server, Server)
        inside = Path(super().translate_path(path)).relative_to(HERE)  # without "..", by the base class
        if inside.parts and inside.parts[0] in self.server.folders:
            return str(self.server.folders[inside.parts[0]].joinpath(*inside.parts[1:]))
        return str(HERE / inside)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Report nothing: the browser does."""


class Server(http.server.ThreadingHTTPServer):
    """A server on loopback.

    Args:
        port: its port; 0 is any that is free.
        folders: the folder of each address, as `folders` returns them.
    """

    def __init__(self, port: int, folders: dict[str, Path]) -> None:
        self.folders = folders
        super().__init__(("127.0.0.1", port), lambda *given: Handler(*given, directory=str(HERE)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the example page on this machine.")
    parser.add_argument("models", type=Path, help="Folder with the exports llama and vit, and node_modules.")
    parser.add_argument("--modules", type=Path, help="Another node_modules with transformers.js.")
    parser.add_argument("--port", type=int, default=8080, help="Port on 127.0.0.1 (default: %(default)s).")
    given = parser.parse_args()
    found = folders(given.models, given.modules or given.models / "node_modules")
    for needed in (found["lib"] / "transformers.min.js", given.models / "llama", given.models / "vit"):
        if not needed.exists():
            parser.error(f"{needed} is missing; the top of {Path(__file__).name} has the commands that make it")
    with Server(given.port, found) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
