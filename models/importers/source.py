"""What the checkpoint of a training code contains: tensors, settings, and the files next to it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ibnorm_export.errors import CheckpointError, listed, quoted

__all__ = ["Conversion", "TensorReader", "TrainingSource", "finite_number", "strip_prefix"]

#: Names that wrappers of a module add to the names of its weights: DistributedDataParallel, torch.compile, FSDP,
#: activation checkpointing, Lightning's Fabric.
_WRAPPERS: Final = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")

#: Where training codes keep the settings of a model, most specific first.
_SETTINGS: Final = ("model_args", "hyper_parameters", "model_config", "config", "args", "hparams")

_REQUIRED: Final = object()


def _as_mapping(value: object) -> Mapping[str, Any]:
    """The entries of a dict, or of an argparse.Namespace; empty for anything else."""
    if isinstance(value, Mapping):
        return value
    return vars(value) if hasattr(value, "__dict__") else {}


def finite_number(value: object, what: str) -> float:
    """Check that a value is a finite number, 0 or above.

    Raises:
        CheckpointError: it is not; the message begins with `what`.
    """
    with contextlib.suppress(OverflowError):  # a whole number that no float can hold
        if isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= float(value) < math.inf:
            return float(value)
    raise CheckpointError(f"{what} is {quoted(value)}; it must be a finite number, 0 or above")


@dataclass(frozen=True, slots=True)
class TrainingSource:
    """A checkpoint as a training code wrote it.

    Args:
        path: the file or folder, as given; messages name it.
        folder: where files that belong to it are: config.json, a tokenizer.
        state: tensors by the training code's names.
        extras: plain Python data that the checkpoint contains beside the weights.
        given: settings that the user states; they go before those of the checkpoint.
        notes: what the reader of the file did, e.g. a prefix that it removed.
    """

    path: Path
    folder: Path
    _: KW_ONLY
    state: Mapping[str, Tensor]
    extras: Mapping[str, Any]
    given: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Every setting that the checkpoint or the user states, by name; the most specific place wins."""
        found: dict[str, Any] = {}
        for place in reversed(_SETTINGS):
            outer = _as_mapping(self.extras.get(place))
            for inner in reversed(_SETTINGS):  # Lightning keeps a config object within hyper_parameters
                found |= _as_mapping(outer.get(inner))
            found |= {name: value for name, value in outer.items() if name not in _SETTINGS}
        return found | dict(self.given)

    def setting(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of a setting, under the first of several names that is there.

        Raises:
            CheckpointError: it is not there, and there is no default.
        """
        settings = self.settings()
        for name in names:
            if settings.get(name) is not None:
                return settings[name]
        if default is not _REQUIRED:
            return default
        raise CheckpointError(
            f"{self.path} does not state {names[0]}, and its weights do not show it; add "
            f"--settings '{{\"{names[0]}\": VALUE}}'"
        )

    def count(self, *names: str, default: Any = _REQUIRED) -> int:
        """A setting that is a positive whole number.

        Raises:
            CheckpointError: it is not, or it is not there and there is no default.
        """
        value = self.setting(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: {names[0]} is {quoted(value)}; it must be a positive whole number")
        return value

    def number(self, *names: str, default: Any = _REQUIRED) -> float:
        """A setting that is a finite number, 0 or above.

        Raises:
            CheckpointError: it is not, or it is not there and there is no default.
        """
        return finite_number(self.setting(*names, default=default), f"{self.path}: {names[0]}")

    def reader(self) -> TensorReader:
        """Take the tensors one by one, so that none is left out."""
        return TensorReader(self.path, dict(self.state))


@dataclass
class TensorReader:
    """Tensors of a checkpoint that are taken one by one; `finish` reports those that are left.

    Args:
        path: the checkpoint; messages name it.
        rest: what has not been taken.
        missing: names that were asked for and are not there.
    """

    path: Path
    rest: dict[str, Tensor]
    missing: list[str] = field(default_factory=list)

    def take(self, name: str) -> Tensor:
        """A tensor that must be there.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self.rest:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self.rest.pop(name)

    def take_if_there(self, name: str) -> Tensor | None:
        """A tensor, or None."""
        return self.rest.pop(name, None)

    def take_norm(self, path: str) -> dict[str, Tensor]:
        """Everything that the norm at a module path keeps, by its name within the norm."""
        names = [name for name in self.rest if name.startswith(f"{path}.")]
        return {name.removeprefix(f"{path}."): self.rest.pop(name) for name in names}

    def drop(self, pattern: str) -> int:
        """Leave out tensors whose names match a regular expression; return how many there were."""
        names = [name for name in self.rest if re.fullmatch(pattern, name)]
        for name in names:
            del self.rest[name]
        return len(names)

    def finish(self, kind: str) -> None:
        """Check that nothing is left.

        Raises:
            CheckpointError: a tensor has no place in the model.
        """
        if self.rest:
            raise CheckpointError(
                f"{self.path}: {kind} has no place for {listed(sorted(self.rest))}. A model that differs from {kind} "
                "is exported with your own code: ibnorm-export export CHECKPOINT --model package.module:factory"
            )


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint in the names of the folder to write; its norms are still as the training code has them.

    Args:
        config: config.json, without the `ibnorm` section.
        tensors: by name in the folder, without those of the norms.
        norms: by module path in the folder, what the training code's norm keeps, by its name within that norm.
        origins: by name in the folder, where a tensor comes from; the same name where it is not listed.
        notes: what the user should know, one sentence each.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    _: KW_ONLY
    norms: dict[str, dict[str, Tensor]]
    origins: dict[str, str]
    notes: tuple[str, ...] = ()


def _without_wrappers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors without the names of wrappers, wherever they are, and the wrappers that were found."""
    shorter: dict[str, Tensor] = {}
    found: dict[str, None] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        found |= dict.fromkeys(part for part in parts if part in _WRAPPERS)
        shorter[".".join(part for part in parts if part not in _WRAPPERS)] = tensor
    return (shorter, tuple(found)) if len(shorter) == len(state) else (dict(state), ())


def strip_prefix(
    state: Mapping[str, Tensor], recognised: Callable[[Mapping[str, Tensor]], bool]
) -> tuple[dict[str, Tensor], str] | None:
    """Remove a prefix that every name has, and names of wrappers, if that alone makes the names recognised.

    Args:
        state: tensors by name.
        recognised: whether names are those of a known architecture.

    Returns:
        The tensors under their shorter names, and a note on what was removed ("" if nothing was); None if nothing
        helps.
    """
    if recognised(state):
        return dict(state), ""
    bare, wrappers = _without_wrappers(state)
    removed = [f"{wrapper}." for wrapper in wrappers]
    first = next(iter(bare), "").split(".")
    for length in range(len(first)):
        prefix = "".join(f"{part}." for part in first[:length])
        if not all(name.startswith(prefix) for name in bare):
            break
        shorter = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
        if recognised(shorter):
            names = [*([prefix] if prefix else []), *removed]
            return shorter, f"names of weights: {' and '.join(names)} removed"
    return None


def layer_count(names: Sequence[str] | Mapping[str, Tensor], pattern: str) -> int:
    """The number of layers: one more than the largest number that a pattern's group matches; 0 if none does."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
