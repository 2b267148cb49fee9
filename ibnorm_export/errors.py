"""Everything that this package raises on purpose.

Each class stands for one thing a caller can do about it; the message says what that is.
`ExitCode` is the one table of the command line's exit codes; `exit_code` is the one that an error becomes.
"""

from __future__ import annotations

import enum
from typing import ClassVar

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
]


class ExitCode(enum.IntEnum):
    """How a command ends. Every command uses these codes, and no other."""

    SUCCESS = 0  # the work is done, and every check passed
    CHECK_FAILED = 1  # the work is done, and a check, comparison or budget failed
    BAD_INPUT = 2  # a wrong option, or a file or model that cannot be used
    UNAVAILABLE = 3  # a runtime, library or device is missing on this machine
    INTERNAL_ERROR = 70  # a defect of this program; --debug shows the traceback
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; nothing is left half-written
    BROKEN_PIPE = 141  # the reader of stdout has gone


class IBNormError(Exception):
    """Base of every deliberate error: catch this to catch them all."""

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT


class SpecError(IBNormError, ValueError):
    """A norm is described by values outside the definition (lambda <= 0, unknown compression)."""


class CheckpointError(IBNormError):
    """A checkpoint cannot be read as an IBNorm model: files, config section or weights."""


class ConfigError(IBNormError):
    """The file of `ibnorm-export check` is not one: a key is unknown, missing or has an illegal value."""


class ModelFileError(IBNormError):
    """An ONNX file, or data that goes with it, cannot be read, trusted or understood."""


class PromptError(ModelFileError):
    """A prompt is not one that the model can go on from: empty, or longer than its positions."""


class ExportError(IBNormError):
    """A model cannot be turned into the ONNX file that was asked for."""


class EngineError(IBNormError):
    """A TensorRT engine cannot be built or loaded."""


class BackendUnavailable(IBNormError):
    """A runtime, library or device is missing on this machine; the message names it."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNAVAILABLE


class ParityError(IBNormError):
    """A comparison that the caller demanded to pass did not; carries the failed report."""

    exit_code: ClassVar[ExitCode] = ExitCode.CHECK_FAILED
