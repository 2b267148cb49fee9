"""The texts that are being written: how many at once, their pieces, and the end of those whose reader has left."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from ibnorm_export.errors import IBNormError, PromptError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult
from ibnorm_export.serving.text.protocol import Refused
from ibnorm_export.serving.text.worker_process import raised

__all__ = ["TextLimits", "Texts"]


#: One of these is in the last message of a text.
_LAST: Final = ("result", "error", "left")


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
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise IBNormError(f"the text endpoint's limit {name} is {value}; it must be above 0")


class Texts:
    """Hands texts to whoever writes them, and their pieces to their readers.

    Args:
        send: says something to a `text_worker`, without waiting; what it answers goes to `receive`.
        limits: see `TextLimits`.
    """

    def __init__(self, send: Callable[[Mapping[str, Any]], None], limits: TextLimits) -> None:
        self._send = send
        self.limits = limits
        self._numbers = itertools.count()
        self._pieces: dict[int, asyncio.Queue[str | TextResult | IBNormError]] = {}  # of each text, for its reader
        self._leaving: set[int] = set()  # texts without a reader, of which the worker has not said so
        self._ended = ""
        self.waiting = 0  # texts, for their first token

    @property
    def running(self) -> int:
        """Texts that are with the worker: those that nobody reads are, until it has put them down."""
        return len(self._pieces) + len(self._leaving)

    def check_room(self) -> None:
        """Raises Refused, where as many texts as may be are being written, or wait for their first token."""
        if self._ended:
            raise Refused(503, self._ended, code="internal")
        if self.running >= self.limits.concurrency:
            why = f"{self.running} texts are being written"
        elif self.limits.waiting is not None and self.waiting >= self.limits.waiting:
            why = f"{self.waiting} texts wait for their first token"
        else:
            return
        # the second header is for openai's clients: those that were refused together do not come back together
        again = {"Retry-After": "1", "Retry-After-Ms": str(random.randint(500, 1500))}
        raise Refused(429, f"{why}; try again", code="busy", headers=again)

    def receive(self, message: Mapping[str, Any]) -> None:
        """What the worker says of a text."""
        if message["text"] in self._leaving:
            if not message.keys().isdisjoint(_LAST):
                self._leaving.remove(message["text"])
            return
        pieces = self._pieces.get(message["text"])
        if pieces is None:  # it had ended when it was left
            return
        if "piece" in message:
            pieces.put_nowait(message["piece"])
        elif "result" in message:
            pieces.put_nowait(TextResult(**{**message["result"], "tokens": tuple(message["result"]["tokens"])}))
        else:
            pieces.put_nowait(raised(message["error"]))

    def end(self, why: str) -> None:
        """The worker has ended, or is about to: so have all texts, and there will be no others."""
        self._ended = self._ended or why
        for pieces in self._pieces.values():
            pieces.put_nowait(IBNormError(why))

    async def generate(self, prompt: str, sampling: Sampling) -> AsyncGenerator[str | TextResult, None]:
        """Pieces of the text, then its result. The text ends when this generator is closed.

        Raises:
            Refused: there is no room, or the prompt does not fit, or the time is up, or the worker fails.
        """
        self.check_room()
        number, ended = next(self._numbers), False
        pieces = self._pieces[number] = asyncio.Queue()
        self.waiting += 1
        waits = True
        end = asyncio.get_running_loop().time() + self.limits.request_s
        self._send({"write": number, "prompt": prompt, "sampling": asdict(sampling)})
        try:
            while True:
                try:
                    async with asyncio.timeout_at(end):
                        item = await pieces.get()
                except TimeoutError:
                    why = f"the text took more than {self.limits.request_s:g} s"
                    raise Refused(504, why, code="timeout") from None
                if waits:
                    waits, self.waiting = False, self.waiting - 1
                ended = isinstance(item, TextResult | IBNormError)
                if isinstance(item, PromptError):
                    raise Refused(400, str(item), code="context_length_exceeded" if prompt else "invalid")
                if isinstance(item, IBNormError):
                    raise Refused(503 if self._ended else 500, str(item), code="internal")
                if item:
                    yield item
                if isinstance(item, TextResult):
                    return
        finally:
            del self._pieces[number]
            self.waiting -= waits
            if not ended:
                self._leaving.add(number)
                self._send({"leave": number})
