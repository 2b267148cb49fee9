"""ASGI middleware of the text endpoint: requests without room and bodies that are too large are refused early."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.protocol import Refused
from ibnorm_export.serving.text.responses import error_response

__all__ = ["AdmissionMiddleware", "BodySizeMiddleware"]


class AdmissionMiddleware:
    """Refuses a request for a text before its body is read, if there is no room for the text.

    In a burst the refused requests then cost the accepted ones little.

    Args:
        app: the application.
        queue: the texts that are being generated.
    """

    def __init__(self, app: ASGIApp, queue: TextQueue) -> None:
        self._app = app
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._queue.check_room()
            except Refused as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodySizeMiddleware:
    """Refuses a body that is larger than the limit, whatever its headers claim.

    Args:
        app: the application.
        limit: size in bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, f"the request has more than {self._limit} bytes")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
