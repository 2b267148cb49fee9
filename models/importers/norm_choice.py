"""Whether the norms of a checkpoint are read from their class, from a statement, or from both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.containers import read_config
from ibnorm_export.models.importers.norm_reading import (
    ClassReading,
    NormReader,
    StatedReading,
    import_norm_class,
    stated_norms,
)
from ibnorm_export.models.importers.source import TrainingSource
from ibnorm_export.op.spec import IBNormSpec, NormConfig

__all__ = ["choose_reader"]

_EXAMPLE_NORM: Final = '\'{"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide"}\''


def choose_reader(
    source: TrainingSource,
    *,
    norm: NormConfig | IBNormSpec | Mapping[str, Any] | None,
    norm_class: type[nn.Module] | str | None,
    norm_args: Mapping[str, Any],
) -> tuple[NormReader, ClassReading | None]:
    """How the norms are read.

    Raises:
        CheckpointError: neither a class nor a statement says it.
    """
    where = str(source.path)
    if norm is None and norm_class is None:
        norm = _stated_in_checkpoint(source)
    if norm_class is None:
        if norm is None:
            raise CheckpointError(
                f"{source.path} does not state what its norms compute. Add the class that it was trained with, "
                f"--norm-class package.module:Class, or its parameters, --norm {_EXAMPLE_NORM}"
            )
        return stated_norms(norm, where=where), None
    if isinstance(norm_class, str):
        norm_class = import_norm_class(norm_class)
    by_class = ClassReading(norm_class, arguments=norm_args, settings=source.settings(), where=where)
    if norm is None:
        return by_class, by_class
    stated = _other_layers(norm, where=where)
    return (lambda site, kept: (stated if stated.covers(site.path) else by_class)(site, kept)), by_class


def _stated_in_checkpoint(source: TrainingSource) -> Mapping[str, Any] | None:
    """The `ibnorm` section of the checkpoint's own configuration."""
    section = source.settings().get("ibnorm")
    if section is None and (source.folder / "config.json").is_file():
        section = read_config(source.folder).get("ibnorm")
    return section if isinstance(section, Mapping) else None


def _other_layers(norm: object, *, where: str) -> StatedReading:
    """Rules for norms that are not of the given class.

    Raises:
        CheckpointError: it states more than rules.
    """
    if not isinstance(norm, Mapping) or set(norm) != {"layers"}:
        raise CheckpointError(
            'with --norm-class, --norm may only have "layers", for norms of another kind, for example '
            '\'{"layers": [{"match": "*.ln_f", "norm": "layernorm", "epsilon": 1e-5}]}\''
        )
    base = {"compression": "S", "lambda": 1.0, "epsilon": 1e-5, "convention": "divide"}
    return stated_norms({**base, **norm}, where=where)
