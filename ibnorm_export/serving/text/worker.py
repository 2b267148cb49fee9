"""The process that generates texts: `python -m ibnorm_export.serving.text.worker FOLDER`.

It is a separate process because onnxruntime-genai holds the GIL while it computes: in the same process, the endpoint
would stop for as long as a prompt takes. It has one thread, which reads messages between two steps of the model.

Messages are JSON objects, one on each line. The process receives `{"write": N, "prompt": ..., "sampling": {...}}` and
`{"cancel": N}`. It sends `{"ready": {...}}` or `{"failed": {...}}` once, then `{"text": N, ...}` with a "piece", and as
the last message about every text one with a "result", an "error" or "cancelled". Whatever a library prints goes to
standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

from ibnorm_export.errors import IBNormError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult, open_folder

__all__ = ["MessageReader", "Scheduler", "Steps"]

#: Tokens that arrive within this time of the last piece are sent together: at 1500 tokens a second, an event for each
#: token takes a third of the processor. A slower model sends every token separately.
_PIECE_S: Final = 0.05

#: Time of one turn: as many tokens as fit into it, at least one.
_TURN_S: Final = 0.002


class Steps(Protocol):
    """What `Scheduler` needs of a `TextModel`."""

    def steps(self, prompt: str, sampling: Sampling, *, pace_s: float, turn_s: float) -> Iterator[str | TextResult]:
        """See `TextModel.steps`."""


def _error_fields(error: Exception) -> dict[str, str]:
    if isinstance(error, IBNormError):
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": IBNormError.__name__, "message": f"{type(error).__name__}: {error}"}


class Scheduler:
    """Decides which text computes: one at a time, and those without a first token before all others.

    A step of the model uses every core, so two at once are no faster than one after the other. Texts that have begun
    wait for a new one's first token, and share the remaining time equally.

    Args:
        model: the model.
    """

    def __init__(self, model: Steps) -> None:
        self._model = model
        self._new: dict[int, tuple[str, Sampling]] = {}
        self._begun: OrderedDict[int, Iterator[str | TextResult]] = OrderedDict()  # the next turn is the first's

    def __bool__(self) -> bool:
        return bool(self._new or self._begun)

    def receive(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Accept a text to generate or to cancel, and return the answer to the message, if there is one."""
        if "cancel" in message:
            self._new.pop(message["cancel"], None)
            self._begun.pop(message["cancel"], None)
            return {"text": message["cancel"], "cancelled": True}
        sampling = message["sampling"]
        wanted = Sampling(**{**sampling, "stop": tuple(sampling["stop"])})
        self._new[message["write"]] = (message["prompt"], wanted)
        return None

    def take_turn(self) -> dict[str, Any] | None:
        """Compute one turn of one text, and return the message about it, if there is one.

        The first token is always reported, even if it is not yet a whole character.
        """
        is_first = bool(self._new)
        if is_first:
            number = next(iter(self._new))
            prompt, sampling = self._new.pop(number)
            self._begun[number] = self._model.steps(prompt, sampling, pace_s=_PIECE_S, turn_s=_TURN_S)
        else:
            number = next(iter(self._begun))
            self._begun.move_to_end(number)
        try:
            item = next(self._begun[number])
        except Exception as error:  # noqa: BLE001  # without an answer to every error, the client would wait for ever
            del self._begun[number]
            return {"text": number, "error": _error_fields(error)}
        if isinstance(item, TextResult):
            del self._begun[number]
            return {"text": number, "result": item.to_dict()}
        return {"text": number, "piece": item} if item or is_first else None


class MessageReader:
    """Reads messages that have arrived, and waits for more only if asked to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._partial: list[bytes] = []

    def read(self, wait: bool) -> Iterator[dict[str, Any]]:
        """Yield the messages that have arrived since the last call; none if a long message is not complete.

        Raises:
            EOFError: the other side has closed the pipe.
        """
        if select.select([self._descriptor], [], [], None if wait else 0)[0]:
            part = os.read(self._descriptor, 1 << 20)
            if not part:
                raise EOFError
            self._partial.append(part)
            if b"\n" in part:
                *lines, rest = b"".join(self._partial).split(b"\n")
                self._partial = [rest]
                yield from map(json.loads, lines)


def _run(folder: str, send: Callable[[Mapping[str, Any]], None]) -> int:
    try:
        model = open_folder(folder)
    except IBNormError as error:
        send({"failed": _error_fields(error)})
        return error.exit_code
    scheduler, reader = Scheduler(model), MessageReader(0)
    send({"ready": {"max_positions": model.max_positions}})
    while True:
        for message in reader.read(wait=not scheduler):
            if answer := scheduler.receive(message):
                send(answer)
        if scheduler and (answer := scheduler.take_turn()):
            send(answer)


def main() -> int:
    """Generate texts until standard input ends."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # the endpoint handles these, and ends this process afterwards
        signal.signal(signum, signal.SIG_IGN)
    endpoint_gone = contextlib.suppress(EOFError, BrokenPipeError)
    with endpoint_gone, os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)

        def send(message: Mapping[str, Any]) -> None:
            out.write(json.dumps(message).encode() + b"\n")
            out.flush()

        return _run(sys.argv[1], send)
    return 0


if __name__ == "__main__":
    sys.exit(main())
