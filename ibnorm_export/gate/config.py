"""The format of check.toml: what to export, compare and time.

The dataclasses are the format: a field is a key, its type is what is legal there, and its default holds if the
key is absent. An unknown key is an error. Paths are relative to the file's folder.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from ibnorm_export.artifacts.metadata import Task, Weights
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.benchmark.options import BACKEND_CANDIDATES, TORCH_CANDIDATES, Difference
from ibnorm_export.errors import ConfigError, quoted
from ibnorm_export.evaluation.options import TaskName
from ibnorm_export.parsing import read_toml
from ibnorm_export.runtimes.runner import Backend, Kernels
from ibnorm_export.verifier.options import InputCoverage

__all__ = [
    "PRESENT",
    "CheckConfig",
    "EvaluationCheck",
    "ExportCheck",
    "LatencyBudget",
    "ParityCheck",
    "read_check_config",
]

_FORMAT: Final = 1
_RESULTS: Final = "check-results"

#: Instead of a backend's name: every backend that can run here.
PRESENT: Final = "present"

#: Backends that a check can use. Triton is left out: it needs the address of a server.
_BACKENDS: Final = tuple(backend for backend in Backend if backend is not Backend.TRITON)

#: How a message states the smallest legal value of a key, if it is not a plain number.
_LEAST: Final = {"threads": "0, which means the physical cores that this process may use", "max_rounds": "rounds"}


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """How an export is compared with its checkpoint.

    Args:
        backends: names of backends, or "present" for every one that can run here.
        samples: number of random samples.
        seed: seed for the random samples.
        layers: measure every norm and block, and name the first one beyond its tolerance.
        coverage: "fast" leaves out the longest sequence, a large batch and large values.
        stress: add stress inputs (heavy tails, large means, constant rows, ...).
        inputs: your own .npz files, instead of random samples.
        expected: an .npz file of inputs and outputs that the training code saved; see `verify`.
        expected_dtype: the type that the training code computed in; the default is that of the saved outputs.
        kernels, npm, require_fused: as in `verify`.
        max_error: a limit on the relative error of every output, in addition to the tolerances of
            docs/concepts/verdict.md.
    """

    backends: tuple[str, ...] = (Backend.ORT_CPU,)
    samples: int = 4
    _: KW_ONLY
    seed: int = 0
    layers: bool = True
    coverage: InputCoverage = InputCoverage.FULL
    stress: bool = True
    inputs: tuple[Path, ...] = ()
    expected: Path | None = None
    expected_dtype: DType | None = None
    kernels: Kernels = Kernels.AUTO
    npm: Path | None = None
    require_fused: bool = False
    max_error: float | None = None


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """One limit on the time of a pass: exactly one of `max_ms`, `baseline` and `against`. Each field is a key.

    Args:
        max_ms: the largest median time that passes, in ms.
        baseline: a file of `bench --save-baseline`; times are compared relative to the reference load.
        against: "torch", "torch.compile", another backend that runs the same file, or the name of another export.
        max_ratio: the largest ratio to `baseline` or `against` that passes.
        backend: what runs the export.
        threads: number of threads; 0 means the physical cores that this process may use.
        batch: size of the batch axis.
        sequence: tokens of a sequence; 0 means 128, or as many as the model has positions.
        rounds: rounds to begin with.
        max_rounds: rounds are added up to this number as long as they do not decide.
        allow: differences from the conditions of `baseline` that do not matter, e.g. "runtime".
    """

    max_ms: float | None = None
    baseline: Path | None = None
    _: KW_ONLY
    against: str | None = None
    max_ratio: float = 1.0
    backend: Backend = Backend.ORT_CPU
    threads: int = 0
    batch: int = 1
    sequence: int = 0
    rounds: int = 20
    max_rounds: int = 80
    allow: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluationCheck:
    """Whether an export still does its task, against its checkpoint. Each field is a key; see `EvaluationOptions`.

    Args:
        task: "perplexity", "classification", "choice" or "lm-eval".
        data: the file or folder of texts, images, questions or tasks.
        max_drop: the largest loss that passes: of accuracy as a share, of perplexity as a relative increase.
        backend: what runs the export.
        limit: number of samples; all if it is absent.
        max_length: length of a window for perplexity, in tokens.
        stride: distance between two windows, in tokens.
        max_unreadable: share of samples that may be unreadable.
        tokenizer: folder of the tokenizer, if not the checkpoint's.
        preprocessing: folder of the settings of images, if not the checkpoint's.
        tasks: names of tasks of lm-eval; all of the data folder's own if it is absent.
    """

    task: TaskName
    data: Path
    _: KW_ONLY
    max_drop: float = 0.005
    backend: Backend = Backend.ORT_CPU
    limit: int | None = None
    max_length: int | None = None
    stride: int | None = None
    max_unreadable: float = 0.0
    tokenizer: Path | None = None
    preprocessing: Path | None = None
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """One file: exported from `checkpoint`, or an existing export of it in `file`. Each field is a key."""

    name: str
    checkpoint: Path
    _: KW_ONLY
    model: str | None = None
    weights: Weights | None = None
    file: Path | None = None
    task: Task = Task.FORWARD
    dtype: DType = DType.FP32
    opset: int | None = None
    inline: bool = False
    fuse_skip: bool = True
    parity: ParityCheck = field(default_factory=ParityCheck)
    latency: tuple[LatencyBudget, ...] = ()
    evaluate: tuple[EvaluationCheck, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """The whole file. `results` is the folder for the reports and the exported files."""

    export: tuple[ExportCheck, ...]
    results: Path
    format: int = _FORMAT


_T = TypeVar("_T")


def _value(kind: Any, value: object, *, where: str, folder: Path) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _value(next(k for k in inner if k is not type(None)), value, where=where, folder=folder)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {quoted(value)}; it must be a list")
        return tuple(
            _value(inner[0], item, where=f"{where}[{index}]", folder=folder) for index, item in enumerate(value)
        )
    if dataclasses.is_dataclass(kind):
        return _table(typing.cast(type, kind), value, where=where, folder=folder)
    if issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError:
            raise ConfigError(
                f"{where} is {quoted(value)}; it must be one of {', '.join(m.value for m in kind)}"
            ) from None
    if kind is Path and isinstance(value, str):
        return folder / value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{where} is {quoted(value)}; it must be a number that a float can hold") from error
    if (kind is int and isinstance(value, bool)) or kind is Path or not isinstance(value, kind):
        raise ConfigError(f"{where} is {quoted(value)}; it must be {'a path' if kind is Path else kind.__name__}")
    return value


def _table(kind: type[_T], value: object, *, where: str, folder: Path) -> _T:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {quoted(value)}; it must be a table")
    keys = dataclasses.fields(kind)  # type: ignore[arg-type]  # every kind that is read here is a dataclass
    legal = [found.name for found in keys]
    unknown = sorted(set(value) - set(legal))
    if unknown:
        raise ConfigError(f"{where} has unknown keys {quoted(unknown)}; legal keys are {legal}")
    for found in keys:
        required = found.default is dataclasses.MISSING and found.default_factory is dataclasses.MISSING
        if required and found.name not in value:
            raise ConfigError(f"{where}.{found.name} is missing")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(hints[key], v, where=f"{where}.{key}", folder=folder) for key, v in value.items()})


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ConfigError(problem)


def _check_export(export: ExportCheck, names: list[str]) -> None:
    """Raise ConfigError if a value of an export is not legal; `names` are the names of all exports."""
    where = f"export {export.name!r}"
    plain = export.name and all(c.isalnum() or c in "-_." for c in export.name) and export.name[0] != "."
    _require(
        bool(plain), f"{where}: a name becomes the name of a file; use letters, digits, '-', '_', and '.' inside it"
    )
    count = names.count(export.name)
    _require(count == 1, f"{where} appears {count} times; every export needs its own name")
    _check_parity(export.parity, where)
    for index, wanted in enumerate(export.evaluate):
        _check_evaluation(wanted, f"{where}: evaluate[{index}]")
    others = [name for name in names if name != export.name]
    for index, budget in enumerate(export.latency):
        _check_budget(budget, f"{where}: latency[{index}]", others=others)


def _check_parity(parity: ParityCheck, where: str) -> None:
    for backend in parity.backends:
        legal = (*_BACKENDS, PRESENT)
        _require(
            backend in legal,
            f"{where}: there is no backend {quoted(backend)}; the backends are {', '.join(legal)}",
        )
    _require(bool(parity.backends), f"{where}: parity.backends is empty; name at least one")
    _require(parity.samples >= 1, f"{where}: parity.samples is {parity.samples}; it must be at least 1")
    _require(parity.seed >= 0, f"{where}: parity.seed is {parity.seed}; it must be at least 0")
    limit = parity.max_error
    _require(limit is None or limit >= 0.0, f"{where}: parity.max_error is {limit}; it must be at least 0")


def _check_evaluation(wanted: EvaluationCheck, where: str) -> None:
    legal = ", ".join(_BACKENDS)
    _require(wanted.backend in _BACKENDS, f"{where}: backend is {quoted(wanted.backend)}; it must be one of {legal}")
    for key in ("max_drop", "max_unreadable"):
        value = getattr(wanted, key)
        _require(math.isfinite(value) and value >= 0.0, f"{where}: {key} is {value}; it must be at least 0")
    for key, least in {"limit": 1, "max_length": 2, "stride": 1}.items():
        value = getattr(wanted, key)
        _require(value is None or value >= least, f"{where}: {key} is {value}; it must be at least {least}")


def _check_budget(budget: LatencyBudget, where: str, *, others: list[str]) -> None:
    legal = ", ".join(_BACKENDS)
    _require(budget.backend in _BACKENDS, f"{where}: backend is {quoted(budget.backend)}; it must be one of {legal}")
    given = [key for key in ("max_ms", "baseline", "against") if getattr(budget, key) is not None]
    _require(len(given) == 1, f"{where} names {given}; it must name exactly one of max_ms, baseline and against")
    backends = (backend for backend in BACKEND_CANDIDATES if backend != budget.backend)
    candidates = (*TORCH_CANDIDATES, *backends, *others)
    known = budget.against is None or budget.against in candidates
    _require(known, f"{where}: against is {quoted(budget.against)}; it must be one of {', '.join(candidates)}")
    for key in ("max_ratio", "max_ms"):
        limit = getattr(budget, key)
        sound = limit is None or (math.isfinite(limit) and limit > 0.0)
        _require(sound, f"{where}: {key} is {limit}; it must be finite and above 0")
    smallest = {"threads": 0, "batch": 1, "sequence": 0, "rounds": 1, "max_rounds": budget.rounds}
    for key, least in smallest.items():
        value = getattr(budget, key)
        _require(value >= least, f"{where}: {key} is {value}; it must be at least {_LEAST.get(key, least)}")


def read_check_config(path: str | Path) -> CheckConfig:
    """Read a check.toml.

    Raises:
        ConfigError: the file is missing or is not TOML; or a key is unknown, missing or has an illegal value, and
            the message names it.
    """
    path = Path(path)
    try:
        found = read_toml(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; write a starting file with `ibnorm-export check --init CHECKPOINT`"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    try:
        config = _table(CheckConfig, {"results": _RESULTS, **found}, where=path.name, folder=path.parent)
        _require(config.format == _FORMAT, f"{path.name}.format is {config.format}; this version reads {_FORMAT}")
        _require(bool(config.export), f"{path.name} names no [[export]]: nothing to check")
        for export in config.export:
            _check_export(export, [other.name for other in config.export])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config
