"""What an exported file records about itself: `ModelMetadata` defines the format and checks every entry."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError, quoted
from ibnorm_export.parsing import parse_json

__all__ = ["METADATA_FORMAT", "CacheKind", "ModelMetadata", "QuantizationEntry", "Target", "Task", "Weights"]

#: The format that this version writes and reads.
METADATA_FORMAT: Final = "1"

#: Prefix of this package's keys in the metadata of an ONNX file.
_PREFIX: Final = "ibnorm."


class Weights(enum.StrEnum):
    """Which weights of a checkpoint are meant, where it has those of the last step and their moving average."""

    RAW = "raw"
    EMA = "ema"


class Task(enum.StrEnum):
    """What a model is loaded and exported for."""

    FORWARD = "forward"
    """Inputs to outputs, without a cache."""
    TEXT_GENERATION = "text-generation"
    """One step of a language model, with a cache of keys and values."""


class Target(enum.StrEnum):
    """What an exported file is laid out for."""

    PORTABLE = "portable"
    """Any ONNX runtime."""
    ORT_GENAI = "ort-genai"
    """A folder for onnxruntime-genai."""
    TRANSFORMERS_JS = "transformers.js"
    """A folder for transformers.js, in Node and in a browser."""
    OPENVINO = "openvino"
    """A folder with OpenVINO's own format."""
    LITERT = "litert"
    """A folder with the format of LiteRT (TensorFlow Lite), for mobile devices."""


class CacheKind(enum.StrEnum):
    """How a language model keeps its keys and values."""

    DYNAMIC = "dynamic"
    """A new, longer tensor at every step."""
    STATIC = "static"
    """A buffer of fixed capacity that is written in place."""


@dataclass(frozen=True, slots=True)
class QuantizationEntry:
    """How the matrices of a file are stored.

    Args:
        bits: bits of each value, 4 or 8.
        block_size: number of values that share a scale and a zero point.
        head_bits: bits of the matrix that produces the logits; None if it is not quantised.
        method: description of the algorithm.
        norms: dtype of the norms' parameters.
    """

    bits: int
    block_size: int
    _: KW_ONLY
    head_bits: int | None
    method: str = ""
    norms: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON values."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetadata:
    """The metadata of an exported file. It has many fields because each is one key of the file.

    A key that the file lacks has the default of its field. `ModelMetadata.empty()` describes a file without metadata,
    such as one from another tool: it has no entries, is portable and has the task `FORWARD`.

    Args:
        format: version of this format.
        family: name of the architecture, e.g. "llama".
        task: what the model was exported for.
        target: what the file is laid out for. The key is only written for a target other than `PORTABLE`.
        max_positions: the longest sequence that the model takes, in tokens; 0 if that is unknown.
        dtype: type of weights and activations.
        opset: version of the default domain.
        inlined: whether the norms were expanded into standard operators.
        fuse_skip: whether residual additions were fused with the norms that follow them.
        cache: how a language model keeps its keys and values; None for other tasks.
        quantization: how matrices are stored; None if they have the dtype.
        packed: names of the checkpoint's matrices that were joined into one, by the name in the file. The key is only
            written for the target `ORT_GENAI`.
        config: the checkpoint's `ibnorm` section; None for a model that the user's own code builds.
        norms: spec of every norm, by module path.
        source_sha256: hash of the checkpoint's config and weights.
        arguments: for a module from memory, what the inputs do not show: `integers`, the types that `forward` takes by
            input name where the file has int64; `constants`, other arguments by name; `ranges`, the smallest and the
            largest integer by input name; `sizes`, those of the example's dynamic axes. The key is only written if
            there are some.
        shape: sizes that the export has fixed, by name of the axis. The key is only written if there are some.
        requires: the oldest version that runs the file, by runtime: "onnxruntime", and "onnxruntime-genai" for its
            folders. Files of earlier versions do not have the key.
        versions: versions of the packages that wrote the file.
        other: entries under keys that this version does not know.
    """

    format: str = METADATA_FORMAT
    family: str = ""
    task: Task = Task.FORWARD
    target: Target = Target.PORTABLE
    max_positions: int = 0
    dtype: DType = DType.FP32
    opset: int = 0
    inlined: bool = False
    fuse_skip: bool = False
    cache: CacheKind | None = None
    quantization: QuantizationEntry | None = None
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    norms: Mapping[str, Any] = field(default_factory=dict)
    source_sha256: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, int] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> ModelMetadata:
        """The metadata of a file that has none."""
        return cls(format="")

    @property
    def is_empty(self) -> bool:
        """Whether the file has no metadata, or its metadata states no format."""
        return not self.format

    def to_dict(self) -> dict[str, Any]:
        """The entries as JSON values, keys in order."""
        if self.is_empty:
            return {}
        entries = {name: getattr(self, name) for name in _READERS} | dict(self.other)
        entries["quantization"] = None if self.quantization is None else self.quantization.to_dict()
        entries["packed"] = {name: list(parts) for name, parts in self.packed.items()}
        if self.target is Target.PORTABLE:
            del entries["target"], entries["packed"]
        for name in ("arguments", "shape", "requires"):
            if not entries[name]:
                del entries[name]
        return {key: entries[key] for key in sorted(entries)}

    def to_props(self) -> dict[str, str]:
        """The entries as an ONNX file holds them: keys with a prefix and in order, values as JSON."""
        return {f"{_PREFIX}{key}": json.dumps(value, sort_keys=True) for key, value in self.to_dict().items()}

    @classmethod
    def from_props(cls, props: Mapping[str, str], file: Path) -> ModelMetadata:
        """Read the metadata of an ONNX file.

        Args:
            props: the file's metadata, of any tool.
            file: the file that it was read from, for messages.

        Returns:
            The metadata, of any format version; empty if the file has no key of this package.

        Raises:
            ModelFileError: an entry is not JSON, or not what `export` writes.
        """
        entries: dict[str, Any] = {}
        for key, text in props.items():
            if key.startswith(_PREFIX):
                try:
                    entries[key.removeprefix(_PREFIX)] = parse_json(text)
                except ValueError as error:
                    raise ModelFileError(f"{file}: metadata {quoted(key)} is not valid JSON") from error
        known: dict[str, Any] = {"format": ""}
        for key, read in _READERS.items():
            if key in entries:
                value = entries.pop(key)
                try:
                    known[key] = read(value)
                except _Unexpected as error:
                    raise ModelFileError(
                        f"{file}: metadata {key!r} is {quoted(value)}; it must be {error}. Export the checkpoint again"
                    ) from error
        return cls(**known, other=entries)


