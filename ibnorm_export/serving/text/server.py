"""A folder for onnxruntime-genai -> an endpoint that speaks OpenAI's text protocol.

Thin on purpose: a `TextProcess` writes, `Texts` hands its pieces on, FastAPI and uvicorn speak HTTP.

Source: OpenAI API reference, "Completions", "Chat completions" and "Models".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ibnorm_export.errors import IBNormError, PromptError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult
from ibnorm_export.serving.text.admission import TextLimits, Texts
from ibnorm_export.serving.text.chat_template import ChatTemplate
from ibnorm_export.serving.text.protocol import (
    CHAT,
    COMPLETION,
    FINISH,
    Body,
    Chat,
    Completion,
    Refused,
    Shape,
    usage,
)
from ibnorm_export.serving.text.request_size import SizeLimit
from ibnorm_export.serving.text.worker_process import text_process

__all__ = ["Door", "create_app", "serve_text"]

T = TypeVar("T")

#: Stop texts of a request, and characters of each: all are looked for behind every token. OpenAI takes as many.
_STOPS: Final = (4, 1024)


def _answer(error: Refused) -> JSONResponse:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    content = {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}
    return JSONResponse(content, error.status, error.headers)


class Door:
    """ASGI middleware: where there is no room for a text, its request is refused unread.

    In a burst those who are refused then cost those who are admitted little.

    Args:
        app: behind the door.
        texts: that are being written.
    """

    def __init__(self, app: ASGIApp, texts: Texts) -> None:
        self._app = app
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._texts.check_room()
            except Refused as error:
                await _answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def create_app(texts: Texts, name: str, *, max_positions: int, template: ChatTemplate | None = None) -> FastAPI:
    """The endpoint as an ASGI application.

    Args:
        texts: what writes, and how much at once.
        name: that clients call it by.
        max_positions: the most tokens of prompt and text together.
        template: of the tokenizer; None leaves chat out.
    """
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(SizeLimit, limit=texts.limits.request_bytes)
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "ibnorm-export"}

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            why = f"the body is not valid JSON: {first['ctx']['error']}, at character {first['loc'][1]}"
        else:
            why = f"{'.'.join(str(part) for part in first['loc'][1:]) or 'the body'}: {first['msg']}"
        return _answer(Refused(400, why, code="invalid"))

    @app.exception_handler(PromptError)
    async def unusable(request: Request, error: PromptError) -> JSONResponse:
        return _answer(Refused(400, str(error), code="invalid"))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        why = str(error.detail)
        if error.status_code == 404:
            why = f"{request.url.path} is not served here: {', '.join(_paths(app))} are"
            if request.url.path == "/v1/chat/completions":
                why += " (the tokenizer has no chat template)"
        return _answer(Refused(error.status_code, why, code="invalid"))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        limit = texts.limits.concurrency
        return {"status": "ok", "running": texts.running, "waiting": texts.waiting, "limit": limit}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        _check_name(wanted, name)
        return about

    @app.post("/v1/completions")
    async def complete(request: Request, body: Completion) -> Any:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1:
            raise Refused(400, "one prompt a request is what this endpoint takes", code="invalid")
        return await _respond(
            request, texts, body=body, prompt=prompts[0], most=body.max_tokens or 16, name=name, shape=COMPLETION
        )

    if template is not None:

        @app.post("/v1/chat/completions")
        async def chat(request: Request, body: Chat) -> Any:
            prompt = template.render([message.model_dump() for message in body.messages])
            most = body.max_completion_tokens or body.max_tokens or max_positions
            return await _respond(request, texts, body=body, prompt=prompt, most=most, name=name, shape=CHAT)

    return app


def _paths(app: FastAPI) -> list[str]:
    return [route.path for route in app.routes if hasattr(route, "path") and "{" not in route.path]


def _check_name(wanted: str, name: str) -> None:
    if wanted != name:
        raise Refused(404, f"the model {wanted!r} does not exist; this endpoint has {name!r}", code="model_not_found")


async def _respond(
    request: Request, texts: Texts, *, body: Body, prompt: str, most: int, name: str, shape: Shape
) -> Any:
    _check_name(body.model, name)
    if asked := body.not_offered:
        raise Refused(400, f"{', '.join(asked)}: not offered by this endpoint; leave it out", code="invalid")
    if len(body.stops) > _STOPS[0] or any(len(stop) > _STOPS[1] for stop in body.stops):
        why = f"stop takes at most {_STOPS[0]} texts of at most {_STOPS[1]} characters"
        raise Refused(400, why, code="invalid")
    seed = uuid.uuid4().int % 2**32 if body.seed is None else body.seed
    pieces = texts.generate(prompt, Sampling(most, body.temperature, top_p=body.top_p, seed=seed, stop=body.stops))
    head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if body.stream:
        first = await _unless_gone(request, anext(pieces))  # what is refused is refused with its own status
        return StreamingResponse(
            _events(pieces, first, head=head, body=body, shape=shape), media_type="text/event-stream"
        )
    result = await _unless_gone(request, _last(pieces))
    choice = {"index": 0, **shape.choice(result.text, False), "finish_reason": FINISH[result.stopped]}
    return {**head, "object": shape.whole, "choices": [choice], "usage": usage(result)}


async def _last(pieces: AsyncIterator[str | TextResult]) -> TextResult:
    return [item async for item in pieces][-1]  # type: ignore[return-value]  # a result comes last


async def _unless_gone(request: Request, awaited: Awaitable[T]) -> T:
    """What is awaited, or an end to it when its reader leaves."""
    task = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait({task}, timeout=0.25))[0]:
            if await request.is_disconnected():
                raise Refused(499, "the client has left", code="cancelled")
        return task.result()
    finally:
        task.cancel()


async def _events(
    pieces: AsyncIterator[str | TextResult], first: str | TextResult, *, head: dict[str, Any], body: Body, shape: Shape
) -> AsyncIterator[str]:
    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps({**head, 'object': shape.part, **content})}\n\n"

    def choice(text: str, reason: str | None) -> list[dict[str, Any]]:
        return [{"index": 0, **shape.choice(text, True), "finish_reason": reason}]

    async def all_of_them() -> AsyncIterator[str | TextResult]:
        yield first
        if isinstance(first, str):
            async for item in pieces:
                yield item

    try:
        async for item in all_of_them():
            if isinstance(item, str):
                yield event({"choices": choice(item, None)})
            else:
                yield event({"choices": choice("", FINISH[item.stopped])})
                if (body.stream_options or {}).get("include_usage"):
                    yield event({"choices": [], "usage": usage(item)})
    except Refused as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'code': error.code}})}\n\n"
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]  # an asynchronous generator
    yield "data: [DONE]\n\n"


@contextlib.contextmanager
def _listening(address: str, port: int) -> Iterator[socket.socket]:
    if not 0 <= port <= 65535:
        raise IBNormError(f"the port is {port}; it must be 0 (any that is free) to 65535")
    with socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            stream.bind((address, port))
        except OSError as error:
            raise IBNormError(
                f"cannot listen on {address}:{port}: {error.strerror}; choose another with --http-port, or 0 for any "
                "that is free"
            ) from error
        yield stream


def serve_text(
    folder: str | Path,
    address: str = "127.0.0.1",
    *,
    port: int = 8000,
    limits: TextLimits | None = None,
    ready: Callable[[str, Sequence[str]], None] = lambda endpoint, paths: None,
    finish_s: int = 5,
) -> None:
    """Serve a folder for text generation until SIGTERM or Ctrl-C; then texts in flight have time to finish.

    Args:
        folder: of `export --target ort-genai`, or of `export --task text-generation`.
        address, port: to listen on; port 0 takes one that is free.
        limits: see `TextLimits`.
        ready: gets HOST:PORT and the paths served, when they are.
        finish_s: seconds that texts have to finish.

    Raises:
        ModelFileError: the folder, its tokenizer or its op library is incomplete, damaged or changed.
        BackendUnavailable: the runtime is not installed.
        IBNormError: the port is in use.
    """
    config = uvicorn.Config(
        "", log_level="warning", access_log=False, timeout_graceful_shutdown=finish_s, lifespan="off"
    )
    limits = TextLimits() if limits is None else limits
    server = _Server(config)
    with (
        _listening(address, port) as stream,
        asyncio.Runner(loop_factory=config.get_loop_factory()) as runner,
    ):
        try:
            runner.run(_serve_text(server, Path(folder), stream=stream, limits=limits, ready=ready))
        except KeyboardInterrupt:  # uvicorn raises again what it has obeyed: the orderly end
            if not server.started:
                raise


class _Server(uvicorn.Server):
    """Says when it is ready; ends what is still being written before uvicorn does, so that its readers are told."""

    end: Callable[[str], None]
    ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()  # not before: SIGTERM ends it in order from here on

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        finish_s = self.config.timeout_graceful_shutdown or 0
        asyncio.get_running_loop().call_later(0.9 * finish_s, self.end, "the endpoint is stopping")
        await super().shutdown(sockets)


async def _serve_text(
    server: _Server,
    folder: Path,
    *,
    stream: socket.socket,
    limits: TextLimits,
    ready: Callable[[str, Sequence[str]], None],
) -> None:
    template = ChatTemplate.of(folder)
    async with text_process(folder) as process:
        texts = Texts(process.send, limits)
        app = create_app(texts, folder.resolve().name, max_positions=process.max_positions, template=template)
        server.config.app, server.end = Door(app, texts), texts.end

        async def listen() -> str:
            why = "what the process that writes texts says cannot be understood"
            try:
                async for message in process.messages():
                    texts.receive(message)
                why = await process.ended()
            finally:
                texts.end(why)
                server.should_exit = True
            return why

        listening = asyncio.ensure_future(listen())
        stream.listen(2048)
        host, port = stream.getsockname()[:2]
        server.ready = lambda: ready(f"{host}:{port}", _paths(app))
        try:
            await server.serve(sockets=[stream])
        finally:
            if listening.done():
                raise IBNormError(listening.result())
            listening.cancel()
