"""An application that refuses every request, to measure what reading and refusing costs a server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["refuse", "refusing"]


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with 429."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """HOST:PORT of uvicorn in its own process, which serves only `refuse`."""
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        stream.listen(2048)
        host, port = stream.getsockname()
        options = ("--fd", str(stream.fileno()), "--lifespan", "off", "--log-level", "warning", "--no-access-log")
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), *options, "refusing:refuse"],
            pass_fds=[stream.fileno()],
        )
        try:
            with socket.create_connection((host, port)) as first:
                first.settimeout(60)
                first.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                while not first.recv(1 << 16).startswith(b"HTTP/1.1 429"):
                    time.sleep(0.01)
            yield f"{host}:{port}"
        finally:
            process.terminate()
            process.wait()
