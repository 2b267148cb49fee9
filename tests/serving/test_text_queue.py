"""Whose turn it is, how pieces reach the reader, and what becomes of errors, with a model that does what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from starlette.types import Message, Receive, Scope, Send

from ibnorm_export.errors import IBNormError, ModelFileError, PromptError
from ibnorm_export.serving import text_queue
from ibnorm_export.serving.openai_protocol import Refused
from ibnorm_export.serving.openai_server import Door
from ibnorm_export.serving.text_queue import TextLimits, Texts, Turns
from ibnorm_export.text import Sampling, TextResult

Write = Callable[[str], None]


class Model:
    """Stands in for a `TextModel`: runs a function in its place."""

    def __init__(self, generate: Callable[[Write], None]) -> None:
        self._generate = generate

    def generate(
        self, prompt: str, sampling: Sampling, write: Write, between: Callable[[], None], pace_s: float
    ) -> TextResult:
        def token(piece: str) -> None:
            write(piece)
            between()

        self._generate(token)
        return TextResult("", (), 1, "length", 0.0, 0.0)


def texts(generate: Callable[[Write], None], limits: TextLimits | None = None) -> Texts:
    return Texts(Model(generate), limits or TextLimits())  # type: ignore[arg-type]  # the one method that is used


async def collect(made: Texts, prompt: str = "x") -> list[str]:
    return [item async for item in made.generate(prompt, Sampling()) if isinstance(item, str)]


def test_first_tokens_go_first_and_others_in_order() -> None:
    turns, order = Turns(), []
    turns.take(first=True)

    def wait(name: str, first: bool) -> threading.Thread:
        def run() -> None:
            turns.take(first)
            order.append(name)
            turns.give()

        thread = threading.Thread(target=run)
        thread.start()
        while sum(map(len, [turns._waiting])) < len(threads) + 1:
            time.sleep(0.001)
        return thread

    threads: list[threading.Thread] = []
    for name, first in (("old 1", False), ("old 2", False), ("new 1", True), ("new 2", True)):
        threads.append(wait(name, first))
    assert not order
    turns.give()
    for thread in threads:
        thread.join(5)
    assert order == ["new 1", "new 2", "old 1", "old 2"]


def test_one_text_computes_at_a_time_and_all_take_turns() -> None:
    inside, most, order = 0, 0, []
    lock = threading.Lock()

    def generate(write: Write) -> None:
        nonlocal inside, most
        for _ in range(5):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.002)
            order.append(threading.get_ident())
            with lock:
                inside -= 1
            write("a")

    async def all_of_them() -> None:
        made = texts(generate)
        await asyncio.gather(*(collect(made) for _ in range(4)))

    asyncio.run(all_of_them())
    assert most == 1
    assert len(order) == 20
    # first tokens first: each has its first before any has its third
    assert len(set(order[: order.index(order[0], order.index(order[0], 1) + 1)])) == 4


def test_a_text_goes_on_when_its_first_piece_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing keeps the interpreter, so the first piece is sent before there is a second token."""
    monkeypatch.setattr(text_queue, "_FIRST_S", 30.0)  # on a busy machine sending takes longer
    order = []

    def generate(write: Write) -> None:
        for number in range(3):
            order.append(f"computed {number}")
            write(str(number))

    async def read() -> None:
        async for item in texts(generate).generate("x", Sampling()):
            order.append(f"got {item!r}" if isinstance(item, str) else "end")
            await asyncio.sleep(0.01)  # as long as sending takes
            order.append("sent")

    asyncio.run(read())
    assert order[:4] == ["computed 0", "got '0'", "sent", "computed 1"], order


def test_a_reader_who_is_slow_holds_up_nobody() -> None:
    """He takes 2 s over a piece: the text waits for 50 ms, then goes on."""
    done = threading.Event()

    def generate(write: Write) -> None:
        write("a")
        done.set()

    async def read() -> None:
        pieces = texts(generate).generate("x", Sampling())
        assert await anext(pieces) == "a"
        assert await asyncio.to_thread(done.wait, 2)

    asyncio.run(read())


