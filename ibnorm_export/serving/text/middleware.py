"""ASGI middleware of the text endpoint: requests without room and bodies that are too large are refused early."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ibnorm_export.errors import quoted
from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.protocol import Refused
from ibnorm_export.serving.text.responses import error_response

__all__ = ["AdmissionMiddleware", "BodySizeMiddleware", "HostMiddleware"]


def _host_name(header: str) -> str:
    """The name in a Host header, without the port."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.lower().rstrip(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class HostMiddleware:
    """Refuses a request whose Host header names another machine.

    A page in a browser on this machine can reach an endpoint on loopback under a name that resolves to
    127.0.0.1; the Host header still has that name.

    Args:
        app: the application.
        hosts: names and addresses that are accepted besides those of loopback; "*" accepts every name.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = {_host_name(host) if host.count(":") < 2 else host.strip("[]").lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self._hosts:
            found = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            name = _host_name(found[0]) if len(found) == 1 else ""
            if not _is_loopback(name) and name not in self._hosts:
                reason = (
                    f"the Host header is {quoted(', '.join(found))}, which this endpoint does not serve; start it with "
                    "`ibnorm-export serve --allowed-host NAME` to accept a name"
                )
                await error_response(Refused(421, reason, code="host"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


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
