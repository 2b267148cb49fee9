"""The order in which texts compute, and how messages are read, without a process and with a scripted model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ibnorm_export.errors import PromptError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult
from ibnorm_export.serving.text.worker import MessageReader, Scheduler

Steps = Iterator[str | TextResult]
RESULT = TextResult("ab", (1, 2), prompt_tokens=3, stopped="length", first_token_ms=4.5, tokens_per_s=6.5)


class Model:
    """Replaces a `TextModel`: the prompt lists its pieces; "-" is not a piece, "!" and "?" are errors."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.closed: list[str] = []

    def steps(self, prompt: str, sampling: Sampling, pace_s: float, turn_s: float) -> Steps:
        name, _, pieces = prompt.partition(":")
        try:
            for piece in pieces:
                self.computed.append(name)
                if piece == "!":
                    raise ZeroDivisionError("a bug")
                if piece == "?":
                    raise PromptError("too long")
                yield "" if piece == "-" else piece
            yield RESULT
        finally:
            self.closed.append(name)


def begin(scheduler: Scheduler, number: int, prompt: str) -> None:
    sampling = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.5, "seed": 3, "stop": ["x"]}
    scheduler.receive({"write": number, "prompt": prompt, "sampling": sampling})


def test_first_tokens_go_first_and_others_in_order() -> None:
    scheduler = Scheduler(model := Model())
    begin(scheduler, 1, "old 1:abcd")
    begin(scheduler, 2, "old 2:abcd")
    for _ in range(3):
        scheduler.take_turn()
    begin(scheduler, 3, "new 1:abcd")
    begin(scheduler, 4, "new 2:abcd")
    for _ in range(7):
        scheduler.take_turn()
    begun = ["old 1", "old 2", "old 1"]
    assert model.computed == [*begun, "new 1", "new 2", "old 2", "old 1", "new 1", "new 2", "old 2"]


def test_the_messages_about_a_text() -> None:
    """The first token is reported even if it makes no piece; later tokens only if they make one."""
    scheduler = Scheduler(Model())
    begin(scheduler, 7, "x:-a-b")
    messages = [scheduler.take_turn() for _ in range(5)]
    assert not scheduler
    assert messages == [
        {"text": 7, "piece": ""},
        {"text": 7, "piece": "a"},
        None,
        {"text": 7, "piece": "b"},
        {"text": 7, "result": RESULT.to_dict()},
    ]


def test_sampling_arrives() -> None:
    seen = []

    class Seeing(Model):
        def steps(self, prompt: str, sampling: Sampling, pace_s: float, turn_s: float) -> Steps:
            seen.append((prompt, sampling))
            return super().steps(prompt, sampling, pace_s, turn_s)

    scheduler = Scheduler(Seeing())
    begin(scheduler, 1, "x:a")
    scheduler.take_turn()
    assert seen == [("x:a", Sampling(5, 0.5, top_p=0.5, seed=3, stop=("x",)))]


def test_a_text_that_fails_does_not_stop_the_others() -> None:
    scheduler = Scheduler(Model())
    for number, prompt in enumerate(("a:1!2", "b:1!", "c:?", "d:12")):
        begin(scheduler, number, prompt)
    said: dict[int, list[Any]] = {}
    while scheduler:
        if told := scheduler.take_turn():
            said.setdefault(told.pop("text"), []).append(told)
    bug = {"error": {"kind": "IBNormError", "message": "ZeroDivisionError: a bug"}}
    assert said[0] == said[1] == [{"piece": "1"}, bug]
    assert said[2] == [{"error": {"kind": "PromptError", "message": "too long"}}]
    assert said[3] == [{"piece": "1"}, {"piece": "2"}, {"result": RESULT.to_dict()}]


def test_a_cancelled_text_stops_computing() -> None:
    """A text that has not begun never does; the cache of one that has is freed at once."""
    scheduler = Scheduler(model := Model())
    begin(scheduler, 1, "stays:abc")
    begin(scheduler, 2, "goes:abc")
    begin(scheduler, 3, "never:abc")
    scheduler.take_turn()
    scheduler.take_turn()
    assert scheduler.receive({"cancel": 2}) == {"text": 2, "cancelled": True}
    assert scheduler.receive({"cancel": 3}) == {"text": 3, "cancelled": True}
    assert model.closed == ["goes"]
    while scheduler:
        scheduler.take_turn()
    assert scheduler.receive({"cancel": 1}) == {
        "text": 1,
        "cancelled": True,
    }  # cancelling a text that has ended is not an error
    assert model.computed == ["stays", "goes", "stays", "stays"]


def test_messages_arrive_in_any_pieces() -> None:
    out, into = os.pipe()
    reader = MessageReader(out)
    assert list(reader.read(wait=False)) == []
    os.write(into, b'{"a": 1}\n{"b"')
    assert list(reader.read(wait=True)) == [{"a": 1}]
    assert list(reader.read(wait=False)) == []
    os.write(into, b': "\\u20ac"}\n')
    assert list(reader.read(wait=True)) == [{"b": "€"}]
    long = "x" * 300_000  # more than the pipe holds
    writer = threading.Thread(target=lambda: os.write(into, b'{"a": "' + long.encode() + b'"}\n'))
    writer.start()
    found: list[Any] = []
    while not found:
        found += reader.read(wait=True)
    writer.join()
    assert found == [{"a": long}]
    os.close(into)
    with pytest.raises(EOFError):
        list(reader.read(wait=False))
    os.close(out)
