"""check.toml -> CheckConfig: what a team's gate exports, compares and times. Unknown keys are errors.

The dataclasses are the format: a field is a key, its type what is legal there, its default what holds
where the key is absent. Paths are relative to the file's folder.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ConfigError
from ibnorm_export.runtimes.registry import BACKENDS
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["PRESENT", "CheckConfig", "ExportCheck", "LatencyBudget", "ParityCheck", "read_check_config"]

_FORMAT: Final = 1
_RESULTS: Final = "check-results"

#: In place of a backend's name: every one that can run here.
PRESENT: Final = "present"


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """How an export is compared with its checkpoint.

    Args:
        backends: of `BACKENDS`, or "present".
        samples, seed: of drawn inputs.
        layers: measure every norm and block, and name the first that leaves its bound.
        exposing: the inputs that expose wrong arithmetic too (heavy tails, large means, constant rows, ...).
        inputs: .npz files of the user's own, instead of drawn samples.
        kernels, require_fused: as in `verify`.
        max_error: a limit on every output's relative error, beside the bounds of docs/verification.md.
    """

    backends: tuple[str, ...] = ("ort-cpu",)
    samples: int = 4
    _: KW_ONLY
    seed: int = 0
    layers: bool = True
    exposing: bool = True
    inputs: tuple[Path, ...] = ()
    kernels: Kernels = Kernels.AUTO
    require_fused: bool = False
    max_error: float | None = None


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """One limit on the time of a pass: exactly one of `max_ms`, `baseline` and `against`.

    Args:
        max_ms: for the median pass.
        baseline: a JSON of `bench --save-baseline`, to be compared over the yardstick.
        against: "torch", "torch.compile" or the name of another export.
        max_ratio: of the time over that of `baseline` or `against`.
        backend, threads, batch, sequence: what is timed; 0 threads are the physical cores, a sequence of 0 has 128
            tokens, or as many as the model has positions.
        rounds: to begin with.
        max_rounds: up to which more are taken while the rounds cannot tell.
    """

    max_ms: float | None = None
    baseline: Path | None = None
    _: KW_ONLY
    against: str | None = None
    max_ratio: float = 1.0
    backend: str = "ort-cpu"
    threads: int = 0
    batch: int = 1
    sequence: int = 0
    rounds: int = 20
    max_rounds: int = 80


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """One file: made of `checkpoint`, or, with `file`, found."""

    name: str
    checkpoint: Path
    _: KW_ONLY
    model: str | None = None
    file: Path | None = None
    task: Task = Task.FORWARD
    dtype: DType = DType.FP32
    opset: int | None = None
    inline: bool = False
    fuse_skip: bool = True
    parity: ParityCheck = field(default_factory=ParityCheck)
    latency: tuple[LatencyBudget, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """The whole file; `results` is the folder that gets the reports and the exported files."""

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
            raise ConfigError(f"{where} is {value!r}; it must be a list")
        return tuple(
            _value(inner[0], item, where=f"{where}[{index}]", folder=folder) for index, item in enumerate(value)
        )
    if dataclasses.is_dataclass(kind):
        return _table(typing.cast(type, kind), value, where=where, folder=folder)
    if issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError:
            raise ConfigError(f"{where} is {value!r}; it must be one of {[m.value for m in kind]}") from None
    if kind is Path and isinstance(value, str):
        return folder / value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (kind is int and isinstance(value, bool)) or kind is Path or not isinstance(value, kind):
        raise ConfigError(f"{where} is {value!r}; it must be {'a path' if kind is Path else kind.__name__}")
    return value


def _table(kind: type[_T], value: object, *, where: str, folder: Path) -> _T:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}; it must be a table")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has unknown keys {unknown}; legal keys are {list(hints)}")
    for found in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind that is read here is a dataclass
        required = found.default is dataclasses.MISSING and found.default_factory is dataclasses.MISSING
        if required and found.name not in value:
            raise ConfigError(f"{where}.{found.name} is missing")
    return kind(**{key: _value(hints[key], v, where=f"{where}.{key}", folder=folder) for key, v in value.items()})


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise ConfigError(problem)


def _check_export(export: ExportCheck, names: list[str]) -> None:
    where = f"export {export.name!r}"
    plain = export.name and all(c.isalnum() or c in "-_." for c in export.name) and export.name[0] != "."
    _demand(bool(plain), f"{where}: a name is of letters, digits, '-', '_' and '.', for it names a file")
    _demand(names.count(export.name) == 1, f"{where} is there {names.count(export.name)} times; names must differ")
    legal = (*(name for name in BACKENDS if name != "triton"), PRESENT)  # a server has an address
    for backend in (*export.parity.backends, *(budget.backend for budget in export.latency)):
        _demand(backend in legal, f"{where}: there is no backend {backend!r}; there are {', '.join(legal)}")
    _demand(bool(export.parity.backends), f"{where}: parity.backends is empty; name at least one")
    _demand(export.parity.samples >= 1, f"{where}: parity.samples is {export.parity.samples}; it must be at least 1")
    _demand(export.parity.seed >= 0, f"{where}: parity.seed is {export.parity.seed}; it must be at least 0")
    above = export.parity.max_error
    _demand(above is None or above >= 0.0, f"{where}: parity.max_error is {above}; it must be at least 0")
    for index, budget in enumerate(export.latency):
        place = f"{where}: latency[{index}]"
        given = [key for key in ("max_ms", "baseline", "against") if getattr(budget, key) is not None]
        _demand(len(given) == 1, f"{place} names {given}; it must name exactly one of max_ms, baseline and against")
        others = [name for name in names if name != export.name]
        rivals = (None, "torch", "torch.compile", *others)
        _demand(budget.against in rivals, f"{place}: against is {budget.against!r}; it must be one of {rivals[1:]}")
        limits = (budget.max_ratio, 1.0 if budget.max_ms is None else budget.max_ms)
        sound = all(math.isfinite(limit) and limit > 0.0 for limit in limits)
        _demand(sound, f"{place}: a limit must be above 0 and finite")
        _demand(budget.threads >= 0, f"{place}: threads is {budget.threads}; it must be at least 0, the physical cores")
        counts = (budget.batch, budget.sequence + 1, budget.rounds, budget.max_rounds - budget.rounds + 1)
        _demand(
            min(counts) >= 1, f"{place}: batch and rounds must be at least 1, sequence 0, max_rounds at least rounds"
        )


def read_check_config(path: str | Path) -> CheckConfig:
    """Read and check the file.

    Raises:
        ConfigError: it is missing, no TOML, or a key is unknown, missing or has an illegal value; the
            message names it.
    """
    path = Path(path)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; write a starting file with `ibnorm-export check --init CHECKPOINT`"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    try:
        config = _table(CheckConfig, {"results": _RESULTS, **found}, where=path.name, folder=path.parent)
        _demand(config.format == _FORMAT, f"{path.name}.format is {config.format}; this version reads {_FORMAT}")
        _demand(bool(config.export), f"{path.name} names no [[export]]: nothing to check")
        for export in config.export:
            _check_export(export, [other.name for other in config.export])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config
