"""uvicorn's protocol on httptools, with limits of a request before the application sees it.

httptools has no such limits: it keeps whatever a client sends until the headers end.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ibnorm_export.serving.text.http_limits import HEAD_BYTES, URL_BYTES

__all__ = ["limited_protocol"]

#: Seconds in which the headers of a request must arrive.
_HEAD_S: Final = 20.0

#: Seconds in which a client may read why it is refused while it still sends.
_LINGER_S: Final = 1.0

#: How many times the size of its body a request may have on the wire: chunks of one byte have six.
_MAX_OVERHEAD: Final = 8


def _refusal(status: HTTPStatus, reason: str) -> bytes:
    """A whole answer in OpenAI's form."""
    error = {"message": reason, "type": "invalid_request_error", "param": None, "code": "invalid"}
    body = json.dumps({"error": error}).encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body


def limited_protocol(request_bytes: int) -> type[HttpToolsProtocol]:
    """Return the protocol with limits.

    Args:
        request_bytes: maximum size of a body.
    """

    class LimitedProtocol(_LimitedProtocol):
        _request_bytes = request_bytes

    return LimitedProtocol


class _LimitedProtocol(HttpToolsProtocol):
    """Counts what has arrived of a request, and answers with an error as soon as it is too much."""

    _request_bytes: int  # maximum size of a body, which a subclass states
    _arrived = 0  # bytes of the request, without those that arrived together with its first
    _head_bytes = 0  # bytes of its headers and trailers
    _in_head = True
    _reason: tuple[HTTPStatus, str] | None = None
    _refused = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._arrived += len(data)
        super().data_received(data)
        if self._in_head and self._arrived > HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers exceed {HEAD_BYTES} bytes")
        elif self._arrived > HEAD_BYTES + _MAX_OVERHEAD * self._request_bytes:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request has more than {self._request_bytes} bytes")

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser rejects, or what a callback below has stopped."""
        self._refuse(*(self._reason or (HTTPStatus.BAD_REQUEST, "this is not a valid HTTP request")))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arrived = self._head_bytes = 0
        self._in_head = True
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > URL_BYTES:
            self._stop(HTTPStatus.REQUEST_URI_TOO_LONG, f"the URL exceeds {URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES:
            self._stop(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers exceed {HEAD_BYTES} bytes")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._arrived, self._in_head = 0, True

    def _stop(self, status: HTTPStatus, reason: str) -> None:
        """Stop the parser, which calls `send_400_response`."""
        self._reason = (status, reason)
        raise ValueError(reason)

    def _start_timer(self) -> None:
        self._stop_timer()
        reason = f"the headers took more than {_HEAD_S:g} s"
        self._timer = self.loop.call_later(_HEAD_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT, reason)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_timer()
        if not self._in_head and self.cycle is not None and self.cycle.response_started:
            self.transport.close()  # its answer has begun before the request has ended
            return
        self.transport.write(_refusal(status, reason))
        # closed at once, with unread bytes, the connection would be reset before the client has read the answer
        self.loop.call_later(_LINGER_S, self.transport.close)
