"""The process that writes texts, as the endpoint sees it: started, spoken to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from ibnorm_export import errors
from ibnorm_export.errors import BackendUnavailable, IBNormError

__all__ = ["TextProcess", "raised", "text_process"]

#: Bytes of a message at most: a result holds its whole text and tokens.
_LINE: Final = 1 << 26

#: Seconds that it has to end when nothing is said to it any more; it may be in the middle of a prompt.
_END_S: Final = 2.0


def raised(told: Mapping[str, str]) -> IBNormError:
    """What it raised, of the same class."""
    made: IBNormError = getattr(errors, told["kind"])(told["why"])
    return made


class TextProcess:
    """A running `text_worker`.

    Args:
        process: of it, its input and output pipes.
        max_positions: of its model.
    """

    def __init__(self, process: Process, max_positions: int) -> None:
        self._process = process
        self.max_positions = max_positions

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something to it, which never waits; nothing comes of it where it has ended."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # else it has ended in the middle of it
                yield json.loads(line)

    async def ended(self) -> str:
        """How it ended, for a person."""
        return await _how_it_ended(self._process)


async def _stop(process: Process) -> None:
    """Let it end, or end it: nothing is said to it any more."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
    finally:
        if process.returncode is None:  # a second Ctrl-C
            process.kill()


async def _how_it_ended(process: Process) -> str:
    code = await process.wait()
    how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
    return f"the process that writes texts has ended ({how}); its last words, if any, are above"


@contextlib.asynccontextmanager
async def text_process(folder: str | Path) -> AsyncIterator[TextProcess]:
    """A process that has opened `folder`; it ends with the block.

    Args:
        folder: of `export --target ort-genai`, or of `export --task text-generation`.

    Raises:
        BackendUnavailable: it cannot be started.
        IBNormError: what `open_folder` raises in it, or it has ended in another way.
    """
    # -P: a file of the working folder is no module of the worker's; a session of its own: Ctrl-C is not for it
    try:
        process = await create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "ibnorm_export.serving.text.worker",
            str(folder),
            stdin=PIPE,
            stdout=PIPE,
            limit=_LINE,
            start_new_session=True,
        )
    except OSError as error:
        raise BackendUnavailable(
            f"cannot start a second process of Python, {sys.executable!r} (sys.executable): {error.strerror or error}"
        ) from error
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise IBNormError(await _how_it_ended(process))
        told = json.loads(line)
        if "failed" in told:
            raise raised(told["failed"])
        yield TextProcess(process, told["ready"]["max_positions"])
    finally:
        stopping = asyncio.ensure_future(_stop(process))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:  # as Ctrl-C ends a task
            await stopping
            raise
