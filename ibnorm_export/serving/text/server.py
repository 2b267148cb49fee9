"""Serve a text folder with an endpoint that speaks OpenAI's text protocol.

A worker process generates texts, a `TextQueue` passes their pieces on, and FastAPI and uvicorn speak HTTP.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from ibnorm_export import __version__
from ibnorm_export.errors import IBNormError
from ibnorm_export.serving.options import ReadyServer, ServeOptions
from ibnorm_export.serving.ports import bound_socket
from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.app import create_app, served_paths
from ibnorm_export.serving.text.http_limits import HEAD_BYTES
from ibnorm_export.serving.text.metrics import Metrics
from ibnorm_export.serving.text.middleware import AdmissionMiddleware, HostMiddleware
from ibnorm_export.serving.text.observation import KeyMiddleware, ObservationMiddleware
from ibnorm_export.serving.text.template_process import template_process
from ibnorm_export.serving.text.worker_process import WorkerProcess, worker_process

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp

__all__ = ["serve_text"]


def serve_text(
    folder: str | Path,
    *,
    options: ServeOptions | None = None,
    ready: Callable[[ReadyServer], None] = lambda server: None,
) -> None:
    """Serve a folder for text generation until Ctrl-C or SIGTERM; then let texts in flight finish.

    Args:
        folder: a folder of `export --target ort-genai` or of `export --task text-generation`.
        options: see `ServeOptions`; None means the defaults.
        ready: called once, when the endpoint accepts requests.

    Raises:
        ModelFileError: the folder, its tokenizer or its op library is incomplete, damaged or changed.
        BackendUnavailable: the runtime is not installed.
        IBNormError: the port is in use, or the worker ends by itself.
    """
    options = ServeOptions() if options is None else options
    config = uvicorn.Config(
        "",
        http=_http_protocol(options.text.request_bytes),
        ws="none",
        log_level="critical",  # a warning for every request that is not HTTP would let a client fill a disk
        access_log=False,
        timeout_graceful_shutdown=options.finish_s,
        lifespan="off",
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    server = _Server(config)
    with (
        bound_socket(options.address, options.http_port, option="--http-port") as stream,
        asyncio.Runner(loop_factory=config.get_loop_factory()) as runner,
    ):
        try:
            runner.run(_serve(server, Path(folder), stream=stream, options=options, ready=ready))
        except KeyboardInterrupt:  # uvicorn raises it again after an orderly end
            if not server.started:
                raise


def _http_protocol(request_bytes: int) -> Any:
    """uvicorn's protocol on httptools with limits; "auto" without httptools, which means h11 with its own limit."""
    try:
        from ibnorm_export.serving.text.httptools_protocol import limited_protocol
    except ModuleNotFoundError:
        return "auto"
    return limited_protocol(request_bytes)


class _Server(uvicorn.Server):
    """Reports when it is ready, and ends unfinished texts before uvicorn closes their connections."""

    end_texts: Callable[[str], None]
    report_ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.report_ready()  # from here on SIGTERM leads to an orderly end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        finish_s = self.config.timeout_graceful_shutdown or 0
        asyncio.get_running_loop().call_later(0.9 * finish_s, self.end_texts, "the endpoint is stopping")
        await super().shutdown(sockets)


async def _serve(
    server: _Server,
    folder: Path,
    *,
    stream: socket.socket,
    options: ServeOptions,
    ready: Callable[[ReadyServer], None],
) -> None:
    settings = options.settings
    name = settings.model_name or folder.resolve().name
    async with template_process(folder, settings.chat_template) as template, worker_process(folder) as worker:
        metrics = Metrics(time.time(), {"version": __version__, "model": name})
        queue = TextQueue(worker.send, options.text, metrics=metrics)
        app = create_app(queue, name, max_positions=worker.max_positions, template=template)
        server.config.app, server.end_texts = _guarded(app, queue, options=options), queue.end
        listening = asyncio.ensure_future(_pass_messages(worker, queue, server=server))
        stream.listen(2048)
        host, port = stream.getsockname()[:2]
        report = ReadyServer(
            f"{host}:{port}",
            os.getpid(),
            models=(name,),
            paths=tuple(served_paths(app)),
            needs_key=bool(settings.api_key),
        )
        server.report_ready = lambda: ready(report)
        try:
            await server.serve(sockets=[stream])
        finally:
            if listening.done():
                raise IBNormError(listening.result())
            listening.cancel()


def _guarded(app: FastAPI, queue: TextQueue, *, options: ServeOptions) -> ASGIApp:
    """The application behind what refuses early, and what an operator sees of every request, refused ones too."""
    guarded: ASGIApp = AdmissionMiddleware(app, queue)
    if options.settings.api_key:
        guarded = KeyMiddleware(guarded, options.settings.api_key)
    guarded = HostMiddleware(guarded, (options.address, *options.allowed_hosts))
    log = _write_line if options.settings.log_requests else None
    return ObservationMiddleware(guarded, queue.metrics, paths=served_paths(app), log=log)


def _write_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _pass_messages(worker: WorkerProcess, queue: TextQueue, *, server: _Server) -> str:
    """Pass the worker's messages on until it ends, then stop the server and return the reason."""
    reason = "a message from the process that generates texts cannot be read"
    try:
        async for message in worker.messages():
            queue.receive(message)
        reason = await worker.wait()
    finally:
        queue.end(reason)
        server.should_exit = True
    return reason
