"""Limits of a request before the application sees it: the length of its URL and of its headers."""

from __future__ import annotations

from typing import Final

__all__ = ["HEAD_BYTES", "URL_BYTES"]

#: Bytes of the URL, and of all headers together. Source: the defaults of nginx are 8 KB for one and 32 KB for all.
URL_BYTES: Final = 8 << 10
HEAD_BYTES: Final = 64 << 10
