"""Which texts are accepted, and how pieces and errors reach the client, without a worker or a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from starlette.types import Message, Receive, Scope, Send

from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError, PromptError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult
from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.middleware import AdmissionMiddleware
from ibnorm_export.serving.text.protocol import Refused
from ibnorm_export.serving.text_limits import TextLimits

RESULT = TextResult("ab", (1, 2), prompt_tokens=3, stopped="length", first_token_ms=4.5, tokens_per_s=6.5)


class Line:
    """A `TextQueue`, with the messages that it has sent to the worker."""

    def __init__(self, limits: TextLimits | None = None) -> None:
        self.sent: list[Any] = []
        self.queue = TextQueue(self.sent.append, limits or TextLimits())

    def ask(self, prompt: str = "x") -> AsyncGenerator[str | TextResult, None]:
        return self.queue.generate(prompt, Sampling())

    async def begin(self) -> tuple[int, asyncio.Task[str | TextResult], AsyncGenerator[str | TextResult, None]]:
        """Begin a text, and return its number, a task for its first item, and its other items."""
        pieces = self.ask()
        first = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        return self.sent[-1]["write"], first, pieces


class FastClock(asyncio.SelectorEventLoop):
    """An event loop whose clock can be advanced, so that no test depends on the speed of the machine."""

    _advanced = 0.0

    def time(self) -> float:
        return super().time() + self._advanced

    def advance(self, seconds: float) -> None:
        self._advanced += seconds


def run(test: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=FastClock) as runner:
        runner.run(test())  # type: ignore[arg-type]  # every test is a coroutine function


def test_a_text_and_its_result() -> None:
    async def read() -> None:
        line = Line()
        number, first, pieces = await line.begin()
        sampling = {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": ()}
        assert line.sent == [{"write": number, "prompt": "x", "sampling": sampling}]
        other, *_ = await line.begin()
        line.queue.receive({"text": other, "piece": "for another client"})
        for piece in ("", "a", "b"):
            line.queue.receive({"text": number, "piece": piece})
        line.queue.receive({"text": number, "result": {**RESULT.to_dict(), "tokens": [1, 2]}})
        assert [await first, *[item async for item in pieces]] == ["a", "b", RESULT]
        assert line.sent[-1]["write"] == other, "a text that has ended is not cancelled"
        assert line.queue.running == 1

    run(read)


@pytest.mark.parametrize(
    ("error", "prompt", "status", "code"),
    [
        (PromptError("too long"), "x", 400, "context_length_exceeded"),
        (PromptError("empty"), "", 400, "invalid"),
        (ModelFileError("the runtime fails"), "x", 500, "internal"),
        (BackendUnavailable("no memory"), "x", 500, "internal"),
    ],
)
def test_errors_reach_the_client_and_free_a_place(error: IBNormError, prompt: str, status: int, code: str) -> None:
    async def twice() -> None:
        line = Line(TextLimits(concurrency=1))
        for _ in range(2):
            first = asyncio.ensure_future(anext(line.ask(prompt)))
            await asyncio.sleep(0)
            line.queue.receive(
                {"text": line.sent[-1]["write"], "error": {"kind": type(error).__name__, "message": str(error)}}
            )
            with pytest.raises(Refused, match=str(error)) as caught:
                await first
            assert (caught.value.status, caught.value.code) == (status, code)
            assert (line.queue.running, line.queue.waiting) == (0, 0)

    run(twice)


def test_limits_out_of_range() -> None:
    for wrong in ({"concurrency": 0}, {"waiting": 0}, {"request_bytes": 0}, {"request_s": 0.0}, {"request_s": np.nan}):
        with pytest.raises(
            IBNormError, match=rf"limit {next(iter(wrong))} is .*; it must be (at least 1|finite and above 0)"
        ):
            TextLimits(**wrong)  # type: ignore[arg-type]  # of either kind


def test_a_client_that_disconnects_cancels_its_text() -> None:
    """Its place is free only when the worker confirms, so a busy worker has a bounded number of messages waiting."""

    async def leave() -> None:
        line = Line(TextLimits(concurrency=1))
        number, first, pieces = await line.begin()
        line.queue.receive({"text": number, "piece": "a"})
        assert await first == "a"
        await pieces.aclose()
        assert line.sent[-1] == {"cancel": number}
        line.queue.receive({"text": number, "piece": "too late"})
        with pytest.raises(Refused, match="1 text is being generated"):
            line.queue.check_room()
        line.queue.receive({"text": number, "cancelled": True})

        number, first, _ = await line.begin()  # before its first piece
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert line.sent[-1] == {"cancel": number}
        assert (line.queue.running, line.queue.waiting) == (1, 0)
        line.queue.receive({"text": number, "result": RESULT.to_dict()})
        assert line.queue.running == 0
        line.queue.receive({"text": number, "cancelled": True})  # it had ended before the worker confirmed

    run(leave)


def test_the_number_of_texts_without_a_token_is_limited() -> None:
    """A text makes room for the next when it has its first token, is cancelled or fails."""

    async def fill() -> None:
        line = Line(TextLimits(concurrency=4, waiting=1))
        for message in ({"piece": ""}, {"error": {"kind": "ModelFileError", "message": "fails"}}, None, {"piece": "a"}):
            number, first, _ = await line.begin()
            with pytest.raises(Refused, match="1 text is waiting for the first token; try again") as caught:
                line.queue.check_room()
            assert caught.value.status == 429
            with pytest.raises(Refused, match="1 text is waiting"):
                await anext(line.ask())
            assert line.queue.waiting == 1
            if message is None:
                first.cancel()
                await asyncio.sleep(0)
                message = {"cancelled": True}
            line.queue.receive({"text": number, **message})
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert line.queue.waiting == 0
            line.queue.check_room()
        assert line.queue.running == 2  # those with a piece, which may be empty

    run(fill)


def test_the_number_of_texts_is_limited() -> None:
    async def fill() -> None:
        line = Line(TextLimits(concurrency=2))
        begun = [await line.begin() for _ in range(2)]
        with pytest.raises(Refused, match="2 texts are being generated; try again") as caught:
            await anext(line.ask())
        assert caught.value.status == 429
        assert caught.value.headers is not None
        assert caught.value.headers["Retry-After"] == "1"
        assert 500 <= int(caught.value.headers["Retry-After-Ms"]) <= 1500
        begun[0][1].cancel()
        await asyncio.sleep(0)
        line.queue.receive({"text": begun[0][0], "cancelled": True})
        line.queue.check_room()

    run(fill)


def test_the_time_of_a_text_is_limited() -> None:
    """The limit is for the whole text, even if pieces keep arriving."""

    async def wait() -> None:
        clock = asyncio.get_running_loop()
        assert isinstance(clock, FastClock)
        line = Line(TextLimits(request_s=1000))
        number, first, pieces = await line.begin()
        line.queue.receive({"text": number, "piece": "a"})
        assert await first == "a"
        clock.advance(900)
        line.queue.receive({"text": number, "piece": "b"})
        assert await anext(pieces) == "b"
        clock.advance(101)
        with pytest.raises(Refused, match=r"the text took more than 1000 s") as caught:
            await anext(pieces)
        assert caught.value.status == 504
        assert line.sent[-1] == {"cancel": number}

    run(wait)


def test_all_texts_end_with_the_worker() -> None:
    async def end() -> None:
        line = Line()
        number, first, pieces = await line.begin()
        line.queue.receive({"text": number, "piece": "a"})
        assert await first == "a"
        _, second, _ = await line.begin()
        line.queue.end("it has ended")
        for waiting in (anext(pieces), second):
            with pytest.raises(Refused, match="it has ended") as caught:
                await waiting
            assert caught.value.status == 503
        with pytest.raises(Refused, match="it has ended") as caught:
            await anext(line.ask())
        assert caught.value.status == 503

    run(end)


def test_a_request_without_room_is_refused_unread() -> None:
    """In a burst, reading the refused requests would delay the accepted ones."""
    passed, sent = [], []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope["method"])

    async def receive() -> Message:
        pytest.fail("it was read")

    async def send(message: Message) -> None:
        sent.append(message)

    async def ask() -> None:
        line = Line(TextLimits(concurrency=1))
        door = AdmissionMiddleware(app, line.queue)
        await door({"type": "http", "method": "POST"}, receive, send)
        await line.begin()
        await door({"type": "http", "method": "GET"}, receive, send)  # /health and /v1/models have room
        assert (passed, sent) == (["POST", "GET"], [])
        await door({"type": "http", "method": "POST"}, receive, send)

    run(ask)
    assert passed == ["POST", "GET"]
    assert sent[0]["status"] == 429
    assert dict(sent[0]["headers"])[b"retry-after"] == b"1"
    assert b"1 text is being generated" in sent[1]["body"]
