"""ASGI middleware for operators: an id, a line of the log and a count for every request, and the check of the key."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ibnorm_export.errors import printable, shortened
from ibnorm_export.serving.text.metrics import Metrics
from ibnorm_export.serving.text.protocol import Refused
from ibnorm_export.serving.text.responses import error_response

__all__ = ["KeyMiddleware", "ObservationMiddleware"]

#: An id that a client may choose; any other is replaced.
_ID: Final = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)

#: What is answered without a key: a load balancer asks whether the endpoint is alive.
_OPEN: Final = "/health"

#: The status of a request whose client disconnected before the answer began, as in nginx's log.
_DISCONNECTED: Final = 499


class ObservationMiddleware:
    """Gives every request an id, counts it, and writes a line of JSON about it.

    The id is the client's `X-Request-Id`, or a new one; the answer has it in the same header.

    Args:
        app: the application.
        metrics: what counts.
        paths: paths that are served.
        log: takes a line for each request; None writes no log.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, paths: Collection[str], log: Callable[[str], None] | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        start, status = time.perf_counter(), _DISCONNECTED

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500  # uvicorn answers so if nothing has been sent
            raise
        finally:
            seconds = time.perf_counter() - start
            path = scope["path"] if scope["path"] in self._paths else "other"
            error = str(state.get("stream_error", ""))
            self._metrics.count_request(path, status, seconds=seconds, stream_error=error)
            if self._log is not None:
                self._log(_line(scope, state, name=name, status=status, seconds=seconds))


def _line(scope: Scope, state: dict[str, Any], *, name: str, status: int, seconds: float) -> str:
    """One request as a line of JSON. It has neither the prompt nor the text, which may be private."""
    client = scope.get("client")
    content = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "id": name,
        "client": None if client is None else client[0],
        "method": printable(shortened(scope["method"])),
        "path": printable(shortened(scope["path"])),
        "status": status,
        "seconds": round(seconds, 6),
        **state.get("usage", {}),
    }
    if "stream_error" in state:
        content["error"] = state["stream_error"]
    return json.dumps(content)


class KeyMiddleware:
    """Refuses a request without the endpoint's key, unless it asks for `/health`.

    Args:
        app: the application.
        key: the key.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != _OPEN and not self._has_key(Headers(scope=scope)):
            reason = "the API key is missing or wrong: send the header `Authorization: Bearer KEY`"
            refused = Refused(401, reason, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await error_response(refused)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        # digests have one length, so the time of the comparison depends neither on the key nor on what is right of it
        digest = hashlib.sha256(given.strip().encode()).digest()
        return kind.lower() == "bearer" and hmac.compare_digest(digest, self._digest)
