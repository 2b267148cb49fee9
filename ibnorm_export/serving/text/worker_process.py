"""The endpoint's handle of the process that generates texts: start it, exchange messages with it, end it."""

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

__all__ = ["WorkerProcess", "as_exception", "worker_process"]

#: Maximum size of a message in bytes: a result contains its whole text and tokens.
_MAX_MESSAGE_BYTES: Final = 1 << 26

#: Seconds that the process has to end after its input is closed; it may be computing a prompt.
_END_S: Final = 2.0


def as_exception(fields: Mapping[str, str]) -> IBNormError:
    """Return the exception that the worker raised, with the same class."""
    exception: IBNormError = getattr(errors, fields["kind"])(fields["message"])
    return exception


class WorkerProcess:
    """A running `worker`.

    Args:
        process: the process, with pipes for its input and output.
        max_positions: maximum number of tokens of its model.
    """

    def __init__(self, process: Process, max_positions: int) -> None:
        self._process = process
        self.max_positions = max_positions

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message without waiting; a process that has ended ignores it."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield its messages until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # otherwise it ended in the middle of a message
                yield json.loads(line)

    async def wait(self) -> str:
        """Wait until it ends, and return how it ended."""
        return await _how_it_ended(self._process)


@contextlib.asynccontextmanager
async def worker_process(folder: str | Path) -> AsyncIterator[WorkerProcess]:
    """Start a process that has opened `folder`; it ends with the block.

    Args:
        folder: a folder of `export --target ort-genai` or of `export --task text-generation`.

    Raises:
        BackendUnavailable: the process cannot be started.
        IBNormError: the process cannot open the folder, or ends by itself.
    """
    process = await _start(folder)
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise IBNormError(await _how_it_ended(process))
        message = json.loads(line)
        if "failed" in message:
            raise as_exception(message["failed"])
        yield WorkerProcess(process, message["ready"]["max_positions"])
    finally:
        stopping = asyncio.ensure_future(_stop(process))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:  # Ctrl-C cancels the task
            await stopping
            raise


async def _start(folder: str | Path) -> Process:
    command = [sys.executable, "-P", "-m", "ibnorm_export.serving.text.worker", str(folder)]
    try:
        # -P: files in the working folder do not hide modules; a new session: Ctrl-C does not reach the process
        return await create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, limit=_MAX_MESSAGE_BYTES, start_new_session=True
        )
    except OSError as error:
        raise BackendUnavailable(
            f"cannot start a second Python process, {sys.executable!r} (sys.executable): {error.strerror or error}"
        ) from error


async def _stop(process: Process) -> None:
    """Close the input of the process, and kill it if it does not end soon."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
    finally:
        if process.returncode is None:  # a second Ctrl-C interrupted the wait
            process.kill()


async def _how_it_ended(process: Process) -> str:
    code = await process.wait()
    how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
    return f"the process that generates texts has ended ({how}); its last output, if any, is above"
