"""Everything that this package raises on purpose.

Each class stands for one thing a caller can do about it; the message says what that is.
`exit_code` is what the command line turns the error into, and is stated here once.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "ExportError",
    "IBNormError",
    "ModelFileError",
    "ParityError",
    "PromptError",
    "SpecError",
]


class IBNormError(Exception):
    """Base of every deliberate error: catch this to catch them all."""

    exit_code: ClassVar[int] = 2


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

    exit_code: ClassVar[int] = 3


class ParityError(IBNormError):
    """A comparison that the caller demanded to pass did not; carries the failed report."""

    exit_code: ClassVar[int] = 1
