"""What a command writes on stderr, without the lines that depend on the speed of the machine."""

from __future__ import annotations

import re

#: A step that took over two seconds has a line: its seconds and what it was.
_STEP = re.compile(r" *\d+\.\d s  ")


def messages(stderr: str) -> list[str]:
    """Return the lines but those of long steps, of which a busy machine has more."""
    return [line for line in stderr.splitlines() if line.strip() and not _STEP.match(line)]
