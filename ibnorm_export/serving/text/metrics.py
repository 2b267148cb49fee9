"""Figures of the text endpoint in Prometheus' text format.

Source: Prometheus documentation, "Exposition formats", text-based format 0.0.4.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

__all__ = ["CONTENT_TYPE", "Histogram", "Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

#: Upper ends of the buckets in seconds; the last one of every histogram is infinite.
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of values by bucket, and their sum.

    Args:
        ends: upper ends of the buckets, ascending; a value equal to an end belongs to its bucket.
    """

    def __init__(self, ends: Sequence[float] = _SECONDS) -> None:
        self._ends = (*ends, math.inf)
        self._counts = [0] * len(self._ends)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._ends, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: _Labels = ()) -> Iterator[str]:
        """The samples of the histogram; each bucket counts the values up to its end."""
        for end, total in zip(self._ends, itertools.accumulate(self._counts), strict=True):
            yield _sample(f"{name}_bucket", (*labels, ("le", "+Inf" if end == math.inf else f"{end:g}")), total)
        yield _sample(f"{name}_sum", labels, self._sum)
        yield _sample(f"{name}_count", labels, sum(self._counts))


class Metrics:
    """What the endpoint counts while it runs.

    Args:
        started: when the endpoint started, in seconds since 1970.
        build: what runs, by label: version, model.
    """

    def __init__(self, started: float, build: Mapping[str, str]) -> None:
        self._started = started
        self._build = tuple(build.items())
        self._requests = Counter[_Labels]()
        self._stream_errors = Counter[_Labels]()
        self._seconds: dict[_Labels, Histogram] = {}
        self._first_token = Histogram()
        self._prompt_tokens = 0
        self._tokens = 0

    def count_request(self, path: str, status: int, *, seconds: float, stream_error: str = "") -> None:
        """Count an answered request.

        Args:
            path: a path that the endpoint serves, or "other": a client chooses the path, so it is not a label.
            status: the HTTP status.
            seconds: from its arrival to the end of the answer.
            stream_error: code of the error that ended a stream, whose status had been sent before.
        """
        self._requests[("path", path), ("status", str(status))] += 1
        self._seconds.setdefault((("path", path),), Histogram()).observe(seconds)
        if stream_error:
            self._stream_errors[(("code", stream_error),)] += 1

    def count_first_token(self, seconds: float) -> None:
        """Count the time from the acceptance of a text to its first token."""
        self._first_token.observe(seconds)

    def count_text(self, *, prompt_tokens: int, tokens: int) -> None:
        """Count the tokens of a text that is complete."""
        self._prompt_tokens += prompt_tokens
        self._tokens += tokens

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All figures.

        Args:
            gauges: figures of this moment by name: help and value.
        """
        return "\n".join((*self._lines(gauges), ""))

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        yield from _head("ibnorm_build_info", "gauge", "What runs.")
        yield _sample("ibnorm_build_info", self._build, 1)
        yield from _head("ibnorm_start_time_seconds", "gauge", "When the endpoint started, in seconds since 1970.")
        yield _sample("ibnorm_start_time_seconds", (), self._started)
        for name, (text, value) in gauges.items():
            yield from _head(name, "gauge", text)
            yield _sample(name, (), value)
        yield from _head("ibnorm_requests_total", "counter", "Requests by path and HTTP status.")
        yield from (_sample("ibnorm_requests_total", labels, n) for labels, n in sorted(self._requests.items()))
        yield from _head("ibnorm_stream_errors_total", "counter", "Streams that ended with an error, by its code.")
        yield from (_sample("ibnorm_stream_errors_total", labels, n) for labels, n in self._stream_errors.items())
        for name, text, value in (
            ("ibnorm_prompt_tokens_total", "Tokens of the prompts of complete texts.", self._prompt_tokens),
            ("ibnorm_generated_tokens_total", "Tokens of complete texts.", self._tokens),
        ):
            yield from _head(name, "counter", text)
            yield _sample(name, (), value)
        yield from _head("ibnorm_request_seconds", "histogram", "Seconds from a request to the end of its answer.")
        for labels, histogram in sorted(self._seconds.items()):
            yield from histogram.lines("ibnorm_request_seconds", labels)
        yield from _head("ibnorm_first_token_seconds", "histogram", "Seconds from an accepted text to its first token.")
        yield from self._first_token.lines("ibnorm_first_token_seconds")


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _sample(name: str, labels: _Labels, value: float) -> str:
    escaped = ((label, text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for label, text in labels)
    shown = ",".join(f'{label}="{text}"' for label, text in escaped)
    return f"{name}{{{shown}}} {value!r}" if shown else f"{name} {value!r}"
