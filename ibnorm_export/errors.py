"""The exceptions that this package raises deliberately, and the exit codes of the command line.

Each class corresponds to one kind of remedy, which the message names; `exit_code` is the exit code that it leads to.
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
    BROKEN_PIPE = 141  # whatever reads stdout has closed it


class IBNormError(Exception):
    """Base of all exceptions of this package."""

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT


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
