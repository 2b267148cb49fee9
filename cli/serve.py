"""`ibnorm-export serve`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import err, out, print_json
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.serving.triton.server import ServerOptions, serve


@contextlib.contextmanager
def _repository(path: Path) -> Iterator[Path]:
    """`path` where it is a repository; else one made of the model that it is, for as long as the block runs."""
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.manifest import MANIFEST_FILE
    from ibnorm_export.serving.triton.repository import package

    if (path / MANIFEST_FILE).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ibnorm-repository.") as folder:
        yield package(ExportedModel(path), Path(folder) / "repository").path


def _serve_text(folder: Path, address: str, *, port: int, limits: dict[str, Any], as_json: bool) -> None:
    try:
        from ibnorm_export.serving.text.admission import TextLimits
        from ibnorm_export.serving.text.server import serve_text
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"the text endpoint needs the package {error.name}: pip install 'ibnorm-export[serve,genai]'"
        ) from error

    def ready(endpoint: str, paths: Sequence[str]) -> None:
        if as_json:
            print_json({"http": endpoint, "grpc": "", "pid": os.getpid(), "paths": paths})
        else:
            out.print(f"ready: http://{endpoint} ({', '.join(paths)})", style="bold", markup=False)
        out.file.flush()

    serve_text(folder, address, port=port, limits=TextLimits(**limits), ready=ready)


def serve_command(
    path: Annotated[
        Path, typer.Argument(metavar="REPO|MODEL.onnx|GENAI_DIR", exists=True, help="Of `package`, or of `export`.")
    ],
    address: Annotated[str, typer.Option("--address", help="To listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option("--http-port", help="0 takes one that is free.")] = 8000,
    grpc_port: Annotated[int, typer.Option("--grpc-port", help="0 takes one that is free.")] = 8001,
    metrics_port: Annotated[int, typer.Option("--metrics-port", help="0 takes one that is free.")] = 8002,
    log: Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Of the server.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Texts at once; more get 429.")] = 16,
    max_waiting: Annotated[
        int | None, typer.Option("--max-waiting", min=1, help="Texts without a first token yet; more get 429.")
    ] = None,
    max_request: Annotated[int, typer.Option("--max-request", min=1, metavar="BYTES", help="Of a text request.")] = (
        1 << 20
    ),
    max_seconds: Annotated[float, typer.Option("--max-seconds", help="That a text may take.")] = 120.0,
    as_json: options.AsJson = False,
) -> None:
    """Run a server on this machine until Ctrl-C or SIGTERM, then let requests in flight finish.

    A repository or an ONNX file gets a real Triton; a folder for onnxruntime-genai gets an endpoint that speaks
    OpenAI's text protocol, with the limits --concurrency, --max-waiting, --max-request and --max-seconds.

    Example: ibnorm-export serve repository
    """
    from ibnorm_export.artifacts.manifest import read_manifest

    if (path / "genai_config.json").is_file():
        limits = {
            "concurrency": concurrency,
            "waiting": max_waiting,
            "request_bytes": max_request,
            "request_s": max_seconds,
        }
        _serve_text(path, address, port=http_port, limits=limits, as_json=as_json)
        return
    wanted = ServerOptions(address, http_port, grpc_port=grpc_port, metrics_port=metrics_port, log=log)
    with _repository(path) as repository, serve(repository, wanted) as server:
        models = list(read_manifest(repository)["models"])
        if as_json:
            print_json(
                {
                    "http": server.http,
                    "grpc": server.grpc,
                    "metrics": server.metrics,
                    "pid": server.pid,
                    "models": models,
                }
            )
        else:
            out.print(f"ready: {', '.join(models)}", style="bold", markup=False)
            for name in ("http", "grpc", "metrics"):
                out.print(f"{name}: {getattr(server, name)}", markup=False)
        out.file.flush()
        try:
            server.wait()
        except KeyboardInterrupt:
            err.print("stopping: requests in flight finish, new ones are refused", style="dim")
