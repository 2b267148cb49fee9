"""Sockets that are bound to a port."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from ibnorm_export.errors import IBNormError

__all__ = ["bound_socket"]


@contextlib.contextmanager
def bound_socket(address: str, port: int, *, option: str) -> Iterator[socket.socket]:
    """Yield a TCP socket that is bound to a port and does not listen yet.

    Args:
        address: address of this machine.
        port: the port; 0 means any free one.
        option: option of the command line that sets the port, for the message.

    Raises:
        IBNormError: the port is in use, or this machine does not have the address.
    """
    with socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            stream.bind((address, port))
        except OSError as error:
            raise IBNormError(
                f"cannot listen on {address}:{port}: {error.strerror}; choose another port with {option}, or 0 for "
                "any free port"
            ) from error
        yield stream
