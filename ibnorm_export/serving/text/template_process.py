"""The endpoint's handle of the process that renders chat templates, which is started again after it exceeds a limit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from ibnorm_export.errors import BackendUnavailable, ModelFileError, PromptError
from ibnorm_export.serving.text.chat_template import TemplateSource, read_template
from ibnorm_export.serving.text.template_worker import CPU_S, MAX_PROMPT_CHARACTERS

__all__ = ["Renderer", "TemplateProcess", "template_process"]

#: Bytes of an answer: JSON writes a character as up to twelve.
_MAX_ANSWER_BYTES: Final = 12 * MAX_PROMPT_CHARACTERS + 1000

#: Seconds that an answer may take on a machine that is busy; processor time is limited in the process itself.
_ANSWER_S: Final = 30.0


class Renderer(Protocol):
    """What turns messages into a prompt."""

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt; raises `PromptError` if the messages are rejected."""


class TemplateProcess:
    """A template in a separate process.

    Args:
        source: the template.
    """

    def __init__(self, source: TemplateSource) -> None:
        self._source = source
        self._process: Process | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start the process, and compile the template.

        Raises:
            ModelFileError: the template is damaged, or exceeds a limit.
            BackendUnavailable: the process cannot be started.
        """
        command = [sys.executable, "-P", "-m", "ibnorm_export.serving.text.template_worker"]
        try:
            self._process = await create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, limit=_MAX_ANSWER_BYTES, start_new_session=True
            )
        except OSError as error:
            raise BackendUnavailable(
                f"cannot start a second Python process, {sys.executable!r} (sys.executable): {error.strerror or error}"
            ) from error
        answer = await self._ask({"template": self._source.text, "tokens": dict(self._source.tokens)})
        if "ready" not in answer:
            raise ModelFileError(answer.get("damaged") or answer["rejected"])

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that asks for the assistant's next message. Others wait meanwhile.

        Raises:
            PromptError: the template rejects the messages, fails, or exceeds a limit.
        """
        async with self._lock:
            try:
                if self._process is None:
                    await self.start()
                answer = await self._ask({"messages": list(messages)})
            except BaseException as error:
                await self.stop()  # also when the client has disconnected: an answer would be taken for the next one's
                if isinstance(error, ModelFileError):
                    raise PromptError(str(error)) from error
                raise
        if "prompt" in answer:
            return str(answer["prompt"])
        raise PromptError(answer["rejected"])

    async def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a line and return the answer to it; a process that ends has answered too."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(_ANSWER_S):
                process.stdin.write(json.dumps(message).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
                if not line:
                    await process.wait()
        except (TimeoutError, ConnectionError, ValueError):  # it ended while it was reading, or its answer is too long
            line = b""
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = await self.stop()
        limit = f"{CPU_S:g} s of processor time" if code == -signal.SIGPROF else "its limits"
        return {"rejected": f"the chat template exceeds {limit}"}

    async def stop(self) -> int | None:
        """End the process at once, and return its exit code; None if there is none."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                process.kill()
        return await process.wait()


@contextlib.asynccontextmanager
async def template_process(folder: Path, given: Path | None = None) -> AsyncIterator[TemplateProcess | None]:
    """Start the process for the template of a folder, which ends with the block; give None if the folder has none.

    Args:
        folder: has the files of the tokenizer.
        given: a file with a template that is used in place of the folder's.

    Raises:
        ModelFileError: the template or a file of the tokenizer is damaged.
        BackendUnavailable: the process cannot be started.
    """
    source = read_template(folder, given)
    if source is None:
        yield None
        return
    process = TemplateProcess(source)
    try:
        await process.start()
        yield process
    finally:
        await process.stop()
