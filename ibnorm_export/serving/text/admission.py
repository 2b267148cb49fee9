"""Accept or refuse texts, pass their pieces to the requests, and cancel the texts of disconnected clients."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from ibnorm_export.errors import IBNormError, PromptError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult
from ibnorm_export.serving.text.metrics import Metrics
from ibnorm_export.serving.text.protocol import Refused
from ibnorm_export.serving.text.worker_process import as_exception
from ibnorm_export.serving.text_limits import TextLimits

__all__ = ["TextQueue"]

_Item = str | TextResult | IBNormError

#: The last message about a text has one of these keys.
_LAST: Final = ("result", "error", "cancelled")


class TextQueue:
    """Passes prompts to the worker, and pieces of text from the worker to the requests.

    Args:
        send: sends a message to the worker without waiting; the worker's messages go to `receive`.
        limits: see `TextLimits`.
        metrics: counts tokens and times; None counts for nobody.
    """

    def __init__(
        self, send: Callable[[Mapping[str, Any]], None], limits: TextLimits, *, metrics: Metrics | None = None
    ) -> None:
        self._send = send
        self.metrics = Metrics(0.0, {}) if metrics is None else metrics
        self.limits = limits
        self._numbers = itertools.count()
        self._pieces: dict[int, asyncio.Queue[_Item]] = {}  # by text
        self._cancelling: set[int] = set()  # texts without a client that the worker has not confirmed as cancelled
        self._end_reason = ""
        self.waiting = 0  # texts without a first token

    @property
    def running(self) -> int:
        """Number of texts that occupy the worker, including those that it has not cancelled yet."""
        return len(self._pieces) + len(self._cancelling)

    def check_room(self) -> None:
        """Check that another text would be accepted.

        Raises:
            Refused: a limit is reached, or the worker has ended.
        """
        if self._end_reason:
            raise Refused(503, self._end_reason, code="internal")
        if self.running >= self.limits.concurrency:
            reason = f"{_texts(self.running)} being generated"
        elif self.limits.waiting is not None and self.waiting >= self.limits.waiting:
            reason = f"{_texts(self.waiting)} waiting for the first token"
        else:
            return
        # openai's clients follow the second header: its random delay spreads the retries of a burst
        headers = {"Retry-After": "1", "Retry-After-Ms": str(random.randint(500, 1500))}
        raise Refused(429, f"{reason}; try again", code="busy", headers=headers)

    def receive(self, message: Mapping[str, Any]) -> None:
        """Pass a message from the worker to the request that it is for."""
        if message["text"] in self._cancelling:
            if not message.keys().isdisjoint(_LAST):
                self._cancelling.remove(message["text"])
            return
        pieces = self._pieces.get(message["text"])
        if pieces is None:  # the text had ended before it was cancelled
            return
        if "piece" in message:
            pieces.put_nowait(message["piece"])
        elif "result" in message:
            pieces.put_nowait(TextResult(**{**message["result"], "tokens": tuple(message["result"]["tokens"])}))
        else:
            pieces.put_nowait(as_exception(message["error"]))

    def end(self, reason: str) -> None:
        """End every text, and refuse all others, because the worker has ended or is about to."""
        self._end_reason = self._end_reason or reason
        for pieces in self._pieces.values():
            pieces.put_nowait(IBNormError(reason))

    async def generate(self, prompt: str, sampling: Sampling) -> AsyncGenerator[str | TextResult, None]:
        """Yield the pieces of a text, then its result. Closing the generator cancels the text.

        Raises:
            Refused: there is no room, the prompt does not fit, the time is up, or the worker fails.
        """
        self.check_room()
        number, ended, waiting = next(self._numbers), False, True
        pieces = self._pieces[number] = asyncio.Queue()
        self.waiting += 1
        clock = asyncio.get_running_loop().time
        start = clock()
        deadline = start + self.limits.request_s
        self._send({"write": number, "prompt": prompt, "sampling": asdict(sampling)})
        try:
            while True:
                item = await self._next(pieces, deadline)
                if waiting:
                    waiting, self.waiting = False, self.waiting - 1
                    self.metrics.count_first_token(clock() - start)
                ended = isinstance(item, TextResult | IBNormError)
                if isinstance(item, IBNormError):
                    raise self._refusal(item, prompt)
                if isinstance(item, TextResult):
                    self.metrics.count_text(prompt_tokens=item.prompt_tokens, tokens=len(item.tokens))
                if item:
                    yield item
                if isinstance(item, TextResult):
                    return
        finally:
            del self._pieces[number]
            self.waiting -= waiting
            if not ended:
                self._cancelling.add(number)
                self._send({"cancel": number})

    async def _next(self, pieces: asyncio.Queue[_Item], deadline: float) -> _Item:
        try:
            async with asyncio.timeout_at(deadline):
                return await pieces.get()
        except TimeoutError:
            reason = f"the text took more than {self.limits.request_s:g} s"
            raise Refused(504, reason, code="timeout") from None

    def _refusal(self, error: IBNormError, prompt: str) -> Refused:
        if isinstance(error, PromptError):
            return Refused(400, str(error), code="context_length_exceeded" if prompt else "invalid")
        return Refused(503 if self._end_reason else 500, str(error), code="internal")


def _texts(count: int) -> str:
    return "1 text is" if count == 1 else f"{count} texts are"
