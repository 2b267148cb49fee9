"""The exceptions that this package raises deliberately, and the exit codes of the command line.

Each class corresponds to one kind of remedy, which the message names; `exit_code` is the exit code that it leads to.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import ClassVar, Final

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "ExitCode",
    "ExportError",
    "IBNormError",
    "ModelFileError",
    "ParityError",
    "PromptError",
    "SpecError",
    "listed",
    "message_text",
    "printable",
    "quoted",
    "shortened",
]

#: Characters of a value that a message shows, and characters of a whole message.
_VALUE_LIMIT: Final = 200
_MESSAGE_LIMIT: Final = 2000

#: Anything longer without a space comes from a file, a configuration or the user.
_LONG_WORD: Final = re.compile(rf"(\S{{{_VALUE_LIMIT}}})\S{{100,}}")

#: Control characters other than tab and newline, characters that reverse text, and unpaired surrogates: they
#: could move the cursor, change what is on the screen, or fail to be written at all.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return `text` with every character escaped that a terminal obeys instead of showing, e.g. as "\\x1b"."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


def shortened(text: str, limit: int = _VALUE_LIMIT) -> str:
    """Return the first `limit` characters of a text, with "..." in place of the others."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def quoted(value: object) -> str:
    """Return a value as a message shows it: as Python writes it (control characters escaped), not all of it."""
    try:
        return shortened(repr(value))
    except (RecursionError, ValueError):  # nested too deeply, or an integer of more digits than Python prints
        return f"a {type(value).__name__} that cannot be printed"


def listed(names: Iterable[object], most: int = 5) -> str:
    """Return names as a message lists them: the first ones, shortened, and how many more there are."""
    texts = [str(name) for name in names]
    shown = printable(shortened(", ".join(shortened(text) for text in texts[:most])))
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


def message_text(text: str) -> str:
    """Return the text of a message that may be shown: values shortened, control characters escaped, not too long.

    Code that writes a message quotes the values in it. This also covers values in the messages of other libraries.
    """
    text = _LONG_WORD.sub(r"\1...", printable(text))
    half = _MESSAGE_LIMIT // 2
    return (
        text if len(text) <= 2 * half else f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    )


class ExitCode(enum.IntEnum):
    """How a command ends. Every command uses these codes, and no other."""

    SUCCESS = 0  # the work is done, and every check passed
    CHECK_FAILED = 1  # the work is done, and a check, comparison or budget failed
    BAD_INPUT = 2  # a wrong option, or a file or model that cannot be used
    UNAVAILABLE = 3  # a runtime, library or device is missing on this machine
    INTERNAL_ERROR = 70  # a defect of this program; --debug shows the traceback
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; nothing is left half-written
    BROKEN_PIPE = 141  # the reader of stdout has closed it


class IBNormError(Exception):
    """Base of all exceptions of this package."""

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT

    def __str__(self) -> str:
        """The message; of a very long one, its beginning and its end, which says what to do."""
        return message_text(super().__str__())


class SpecError(IBNormError, ValueError):
    """A norm has parameters outside the definition, such as lambda <= 0 or an unknown compression."""


class CheckpointError(IBNormError):
    """A checkpoint cannot be read as an IBNorm model: its files, config section or weights are wrong."""


class ConfigError(IBNormError):
    """The configuration of `ibnorm-export check` is not valid: a key is unknown, missing or has an illegal value."""


class ModelFileError(IBNormError):
    """An ONNX file or a file that belongs to it cannot be read or trusted."""


class PromptError(ModelFileError):
    """The model cannot continue a prompt: it is empty, or longer than the model's positions."""


class ExportError(IBNormError):
    """A model cannot be exported with the given options."""


class EngineError(IBNormError):
    """A TensorRT engine cannot be built or loaded."""


class BackendUnavailable(IBNormError):
    """A runtime, library or device is missing on this machine."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNAVAILABLE


class ParityError(IBNormError):
    """A comparison that the caller requires to pass has failed."""

    exit_code: ClassVar[ExitCode] = ExitCode.CHECK_FAILED
