"""Serve a model on this machine: a repository or a file with Triton, a text folder with the text endpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.manifest import MANIFEST_FILE, read_manifest
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.serving.options import ReadyServer, ServeOptions

__all__ = ["serve"]


def _ignore() -> None:
    pass


def serve(
    source: ExportedModel | str | Path,
    *,
    options: ServeOptions | None = None,
    ready: Callable[[ReadyServer], None] = lambda server: None,
    stopping: Callable[[], None] = _ignore,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM; then let requests in flight finish.

    Args:
        source: what to serve. A folder of `package`, an exported file or its path gets a Triton server; a folder of
            `export --target ort-genai` gets an endpoint that speaks OpenAI's text protocol.
        options: see `ServeOptions`; None means the defaults.
        ready: called once, when the server accepts requests.
        stopping: called when Triton begins to stop.

    Raises:
        ModelFileError: the folder is incomplete, damaged or changed.
        BackendUnavailable: the server, or a package that it needs, is not installed.
        IBNormError: a port is in use, or the server ends by itself; the message quotes its log.
    """
    options = ServeOptions() if options is None else options
    if not isinstance(source, ExportedModel) and (Path(source) / GENAI_CONFIG_FILE).is_file():
        _serve_text(Path(source), options, ready=ready)
    else:
        _serve_triton(source, options, ready=ready, stopping=stopping)


def _serve_text(folder: Path, options: ServeOptions, *, ready: Callable[[ReadyServer], None]) -> None:
    try:
        from ibnorm_export.serving.text.server import serve_text
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"the text endpoint needs the package {error.name}: pip install 'ibnorm-export[serve,genai]'"
        ) from error
    serve_text(folder, options=options, ready=ready)


def _serve_triton(
    source: ExportedModel | str | Path,
    options: ServeOptions,
    *,
    ready: Callable[[ReadyServer], None],
    stopping: Callable[[], None],
) -> None:
    from ibnorm_export.serving.triton.server import triton_server  # it needs POSIX

    with _repository(source) as repository, triton_server(repository, options) as server:
        models = tuple(read_manifest(repository)["models"])
        ready(ReadyServer(server.http, server.pid, models=models, grpc=server.grpc, metrics=server.metrics))
        try:
            server.wait()
        except KeyboardInterrupt:
            stopping()


@contextlib.contextmanager
def _repository(source: ExportedModel | str | Path) -> Iterator[Path]:
    """Yield the repository itself, or one that is packaged from a model and exists while the block runs."""
    from ibnorm_export.serving.triton.repository import package

    if not isinstance(source, ExportedModel) and (Path(source) / MANIFEST_FILE).is_file():
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="ibnorm-repository.") as folder:
        yield package(source, Path(folder) / "repository").path
