"""A folder for onnxruntime-genai -> an endpoint that speaks OpenAI's text protocol.

Thin on purpose: `TextModel` generates, FastAPI and uvicorn speak HTTP. Here are the protocol's shapes and the limits:
how many texts at once, how large a request, how long it may take, and the end of a text whose reader has left.

Source: OpenAI API reference, "Completions", "Chat completions" and "Models".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ibnorm_export.errors import IBNormError
from ibnorm_export.serving.chat_template import ChatTemplate
from ibnorm_export.serving.request_size import SizeLimit
from ibnorm_export.text import Sampling, TextModel, TextResult

__all__ = ["TextLimits", "create_app", "serve_text"]

_FINISH: Final = {"end": "stop", "stop": "stop", "length": "length", "positions": "length"}


@dataclass(frozen=True, slots=True)
class TextLimits:
    """What the endpoint takes on.

    Args:
        concurrency: texts at once; more are refused with 429 and Retry-After.
        request_bytes: of a body; a larger one is refused with 413.
        request_s: seconds that a text may take; then it is refused with 504, or its stream ends with an error.

    Raises:
        IBNormError: a value is outside its range.
    """

    concurrency: int = 16
    request_bytes: int = 1 << 20
    request_s: float = 120.0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.request_bytes < 1 or not self.request_s > 0:
            raise IBNormError(f"the limits are {self}; each must be above 0")


class _Body(BaseModel):
    """What both kinds of request have; unknown fields are ignored, as clients send many."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int = 1
    logprobs: int | bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class _Completion(_Body):
    prompt: str | list[str]
    max_tokens: int | None = Field(16, ge=1)
    echo: bool = False


class _ChatMessage(BaseModel):
    role: str
    content: str


class _Chat(_Body):
    messages: list[_ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class _Refused(Exception):  # an answer to the client, told by its fields
    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


class _Ended(Exception):
    """The reader has left, or the time is up: raised inside the generating thread to leave its loop."""


def _answer(error: _Refused) -> JSONResponse:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    content = {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}
    return JSONResponse(content, error.status, error.headers)


class _Texts:
    """Generates in threads, at most so many at once; pieces come back to the event loop."""

    def __init__(self, model: TextModel, limits: TextLimits) -> None:
        self._model = model
        self._limits = limits
        self._pool = ThreadPoolExecutor(limits.concurrency, "text")
        self.running = 0

    async def generate(self, prompt: str, sampling: Sampling) -> AsyncIterator[str | TextResult]:
        """Pieces of the text, then its result. The text ends when this generator is closed.

        Raises:
            _Refused: there is no room, or the prompt does not fit, or the time is up.
        """
        if self.running >= self._limits.concurrency:
            raise _Refused(429, f"{self.running} texts are being written; try again", "busy", {"Retry-After": "1"})
        self.running += 1
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | TextResult | Exception] = asyncio.Queue()
        left = threading.Event()
        end = time.monotonic() + self._limits.request_s

        def put(item: str | TextResult | Exception) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        def write(piece: str) -> None:
            if left.is_set() or time.monotonic() > end:
                raise _Ended
            if piece:
                put(piece)

        def finished() -> None:
            self.running -= 1

        def work() -> None:
            try:
                put(self._model.generate(prompt, sampling, write))
            except _Ended:
                put(_Refused(504, f"the text took more than {self._limits.request_s:g} s", "timeout"))
            except IBNormError as error:
                put(_Refused(400, str(error), "context_length_exceeded" if "positions" in str(error) else "invalid"))
            except Exception as error:  # noqa: BLE001  # whatever it is, the reader must not wait for ever
                put(_Refused(500, f"{type(error).__name__}: {error}", "internal"))
            finally:
                loop.call_soon_threadsafe(finished)

        self._pool.submit(work)
        try:
            while True:
                item = await pieces.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, TextResult):
                    return
        finally:
            left.set()


@dataclass(frozen=True, slots=True)
class _Shape:
    """How one of the two endpoints words its answers."""

    prefix: str
    whole: str
    part: str
    choice: Callable[[str, bool], dict[str, Any]]


def _completion_choice(text: str, part: bool) -> dict[str, Any]:
    return {"text": text, "logprobs": None}


def _chat_choice(text: str, part: bool) -> dict[str, Any]:
    return {"delta" if part else "message": {"role": "assistant", "content": text}}


_COMPLETION: Final = _Shape("cmpl", "text_completion", "text_completion", _completion_choice)
_CHAT: Final = _Shape("chatcmpl", "chat.completion", "chat.completion.chunk", _chat_choice)


