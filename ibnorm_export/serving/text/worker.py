"""The process that writes texts: `python -m ibnorm_export.serving.text.worker FOLDER`, spoken to by `TextProcess`.

A process of its own, since GenAI keeps Python's interpreter while it computes: an endpoint in the same one would stand
still for a whole prompt. One thread, which reads what it was told between two steps of the model.

Messages are JSON objects, one a line. It is told `{"write": N, "prompt": ..., "sampling": {...}}` and `{"leave": N}`;
it says `{"ready": {...}}` or `{"failed": {...}}` once, then `{"text": N, ...}` with a "piece", and of every text at
last with a "result", an "error" or "left". What any library prints goes to its standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

from ibnorm_export.errors import IBNormError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult, open_folder

__all__ = ["MessageReader", "Turns", "Writer"]

#: Tokens that come within this time of the last piece go to the reader together: at 1500 tokens a second an event for
#: each takes a third of the processor. A slower model sends every token by itself.
_PIECE_S: Final = 0.05

#: Tokens of one turn: as many as this time holds, and one at least.
_TURN_S: Final = 0.002


class Writer(Protocol):
    """What `Turns` wants of a `TextModel`."""

    def steps(self, prompt: str, sampling: Sampling, *, pace_s: float, turn_s: float) -> Iterator[str | TextResult]:
        """See `TextModel.steps`."""


def _told(error: Exception) -> dict[str, str]:
    if isinstance(error, IBNormError):
        return {"kind": type(error).__name__, "why": str(error)}
    return {"kind": IBNormError.__name__, "why": f"{type(error).__name__}: {error}"}


class Turns:
    """Who computes: one text at a time, and one without its first token before those that have theirs.

    A step of the model takes every core, so two at once are no faster than one after the other; texts that are being
    written wait for a new one's first token, and share the rest equally.

    Args:
        model: what writes.
    """

    def __init__(self, model: Writer) -> None:
        self._model = model
        self._new: dict[int, tuple[str, Sampling]] = {}
        self._begun: OrderedDict[int, Iterator[str | TextResult]] = OrderedDict()  # whose turn is next comes first

    def __bool__(self) -> bool:
        return bool(self._new or self._begun)

    def receive(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """A text to write, or to leave as it is; what is to be said of that."""
        if "leave" in message:
            self._new.pop(message["leave"], None)
            self._begun.pop(message["leave"], None)
            return {"text": message["leave"], "left": True}
        sampling = message["sampling"]
        wanted = Sampling(**{**sampling, "stop": tuple(sampling["stop"])})
        self._new[message["write"]] = (message["prompt"], wanted)
        return None

    def take(self) -> dict[str, Any] | None:
        """Write at the text whose turn it is, where there is one; what is to be said of it.

        A first token is told even where it makes no piece of text.
        """
        first = bool(self._new)
        if first:
            number = next(iter(self._new))
            prompt, sampling = self._new.pop(number)
            self._begun[number] = self._model.steps(prompt, sampling, pace_s=_PIECE_S, turn_s=_TURN_S)
        else:
            number = next(iter(self._begun))
            self._begun.move_to_end(number)
        try:
            item = next(self._begun[number])
        except Exception as error:  # noqa: BLE001  # whatever it is, the reader must not wait for ever
            del self._begun[number]
            return {"text": number, "error": _told(error)}
        if isinstance(item, TextResult):
            del self._begun[number]
            return {"text": number, "result": item.to_dict()}
        return {"text": number, "piece": item} if item or first else None


class MessageReader:
    """Lines that have come, without waiting for more unless that is asked for."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begun: list[bytes] = []

    def read(self, wait: bool) -> Iterator[dict[str, Any]]:
        """What was said since the last call; where a long message has not come whole, nothing.

        Raises:
            EOFError: there will be no more.
        """
        if select.select([self._descriptor], [], [], None if wait else 0)[0]:
            part = os.read(self._descriptor, 1 << 20)
            if not part:
                raise EOFError
            self._begun.append(part)
            if b"\n" in part:
                *lines, rest = b"".join(self._begun).split(b"\n")
                self._begun = [rest]
                yield from map(json.loads, lines)


def main() -> int:
    """Write texts until standard input ends."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # the endpoint obeys these, once its texts are finished
        signal.signal(signum, signal.SIG_IGN)
    gone = contextlib.suppress(EOFError, BrokenPipeError)  # of the endpoint, in whatever way
    with gone, os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)

        def say(message: Mapping[str, Any]) -> None:
            out.write(json.dumps(message).encode() + b"\n")
            out.flush()

        try:
            model = open_folder(sys.argv[1])
        except IBNormError as error:
            say({"failed": _told(error)})
            return error.exit_code
        turns, reader = Turns(model), MessageReader(0)
        say({"ready": {"max_positions": model.max_positions}})
        while True:
            for message in reader.read(wait=not turns):
                if told := turns.receive(message):
                    say(told)
            if turns and (told := turns.take()):
                say(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