class _Unexpected(ValueError):
    """An entry has the wrong type or value; the message states what it must be."""


def _fail(expected: str) -> NoReturn:
    raise _Unexpected(expected)


def _of_type(kind: type, expected: str) -> Callable[[Any], Any]:
    """A reader that takes values of exactly this type: JSON's true is not an integer."""
    return lambda value: value if type(value) is kind else _fail(expected)


def _member_of(kind: type[enum.StrEnum]) -> Callable[[Any], Any]:
    legal = {member.value: member for member in kind}
    expected = f"one of {', '.join(legal)}"
    return lambda value: legal[value] if isinstance(value, str) and value in legal else _fail(expected)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _read_quantization(value: Any) -> QuantizationEntry:
    if not isinstance(value, dict) or value.get("bits") not in (4, 8):
        _fail("an object whose bits are 4 or 8")
    # Other values are checked when they are compared with the matrices; 0 and None match no matrix.
    block_size, head_bits = value.get("block_size"), value.get("head_bits")
    return QuantizationEntry(
        int(value["bits"]),
        block_size if isinstance(block_size, int) else 0,
        head_bits=head_bits if isinstance(head_bits, int) else None,
        method=str(value.get("method", "")),
        norms=str(value.get("norms", "")),
    )


def _read_packed(value: Any) -> dict[str, tuple[str, ...]]:
    expected = "an object of lists of names"
    if not isinstance(value, dict):
        _fail(expected)
    for names in value.values():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            _fail(expected)
    return {stored: tuple(names) for stored, names in value.items()}


def _read_arguments(value: Any) -> dict[str, dict[str, Any]]:
    expected = f"an object of {', '.join(_ARGUMENTS)}, each by name"
    if not isinstance(value, dict) or not set(value) <= set(_ARGUMENTS):
        _fail(expected)
    for key, entries in value.items():
        if not isinstance(entries, dict) or not all(_ARGUMENTS[key](entry) for entry in entries.values()):
            _fail(expected)
    return value


def _read_shape(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not all(type(size) is int and size >= 0 for size in value.values()):
        _fail("an object of integers")
    return value


def _read_requires(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) and _VERSION.fullmatch(v) for v in value.values()):
        _fail("an object of versions")
    return value


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and [type(limit) for limit in value] == [int, int] and value[0] <= value[1]


#: A version of a runtime, such as 1.24.
_VERSION: Final = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6}){0,3}")

#: Types of inputs that a file has as int64.
_INTEGERS: Final = ("bool", "uint8", "int8", "int16", "int32")

#: What `arguments` may have, and whether an entry is legal there.
_ARGUMENTS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "integers": lambda value: isinstance(value, str) and value in _INTEGERS,
    "constants": lambda value: value is None or isinstance(value, (bool, int, float, str)),
    "ranges": _is_range,
    "sizes": lambda value: type(value) is int and value > 0,
}

_TEXT: Final = _of_type(str, "a string")
_INTEGER: Final = _of_type(int, "an integer")
_FLAG: Final = _of_type(bool, "true or false")
_OBJECT: Final = _of_type(dict, "an object")

#: How the JSON value of each key is checked and read.
_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "format": str,  # another version may write it differently; `require_metadata` compares it
    "family": _TEXT,
    "task": _member_of(Task),
    "target": _member_of(Target),
    "max_positions": _INTEGER,
    "dtype": _member_of(DType),
    "opset": _INTEGER,
    "inlined": _FLAG,
    "fuse_skip": _FLAG,
    "cache": _optional(_member_of(CacheKind)),
    "quantization": _optional(_read_quantization),
    "packed": _read_packed,
    "config": _optional(_OBJECT),
    "norms": _OBJECT,
    "source_sha256": _TEXT,
    "arguments": _read_arguments,
    "shape": _read_shape,
    "requires": _read_requires,
    "versions": _OBJECT,
}
