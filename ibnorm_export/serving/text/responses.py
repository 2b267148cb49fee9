"""Answers of the text endpoint: one object, a stream of events, or an error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from ibnorm_export.errors import printable, quoted, shortened
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult
from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.protocol import FINISH_REASONS, Body, Refused, Shape, usage

__all__ = ["TextRequest", "check_model", "error_response", "respond"]

T = TypeVar("T")

#: Stop texts in a request, and characters in each: each is searched for after every token. OpenAI has the same number.
_MAX_STOPS: Final = 4
_MAX_STOP_CHARACTERS: Final = 1024

#: Characters of the reason in an error. It is text for people, so unpaired surrogates are escaped as on a terminal.
_MAX_REASON: Final = 2000

#: Seconds between two checks whether the client has disconnected.
_DISCONNECT_CHECK_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A request for a text.

    Args:
        body: the body of the request.
        prompt: the prompt.
        max_tokens: maximum number of tokens of the text.
        shape: form of the answer.
    """

    body: Body
    prompt: str
    _: KW_ONLY
    max_tokens: int
    shape: Shape


def error_response(error: Refused) -> JSONResponse:
    """Return an error in OpenAI's form."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    content = {
        "error": {
            "message": printable(shortened(str(error), _MAX_REASON)),
            "type": kind,
            "param": None,
            "code": error.code,
        }
    }
    return JSONResponse(content, error.status, error.headers)


def check_model(wanted: str, name: str) -> None:
    """Check that a request names the model that is served.

    Raises:
        Refused: it names another model.
    """
    if wanted != name:
        raise Refused(
            404, f"the model {quoted(wanted)} does not exist; this endpoint has {name!r}", code="model_not_found"
        )


async def respond(request: Request, queue: TextQueue, *, text: TextRequest, model: str) -> Any:
    """Generate a text, and return it whole or as a stream, as the request specifies.

    Raises:
        Refused: the request asks for something that is not available, or the text cannot be generated.
    """
    body, shape = text.body, text.shape
    _check(body, model)
    seed = uuid.uuid4().int % 2**32 if body.seed is None else body.seed
    sampling = Sampling(text.max_tokens, body.temperature, top_p=body.top_p, seed=seed, stop=body.stops)
    pieces = _noted(queue.generate(text.prompt, sampling), request)
    head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    if body.stream:
        first = await _until_disconnected(request, anext(pieces))  # an error here still gets its own status
        events = _events(pieces, first, request=request, head=head, text=text)
        return StreamingResponse(events, media_type="text/event-stream")
    result = await _until_disconnected(request, _result(pieces))
    choice = {"index": 0, **shape.choice(result.text, False), "finish_reason": FINISH_REASONS[result.stopped]}
    return {**head, "object": shape.whole, "choices": [choice], "usage": usage(result)}


def _check(body: Body, model: str) -> None:
    check_model(body.model, model)
    if unsupported := body.unsupported:
        raise Refused(400, f"{', '.join(unsupported)}: not supported by this endpoint; leave it out", code="invalid")
    if len(body.stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_CHARACTERS for stop in body.stops):
        reason = f"stop takes at most {_MAX_STOPS} texts of at most {_MAX_STOP_CHARACTERS} characters"
        raise Refused(400, reason, code="invalid")


async def _result(pieces: AsyncIterator[str | TextResult]) -> TextResult:
    return [item async for item in pieces][-1]  # type: ignore[return-value]  # the last item is the result


async def _until_disconnected(request: Request, awaited: Awaitable[T]) -> T:
    """Return what is awaited, and cancel it if the client disconnects."""
    task = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait({task}, timeout=_DISCONNECT_CHECK_S))[0]:
            if await request.is_disconnected():
                raise Refused(499, "the client has disconnected", code="cancelled")
        return task.result()
    finally:
        task.cancel()


async def _events(
    pieces: AsyncGenerator[str | TextResult, None],
    first: str | TextResult,
    *,
    request: Request,
    head: dict[str, Any],
    text: TextRequest,
) -> AsyncIterator[str]:
    """Yield server-sent events: one for each piece, one with the finish reason, and the usage if it is requested."""
    body, shape = text.body, text.shape

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps({**head, 'object': shape.part, **content})}\n\n"

    def choice(text: str, reason: str | None) -> list[dict[str, Any]]:
        return [{"index": 0, **shape.choice(text, True), "finish_reason": reason}]

    try:
        async for item in _with_first(first, pieces):
            if isinstance(item, str):
                yield event({"choices": choice(item, None)})
            else:
                yield event({"choices": choice("", FINISH_REASONS[item.stopped])})
                if (body.stream_options or {}).get("include_usage"):
                    yield event({"choices": [], "usage": usage(item)})
    except Refused as error:
        request.state.stream_error = error.code
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'code': error.code}})}\n\n"
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


async def _noted(
    pieces: AsyncGenerator[str | TextResult, None], request: Request
) -> AsyncGenerator[str | TextResult, None]:
    """Yield the pieces, and note the number of tokens for the log of requests."""
    async with contextlib.aclosing(pieces):
        async for item in pieces:
            if isinstance(item, TextResult):
                request.state.usage = usage(item)
            yield item


async def _with_first(
    first: str | TextResult, pieces: AsyncIterator[str | TextResult]
) -> AsyncIterator[str | TextResult]:
    yield first
    if isinstance(first, str):
        async for item in pieces:
            yield item