def test_a_reader_who_is_slow_holds_up_a_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its second token, not behind each."""
    monkeypatch.setattr(text_queue, "_FIRST_S", 0.5)
    took: list[float] = []

    def generate(write: Write) -> None:
        began = time.monotonic()
        for _ in range(8):
            write("a")
        took.append(time.monotonic() - began)

    async def read() -> None:
        pieces = texts(generate).generate("x", Sampling())
        assert await anext(pieces) == "a"
        while not took:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(read(), 20))
    assert 0.4 < took[0] < 2, "of 4 if it were each"


@pytest.mark.parametrize(
    ("error", "prompt", "status", "code"),
    [
        (PromptError("too long"), "x", 400, "context_length_exceeded"),
        (PromptError("empty"), "", 400, "invalid"),
        (ModelFileError("the runtime fails"), "x", 500, "internal"),
        (ZeroDivisionError("a bug"), "x", 500, "internal"),
    ],
)
def test_errors_reach_the_reader_and_leave_room(error: Exception, prompt: str, status: int, code: str) -> None:
    def generate(write: Write) -> None:
        raise error

    async def twice() -> None:
        made = texts(generate, TextLimits(concurrency=1))
        for _ in range(2):
            with pytest.raises(Refused, match=str(error)) as caught:
                await collect(made, prompt)
            assert (caught.value.status, caught.value.code) == (status, code)
            while made.running:
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(twice(), 5))


def test_limits_out_of_range() -> None:
    for wrong in ({"concurrency": 0}, {"waiting": 0}, {"request_bytes": 0}, {"request_s": 0.0}, {"request_s": np.nan}):
        with pytest.raises(IBNormError, match="each must be above 0"):
            TextLimits(**wrong)  # type: ignore[arg-type]  # of either kind


def test_a_reader_who_leaves_ends_the_text() -> None:
    written = 0

    def generate(write: Write) -> None:
        nonlocal written
        for _ in range(2000):
            time.sleep(0.001)
            written += 1
            write("a")

    async def leave() -> None:
        made = texts(generate)
        pieces = made.generate("x", Sampling())
        assert await anext(pieces) == "a"
        await pieces.aclose()  # type: ignore[attr-defined]  # an asynchronous generator
        while made.running:
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    assert written < 1000


def test_only_so_many_wait_for_their_first_token() -> None:
    """One that has its first token makes room for the next, long before its end; so does one that leaves or fails."""
    first, rest = threading.Event(), threading.Event()

    def generate(write: Write) -> None:
        assert first.wait(10)
        if failing:
            raise ModelFileError("the runtime fails")
        write("a")
        assert rest.wait(10)

    failing = False

    async def fill() -> None:
        nonlocal failing
        made = texts(generate, TextLimits(concurrency=3, waiting=1))
        pieces = made.generate("x", Sampling())
        begun = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="1 texts wait for their first token; try again") as caught:
            made.check_room()
        assert caught.value.status == 429
        first.set()
        assert await begun == "a"
        assert (made.running, made.waiting) == (1, 0)
        made.check_room()
        first.clear()

        gone = asyncio.ensure_future(collect(made))  # waits for its turn, which the first text has
        await asyncio.sleep(0)
        assert made.waiting == 1
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        assert made.waiting == 0

        failing = True
        broken = asyncio.ensure_future(collect(made))
        rest.set()
        first.set()
        with pytest.raises(Refused, match="the runtime fails"):
            await broken
        assert [item async for item in pieces]
        while made.running:
            await asyncio.sleep(0.001)
        assert made.waiting == 0

    asyncio.run(asyncio.wait_for(fill(), 20))


def test_whoever_leaves_before_his_turn_costs_nothing() -> None:
    computed, hold = [], threading.Event()

    def generate(write: Write) -> None:
        computed.append(1)
        assert hold.wait(10)

    async def leave() -> None:
        made = texts(generate)
        stays, leaves = (asyncio.ensure_future(collect(made)) for _ in range(2))
        while made.running < 2 or not computed:
            await asyncio.sleep(0.001)
        leaves.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaves
        hold.set()
        await stays
        while made.running:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert len(computed) == 1


def test_a_request_without_room_is_refused_unread() -> None:
    """Whatever it asks for: a burst must not cost those who are admitted the reading of all others."""
    made = texts(lambda write: None, TextLimits(concurrency=1))
    passed, sent = [], []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope["method"])

    async def receive() -> Message:
        pytest.fail("it was read")

    async def send(message: Message) -> None:
        sent.append(message)

    async def ask(method: str) -> None:
        await Door(app, made)({"type": "http", "method": method}, receive, send)

    asyncio.run(ask("POST"))
    made.running = 1
    asyncio.run(ask("GET"))  # /health and /v1/models have room
    assert (passed, sent) == (["POST", "GET"], [])
    asyncio.run(ask("POST"))
    assert passed == ["POST", "GET"]
    assert sent[0]["status"] == 429
    assert dict(sent[0]["headers"])[b"retry-after"] == b"1"
    assert b"1 texts are being written" in sent[1]["body"]