def _usage(result: TextResult) -> dict[str, int]:
    prompt, text = result.prompt_tokens, len(result.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": text, "total_tokens": prompt + text}


def create_app(
    model: TextModel, name: str, limits: TextLimits | None = None, template: ChatTemplate | None = None
) -> FastAPI:
    """The endpoint as an ASGI application.

    Args:
        model: what writes.
        name: that clients call it by.
        limits: see `TextLimits`.
        template: of the tokenizer; None leaves chat out.
    """
    limits = TextLimits() if limits is None else limits
    texts = _Texts(model, limits)
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(SizeLimit, limit=limits.request_bytes)
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "ibnorm-export"}

    @app.exception_handler(_Refused)
    async def refused(request: Request, error: _Refused) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _answer(_Refused(400, f"{where}: {first['msg']}".removeprefix(": "), "invalid"))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        return _answer(_Refused(error.status_code, str(error.detail), "invalid"))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": texts.running, "limit": limits.concurrency}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        _check_name(wanted, name)
        return about

    @app.post("/v1/completions")
    async def complete(request: Request, body: _Completion) -> Any:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1 or body.echo:
            raise _Refused(400, "one prompt a request, without echo, is what this endpoint takes", "invalid")
        return await _respond(request, texts, body, prompts[0], body.max_tokens or 16, name, _COMPLETION)

    if template is not None:

        @app.post("/v1/chat/completions")
        async def chat(request: Request, body: _Chat) -> Any:
            prompt = template.render([message.model_dump() for message in body.messages])
            most = body.max_completion_tokens or body.max_tokens or model.max_positions
            return await _respond(request, texts, body, prompt, most, name, _CHAT)

    return app


def _check_name(wanted: str, name: str) -> None:
    if wanted != name:
        raise _Refused(404, f"the model {wanted!r} does not exist; this endpoint has {name!r}", "model_not_found")


async def _respond(
    request: Request, texts: _Texts, body: _Body, prompt: str, most: int, name: str, shape: _Shape
) -> Any:
    _check_name(body.model, name)
    if body.n != 1 or body.logprobs:
        raise _Refused(400, "n above 1 and logprobs are not offered by this endpoint", "invalid")
    seed = uuid.uuid4().int % 2**32 if body.seed is None else body.seed
    pieces = texts.generate(prompt, Sampling(most, body.temperature, body.top_p, seed, body.stops))
    head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if body.stream:
        first = await anext(pieces)  # what is refused is refused with its own status
        return StreamingResponse(_events(pieces, first, head, body, shape), media_type="text/event-stream")
    result = await _unless_gone(request, pieces)
    choice = {"index": 0, **shape.choice(result.text, False), "finish_reason": _FINISH[result.stopped]}
    return {**head, "object": shape.whole, "choices": [choice], "usage": _usage(result)}


async def _unless_gone(request: Request, pieces: AsyncIterator[str | TextResult]) -> TextResult:
    """The result, or an end to the text when its reader leaves."""

    async def last() -> TextResult:
        return [item async for item in pieces][-1]  # type: ignore[return-value]  # a result comes last

    task = asyncio.ensure_future(last())
    while not (await asyncio.wait({task}, timeout=0.25))[0]:
        if await request.is_disconnected():
            task.cancel()
            break
    try:
        return await task
    except asyncio.CancelledError:
        raise _Refused(499, "the client has left", "cancelled") from None


async def _events(
    pieces: AsyncIterator[str | TextResult], first: str | TextResult, head: dict[str, Any], body: _Body, shape: _Shape
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
                yield event({"choices": choice("", _FINISH[item.stopped])})
                if (body.stream_options or {}).get("include_usage"):
                    yield event({"choices": [], "usage": _usage(item)})
    except _Refused as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'code': error.code}})}\n\n"
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]  # an asynchronous generator
    yield "data: [DONE]\n\n"


@contextlib.contextmanager
def _listening(address: str, port: int) -> Iterator[socket.socket]:
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
    from ibnorm_export.text import open_folder

    folder = Path(folder)
    template = ChatTemplate.of(folder)
    with _listening(address, port) as stream:
        model = open_folder(folder)
        app = create_app(model, folder.resolve().name, limits, template)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=finish_s, lifespan="off"
        )
        paths = [route.path for route in app.routes if hasattr(route, "path")]
        server = uvicorn.Server(config)
        stream.listen(2048)
        ready(f"{address}:{stream.getsockname()[1]}", paths)
        server.run(sockets=[stream])
