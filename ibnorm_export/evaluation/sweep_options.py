"""What a sweep tries: types of weights, block sizes and runtimes, and what it prefers."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

from ibnorm_export.artifacts.runtime_versions import RuntimeName
from ibnorm_export.artifacts.tensors import WeightType
from ibnorm_export.choices import choice, whole_number
from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.verifier.options import InputCoverage

__all__ = ["AXES", "Preference", "SweepOptions", "Variant", "parse_sweep"]

#: The runtime that a file must be exported for, by the backend that runs it. Other backends run the default file.
_EXPORTED_FOR: Final = {
    Backend.ORT_WEB: RuntimeName.WEB,
    Backend.ORT_NODE: RuntimeName.WEB,
    Backend.TENSORRT: RuntimeName.TENSORRT,
    Backend.TENSORRT_RTX: RuntimeName.TENSORRT,
    Backend.OPENVINO: RuntimeName.OPENVINO,
}


class Preference(enum.StrEnum):
    """What decides between files that pass."""

    LATENCY = "latency"
    """The fastest one; of those that are about as fast, the smallest."""
    SIZE = "size"
    """The smallest one; of those that are about as small, the fastest."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to export and run a model.

    Args:
        weights: type of the weights.
        block_size: number of quantised weights that share a scale; 0 if they are not quantised.
        backend: what runs the file.
    """

    weights: WeightType
    block_size: int
    backend: Backend

    @property
    def runtime(self) -> RuntimeName | None:
        """The runtime that its file is exported for; None for the default file."""
        return _EXPORTED_FOR.get(self.backend)

    @property
    def file_name(self) -> str:
        """Name of the file or folder without its suffix; variants that need the same file share it."""
        block = f"-block{self.block_size}" if self.block_size else ""
        return f"{self.weights}{block}" + (f"-{self.runtime}" if self.runtime else "")

    @property
    def name(self) -> str:
        """Name in the report: type and block size, and the backend unless it is ONNX Runtime on the CPU."""
        block = f"-block{self.block_size}" if self.block_size else ""
        return f"{self.weights}{block}" + ("" if self.backend is Backend.ORT_CPU else f"@{self.backend}")


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What a sweep tries. Every combination becomes one file, and block sizes apply to int8 and int4 only.

    Args:
        dtypes: types of weights, each a `WeightType` or its name.
        block_sizes: numbers of quantised weights that share a scale.
        runtimes: what runs the files, each a `Backend` or its name.
        prefer: what decides between files that pass, a `Preference` or its name.
        rounds: turns of each file when it is timed.
        coverage: inputs on which each file is verified, an `InputCoverage` or its name.

    Raises:
        IBNormError: a value is not legal, is given twice, or a list is empty.
    """

    dtypes: tuple[WeightType, ...] = (WeightType.FP32, WeightType.FP16, WeightType.INT8, WeightType.INT4)
    block_sizes: tuple[int, ...] = (32,)
    _: KW_ONLY
    runtimes: tuple[Backend, ...] = (Backend.ORT_CPU,)
    prefer: Preference = Preference.LATENCY
    rounds: int = 20
    coverage: InputCoverage = InputCoverage.FULL

    def __post_init__(self) -> None:
        def block_size(value: Any, name: str) -> int:
            return whole_number(value, name=name, least=1)

        self._read("dtypes", lambda value, name: choice(WeightType, value, name=name))
        self._read("block_sizes", block_size)
        self._read("runtimes", lambda value, name: choice(Backend, value, name=name))
        object.__setattr__(self, "prefer", choice(Preference, self.prefer, name="prefer"))
        object.__setattr__(self, "coverage", choice(InputCoverage, self.coverage, name="coverage"))
        object.__setattr__(self, "rounds", whole_number(self.rounds, name="rounds", least=1))
        if Backend.TRITON in self.runtimes:
            raise IBNormError(
                "a sweep cannot run on triton, which serves one model at a time: evaluate each file with --backend "
                "triton --url HOST:PORT"
            )

    def _read(self, field: str, convert: Callable[[Any, str], Any]) -> None:
        given = getattr(self, field)
        values = tuple(convert(value, field) for value in ((given,) if isinstance(given, (str, int)) else given))
        if not values or len(set(values)) < len(values):
            problem = "is empty" if not values else "has a value twice"
            raise IBNormError(f"{field} {problem}: {quoted(', '.join(map(str, values)))}; give each value once")
        object.__setattr__(self, field, values)

    def variants(self) -> tuple[Variant, ...]:
        """Every combination, runtime by runtime."""
        return tuple(
            Variant(dtype, block, backend)
            for backend, dtype in itertools.product(self.runtimes, self.dtypes)
            for block in (self.block_sizes if dtype.bits else (0,))
        )


#: What `--sweep` may vary, and the field of `SweepOptions` that each is.
AXES: Final = {"dtype": "dtypes", "block-size": "block_sizes", "runtime": "runtimes"}


def parse_sweep(texts: Sequence[str], **others: Any) -> SweepOptions:
    """Read what a sweep tries from texts such as "dtype=fp32,int8 block-size=32,128".

    Args:
        texts: one or several of AXIS=VALUE,VALUE in each, separated by spaces.
        others: the other fields of `SweepOptions`.

    Raises:
        IBNormError: a text does not have that form, or a value is not legal.
    """
    found: dict[str, Any] = {}
    for item in " ".join(texts).split():
        axis, _, values = item.partition("=")
        field = AXES.get(axis)
        if field is None or not values:
            raise IBNormError(
                f"{quoted(item)} is not AXIS=VALUE,VALUE with an axis of {', '.join(AXES)}, as in dtype=fp32,int8 or "
                "block-size=32,128"
            )
        if field in found:
            raise IBNormError(f"{axis} is given twice; list all its values once, as in {axis}={values},...")
        listed = [value for value in values.split(",") if value]
        if field == "block_sizes":
            if bad := [value for value in listed if not value.isascii() or not value.isdigit()]:
                raise IBNormError(f"block-size is {quoted(bad[0])}; it must be a whole number, such as 32")
            found[field] = tuple(map(int, listed))
        else:
            found[field] = tuple(listed)
    return SweepOptions(**{**others, **found})
