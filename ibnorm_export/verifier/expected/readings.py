"""Other readings of a checkpoint's config: which convention, lambda and epsilon would give the expected values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from torch import nn

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import SpecError
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.spec import Compression, Convention, IBNormSpec, NormConfig
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["Reading", "fitting_reading"]

_LAMBDAS: Final = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 16.0)
_EPSILON_FACTORS: Final = (100.0, 0.01, 10.0, 0.1)

#: Readings that are tried; each costs a pass in float64.
_MAX_TRIED: Final = 500


@dataclass(frozen=True, slots=True)
class Reading:
    """What config.json might have stated: the keys of its `ibnorm` section."""

    compression: str
    lambd: float
    epsilon: float
    convention: str

    def __str__(self) -> str:
        return (
            f'"compression": "{self.compression}", "lambda": {self.lambd:g}, "epsilon": {self.epsilon:g}, '
            f'"convention": "{self.convention}"'
        )


def _stated(model: LoadedModel) -> Reading | None:
    """What the checkpoint states; None if its norms have no common section and differ."""
    section = model.section
    if section is not None:
        try:
            return Reading(
                str(section["compression"]),
                float(section["lambda"]),
                float(section["epsilon"]),
                str(section["convention"]),
            )
        except (KeyError, TypeError, ValueError):
            return None
    specs = {(s.compression.value, s.lambd, s.epsilon) for s in model.norms.values()}
    if len(specs) != 1:
        return None
    ((compression, lambd, epsilon),) = specs
    return Reading(compression, lambd, epsilon, Convention.DIVIDE.value)


def _statements(canonical: Reading) -> Iterator[Reading]:
    """Everything that a config may have stated whose canonical form this is: a checkpoint keeps only that form."""
    lambd, epsilon = canonical.lambd, canonical.epsilon
    yield canonical
    yield replace(canonical, convention=Convention.UNIT_SLOPE.value, epsilon=epsilon * lambd**2)
    yield replace(canonical, convention=Convention.MULTIPLY.value, lambd=1 / lambd, epsilon=epsilon * lambd**2)
    if lambd == 1.0:
        for outer in _LAMBDAS:
            yield replace(canonical, convention=Convention.OUTER.value, lambd=outer, epsilon=epsilon / outer**2)


def _variations(stated: Reading) -> Iterator[tuple[int, Reading]]:
    """Readings near to what is stated, with the number of differences."""
    conventions = [stated.convention, *(c.value for c in Convention if c != stated.convention)]
    lambdas = [stated.lambd, *(value for value in _LAMBDAS if value != stated.lambd)]
    epsilons = [stated.epsilon, *(stated.epsilon * factor for factor in _EPSILON_FACTORS)]
    compressions = [stated.compression, *(c.value for c in Compression if c != stated.compression)]
    for choice in itertools.product(compressions, conventions, lambdas, epsilons):
        compression, convention, lambd, epsilon = choice
        reading = Reading(compression, lambd, epsilon, convention)
        yield sum(getattr(reading, f.name) != getattr(stated, f.name) for f in fields(reading)), reading


def _candidates(canonical: Reading) -> Iterator[Reading]:
    """Other readings, those with the fewest differences first; of those with the same meaning only one."""
    found = [entry for stated in _statements(canonical) for entry in _variations(stated)]
    seen: set[tuple[str, float, float]] = set()
    for differences, reading in sorted(found, key=lambda entry: entry[0]):
        try:
            spec = IBNormSpec.from_convention(
                reading.compression, reading.lambd, epsilon=reading.epsilon, convention=reading.convention
            )
        except SpecError:  # not legal, for example an epsilon that overflows
            continue
        meaning = (reading.compression, float(f"{spec.lambd:.9g}"), float(f"{spec.epsilon:.9g}"))
        if meaning not in seen and differences:
            yield reading
        seen.add(meaning)


def _specs(model: LoadedModel, reading: Reading) -> Mapping[str, IBNormSpec]:
    """The spec of every norm under another reading; rules for single layers keep what they state themselves."""
    section: dict[str, Any] = {
        "compression": reading.compression,
        "lambda": reading.lambd,
        "epsilon": reading.epsilon,
        "convention": reading.convention,
    }
    config = NormConfig.from_config({**(model.section or {}), **section})
    return {
        path: replace(
            spec,
            compression=(other := config.at(path)[1]).compression,
            lambd=other.lambd,
            epsilon=other.epsilon,
        )
        for path, spec in model.norms.items()
    }


@contextmanager
def _with_specs(module: nn.Module, specs: Mapping[str, IBNormSpec]) -> Iterator[None]:
    """Give the norms of `module` other specs within this block."""
    norms = [norm for path in specs if isinstance(norm := module.get_submodule(path), (IBNorm, BatchIBNorm))]
    before = [(norm, dict(norm.__dict__)) for norm in norms]
    try:
        for path, spec in specs.items():
            norm = module.get_submodule(path)
            norm.spec = spec  # type: ignore[assignment]  # an attribute of the two classes
            if isinstance(rows := norm.__dict__.get("_rows"), IBNormSpec):
                norm._rows = replace(rows, compression=spec.compression, lambd=spec.lambd, epsilon=spec.epsilon)  # type: ignore[assignment]  # as above
        yield
    finally:
        for norm, attributes in before:
            norm.__dict__.update(attributes)


def fitting_reading(
    model: LoadedModel, mapped: nn.Module, *, error: Callable[[], float], tolerance: float
) -> Reading | None:
    """Find the reading under which the module computes the expected values.

    Args:
        model: the checkpoint.
        mapped: its module with IBNorm in place, in float64; it is as before afterwards.
        error: computes the error of `mapped` against the expected values.
        tolerance: the largest error of a reading that fits.

    Returns:
        The first reading that fits, of those with the fewest differences from what the checkpoint states; None if none
        does.
    """
    stated = _stated(model)
    if stated is None:
        return None
    for reading in itertools.islice(_candidates(stated), _MAX_TRIED):
        with _with_specs(mapped, _specs(model, reading)):
            if error() <= tolerance:
                return reading
    return None
