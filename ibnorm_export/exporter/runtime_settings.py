"""What an export for one runtime sets, and why: the table of `export --for` and `ExportOptions(runtime=...)`.

An option that the user states wins where the runtime takes it, and is an error where it does not. What no row sets
keeps the default of the model's family.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from ibnorm_export.artifacts.axes import BATCH, SEQUENCE
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.runtime_versions import (
    EIGHT_BITS,
    STATIC_CACHE,
    RuntimeName,
    newest_opset,
    version_numbers,
)
from ibnorm_export.artifacts.tensors import DEFAULT_LENGTH, DType
from ibnorm_export.errors import ExportError, quoted
from ibnorm_export.op.onnx_functions import OPSETS

__all__ = ["SETTINGS", "RuntimeSettings", "check_model", "check_settings", "runtime_settings"]


_EVERY_DTYPE: Final = tuple(DType)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """What an export for one runtime sets. Each field is a column of the table.

    Args:
        runtime: the runtime.
        why: the reasons, in one sentence each.
        inline: whether the norms must be expanded into standard operators.
        opset: the newest opset that the runtime takes.
        fastest: by family, the opset of its fastest kernels; others keep the family's default.
        dtypes: types of weights and activations that it takes.
        bits: bits of the quantised matrices that it takes; empty if it has no MatMulNBits.
        static_cache: whether it runs TensorScatter.
        tasks: tasks whose files it runs.
        families: families whose files it runs; empty is all.
        shape: sizes of the axes that it needs fixed, where the user gives none.
        oldest: the version that was named, as numbers; empty is the newest.
    """

    runtime: RuntimeName
    why: str
    inline: bool = False
    opset: int = OPSETS.stop - 1
    fastest: Mapping[str, int] = field(default_factory=dict)
    dtypes: tuple[DType, ...] = _EVERY_DTYPE
    bits: tuple[int, ...] = (4, 8)
    static_cache: bool = True
    tasks: tuple[Task, ...] = tuple(Task)
    families: tuple[str, ...] = ()
    shape: Mapping[str, int] = field(default_factory=dict)
    oldest: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.runtime}>={'.'.join(map(str, self.oldest))}" if self.oldest else str(self.runtime)


_FIXED: Final = MappingProxyType({BATCH: 1, SEQUENCE: DEFAULT_LENGTH})

#: What the runtimes share that were tried with one form of file only; each has its own name and reasons.
_FORWARD_ONLY: Final = RuntimeSettings(
    runtime=RuntimeName.LITERT,
    why="",
    inline=True,
    opset=18,
    dtypes=(DType.FP32,),
    bits=(),
    static_cache=False,
    tasks=(Task.FORWARD,),
)

_ROWS: Final = (
    RuntimeSettings(
        runtime=RuntimeName.ORT,
        fastest={"vit": 23},  # its Attention: 4 to 7% less time (benchmarks/results/model_cpu.json)
        why="It takes functions, and the opset of the oldest version that must run the file.",
    ),
    RuntimeSettings(
        runtime=RuntimeName.WEB,
        dtypes=(DType.FP32, DType.FP16),
        static_cache=False,
        why="It takes functions. JavaScript has no bfloat16, and transformers.js grows the cache itself.",
    ),
    RuntimeSettings(
        runtime=RuntimeName.OPENVINO,
        inline=True,
        opset=22,
        static_cache=False,
        why="It rejects local functions, TensorScatter, and the Attention of opset 23 with a cache in half precision.",
    ),
    RuntimeSettings(
        runtime=RuntimeName.TENSORRT,
        opset=23,
        bits=(),
        static_cache=False,
        why="Its parser takes functions, and a plugin in their place, but neither MatMulNBits nor TensorScatter.",
    ),
    replace(
        _FORWARD_ONLY,
        runtime=RuntimeName.LITERT,
        shape=_FIXED,
        why="onnx2tf takes neither functions nor the Attention and Gelu of newer opsets, and fixed sizes. "
        "It rounds weights to fp16 itself: --target litert --dtype fp16.",
    ),
    replace(
        _FORWARD_ONLY,
        runtime=RuntimeName.TVM,
        shape=_FIXED,
        why="It takes neither functions nor the Attention and Gelu of newer opsets, and fixed sizes.",
    ),
    replace(
        _FORWARD_ONLY,
        runtime=RuntimeName.IREE,
        families=("vit", "resnet", "llama", "gpt2"),
        shape=_FIXED,
        why="It takes no functions, ran these families, and with dynamic axes is silently wrong on GPT-2.",
    ),
    replace(
        _FORWARD_ONLY,
        runtime=RuntimeName.MNN,
        families=("vit", "resnet", "llama", "gpt2"),
        why="It takes no functions, and was seen to run these families only.",
    ),
    replace(
        _FORWARD_ONLY,
        runtime=RuntimeName.TRACT,
        shape=_FIXED,
        why="It takes no functions, and fixed sizes: with dynamic axes it refuses language models.",
    ),
)

#: Every row by its runtime.
SETTINGS: Final[Mapping[RuntimeName, RuntimeSettings]] = MappingProxyType({row.runtime: row for row in _ROWS})

_FORM: Final = re.compile(r"(?P<name>[a-z]+)(?:\s*>=\s*(?P<version>[0-9]+(?:\.[0-9]+){1,2}))?")


def runtime_settings(text: RuntimeSettings | str) -> RuntimeSettings:
    """Return the settings for a runtime.

    Args:
        text: a `RuntimeName`, "ort>=VERSION", or settings, which are returned as they are.

    Raises:
        ExportError: there is no such runtime, only ONNX Runtime has a version here, or no opset of this package runs
            on that version.
    """
    if isinstance(text, RuntimeSettings):
        return text
    match = _FORM.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    name = match["name"] if match else ""
    if match is None or name not in tuple(RuntimeName):
        raise ExportError(
            f"runtime is {quoted(text)}; it must be one of {', '.join(RuntimeName)}, or ort>=VERSION, as in ort>=1.18"
        )
    settings = SETTINGS[RuntimeName(name)]
    if match["version"] is None:
        return settings
    if settings.runtime is not RuntimeName.ORT:
        raise ExportError(f"runtime is {quoted(text)}; only ort takes a version, so write {name}")
    return _for_onnxruntime(settings, match["version"])


def _for_onnxruntime(settings: RuntimeSettings, version: str) -> RuntimeSettings:
    numbers = version_numbers(version)
    opset = newest_opset(numbers)
    if opset < OPSETS.start:
        raise ExportError(f"runtime is ort>={version}; files run on ONNX Runtime 1.18 and later: choose ort>=1.18")
    return replace(
        settings,
        opset=min(opset, settings.opset),
        bits=settings.bits if numbers >= EIGHT_BITS else (4,),
        static_cache=numbers >= STATIC_CACHE,
        oldest=numbers,
    )


def check_settings(
    settings: RuntimeSettings,
    *,
    inline: bool | None,
    opset: int | None,
    dtype: DType,
    bits: Collection[int],
    static_cache: bool,
) -> None:
    """Raise ExportError if an option that the user states contradicts the runtime.

    Args:
        settings: the settings for the runtime.
        inline: whether the norms are expanded; None leaves it to the runtime.
        opset: the opset; None leaves it to the runtime.
        dtype: type of weights and activations.
        bits: bits of the quantised matrices.
        static_cache: whether the cache is written in place.
    """
    reason = f"--for {settings}: {settings.why}"
    if settings.inline and inline is False:
        raise ExportError(f"the norms must be expanded, but inline is False; leave it out ({reason})")
    if opset is not None and opset > settings.opset:
        raise ExportError(f"opset is {opset}; it must be at most {settings.opset}, or left out ({reason})")
    if dtype not in settings.dtypes:
        raise ExportError(f"dtype is {dtype}; it must be {' or '.join(settings.dtypes)} ({reason})")
    for number in sorted(set(bits) - set(settings.bits)):
        legal = " or ".join(f"int{n}" for n in settings.bits) or "none"
        raise ExportError(f"matrices are stored in int{number}; the runtime takes {legal} ({reason})")
    if static_cache and not settings.static_cache:
        raise ExportError(f"the cache is static; it must be dynamic ({reason})")


def check_model(settings: RuntimeSettings, *, family: str, task: Task, source: str) -> None:
    """Raise ExportError for a model that the runtime does not run.

    Args:
        settings: the settings for the runtime.
        family: name of the model's architecture.
        task: the task that the model was loaded for.
        source: the checkpoint, for the message.
    """
    reason = f"--for {settings}: {settings.why}"
    if task not in settings.tasks:
        raise ExportError(
            f"{source} was loaded for the task {task}; the runtime takes {' or '.join(settings.tasks)} ({reason})"
        )
    if settings.families and family not in settings.families:
        raise ExportError(f"{source} is a {family}; the runtime takes {', '.join(settings.families)} ({reason})")
