"""The texts that are being written: how many at once, whose turn it is, and the end of those whose reader has left."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from ibnorm_export.errors import IBNormError, PromptError
from ibnorm_export.serving.openai_protocol import Refused
from ibnorm_export.text import Sampling, TextModel, TextResult

__all__ = ["TextLimits", "Texts", "Turns"]

#: Tokens that come within this time of the last piece go to the reader together: at 1500 tokens a second an event for
#: each takes a third of the processor. A slower model sends every token by itself.
_PIECE_S: Final = 0.05

#: The longest that a text stands still until its reader has its first piece: a reader who reads slowly holds up nobody.
_FIRST_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class TextLimits:
    """What the endpoint takes on.

    Args:
        concurrency: texts at once; more are refused with 429 and Retry-After.
        waiting: texts that have no first token yet; more are refused likewise. None is no limit beyond `concurrency`. A
            prompt takes every core, so those that come together wait for each other: the last of n waits for n prompts.
        request_bytes: of a body; a larger one is refused with 413.
        request_s: seconds that a text may take; then it is refused with 504, or its stream ends with an error.

    Raises:
        IBNormError: a value is outside its range.
    """

    concurrency: int = 16
    request_bytes: int = 1 << 20
    request_s: float = 120.0
    waiting: int | None = None

    def __post_init__(self) -> None:
        counts = (self.concurrency, self.request_bytes, 1 if self.waiting is None else self.waiting)
        if min(counts) < 1 or not self.request_s > 0:
            raise IBNormError(f"the limits are {self}; each must be above 0")


class _Ended(Exception):
    """The reader has left, or the time is up: raised inside the generating thread to leave its loop."""


class Turns:
    """Who computes: one text at a time, and one without its first token before those that have theirs.

    A step of the model takes every core, so two at once are no faster than one after the other; texts that are being
    written wait one step for a new one's first token, and share the rest equally.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: list[tuple[bool, int, threading.Event]] = []  # a heap: first tokens first, then by arrival
        self._arrivals = itertools.count()

    def take(self, first: bool) -> None:
        """Wait for a turn; `first` is for a text without its first token."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Event()
            heapq.heappush(self._waiting, (not first, next(self._arrivals), turn))
        turn.wait()

    def give(self) -> None:
        """End a turn, which goes to the next in line."""
        with self._lock:
            if self._waiting:
                heapq.heappop(self._waiting)[2].set()
            else:
                self._taken = False

    def give_way(self) -> None:
        """Give the turn to the next in line, where there is one, and wait for another."""
        if self._waiting:
            self.give()
            self.take(first=False)


class Texts:
    """Generates in threads, at most so many at once; pieces come back to the event loop.

    Args:
        model: what writes.
        limits: see `TextLimits`.
    """

    def __init__(self, model: TextModel, limits: TextLimits) -> None:
        self._model = model
        self._limits = limits
        self._pool = ThreadPoolExecutor(limits.concurrency, "text")
        self._turns = Turns()
        self.running = 0
        self.waiting = 0  # of them, for their first token

    def check_room(self) -> None:
        """Raises Refused, where as many texts as may be are being written, or wait for their first token."""
        if self.running >= self._limits.concurrency:
            why = f"{self.running} texts are being written"
        elif self._limits.waiting is not None and self.waiting >= self._limits.waiting:
            why = f"{self.waiting} texts wait for their first token"
        else:
            return
        # the second header is for openai's clients: those that were refused together do not come back together
        again = {"Retry-After": "1", "Retry-After-Ms": str(random.randint(500, 1500))}
        raise Refused(429, f"{why}; try again", "busy", again)

    async def generate(self, prompt: str, sampling: Sampling) -> AsyncIterator[str | TextResult]:
        """Pieces of the text, then its result. The text ends when this generator is closed.

        Raises:
            Refused: there is no room, or the prompt does not fit, or the time is up.
        """
        self.check_room()
        self.running += 1
        self.waiting += 1
        waits = True
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | TextResult | Exception] = asyncio.Queue()
        left, taken = threading.Event(), threading.Event()
        end = time.monotonic() + self._limits.request_s

        def put(item: str | TextResult | Exception) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        def finished() -> None:
            self.running -= 1

        def write(piece: str) -> None:
            put(piece)
            if not taken.is_set():
                # GenAI keeps the interpreter while it computes: without this the event loop, and with it the first
                # piece, has at times to wait for many more tokens
                taken.wait(_FIRST_S)
                taken.set()

        def check() -> None:
            if left.is_set() or time.monotonic() > end:
                raise _Ended

        def between() -> None:
            check()
            self._turns.give_way()

        def work() -> None:
            self._turns.take(first=True)
            try:
                check()
                put(self._model.generate(prompt, sampling, write, between, _PIECE_S))
            except _Ended:
                put(Refused(504, f"the text took more than {self._limits.request_s:g} s", "timeout"))
            except PromptError as error:
                put(Refused(400, str(error), "context_length_exceeded" if prompt else "invalid"))
            except Exception as error:  # noqa: BLE001  # whatever it is, the reader must not wait for ever
                put(Refused(500, f"{type(error).__name__}: {error}", "internal"))
            finally:
                self._turns.give()
                loop.call_soon_threadsafe(finished)

        self._pool.submit(work)
        try:
            while True:
                item = await pieces.get()
                if waits:
                    waits, self.waiting = False, self.waiting - 1
                if isinstance(item, Exception):
                    raise item
                yield item
                taken.set()  # it is sent, since the next is asked for
                if isinstance(item, TextResult):
                    return
        finally:
            left.set()
            taken.set()
            self.waiting -= waits
