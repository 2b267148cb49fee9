"""The process that renders chat templates: `python -m ibnorm_export.serving.text.template_worker`.

It is a separate process because a template may loop for ever or fill the memory. The operating system limits both: the
process is killed when one template has used its time. Messages are JSON objects, one on each line. The process receives
`{"template": ..., "tokens": {...}}` once, then `{"messages": [...]}`; it answers every line with one of "ready",
"prompt", "damaged" and "rejected".
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final

from ibnorm_export.errors import ModelFileError, PromptError
from ibnorm_export.serving.text.chat_template import ChatTemplate, TemplateSource

__all__ = ["CPU_S", "MAX_PROMPT_CHARACTERS", "MEMORY_BYTES"]

#: Seconds of processor time for compiling a template, and for rendering it once. A usual one takes a millisecond.
CPU_S: Final = 1.0

#: Address space of the process; jinja2 and Python take 40 MB.
MEMORY_BYTES: Final = 256 << 20

#: Longest prompt.
MAX_PROMPT_CHARACTERS: Final = 4 << 20


def _answer(line: str, templates: list[ChatTemplate]) -> dict[str, Any]:
    message = json.loads(line)
    try:
        if "template" in message:
            templates[:] = [ChatTemplate(TemplateSource(message["template"], message["tokens"]))]
            return {"ready": True}
        prompt = templates[0].render(message["messages"])
    except PromptError as error:  # which is a ModelFileError too
        return {"rejected": str(error)}
    except ModelFileError as error:
        return {"damaged": str(error)}
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        reason = f"the prompt of the chat template has {len(prompt)} characters; the limit is {MAX_PROMPT_CHARACTERS}"
        return {"rejected": reason}
    return {"prompt": prompt}


def _answers() -> Iterator[dict[str, Any]]:
    templates: list[ChatTemplate] = []
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # nothing handles SIGPROF, so it ends the process
        try:
            answer = _answer(line, templates)
        except MemoryError:
            answer = {"rejected": "the chat template needs too much memory"}
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        yield answer


def main() -> int:
    """Answer lines until standard input ends."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # the endpoint handles these, and ends this process afterwards
        signal.signal(signum, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for answer in _answers():
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
