"""The tensors that a `forward` returns, in any nesting of tuples, lists, dicts and dataclasses, with names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError

__all__ = ["named_outputs", "unique_names"]

#: Name of an output that has no key.
_OUTPUT = "output"


def _entries(value: object) -> Iterator[tuple[str, object]] | None:
    """Keys and values of a container; None if `value` is none. The first entry without a key has an empty one."""
    if isinstance(value, Mapping):  # ModelOutput of transformers too
        return ((str(key), entry) for key, entry in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return zip(value._fields, value, strict=True)
    if isinstance(value, (tuple, list)):
        return ((str(index) if index else "", entry) for index, entry in enumerate(value))
    return None


def _walk(value: object, name: str, *, where: str) -> Iterator[tuple[str, Tensor]]:
    if value is None:
        return
    if isinstance(value, Tensor):
        yield name or _OUTPUT, value
        return
    entries = _entries(value)
    if entries is None:
        what = f"{type(value).__name__} as {name!r}" if name else type(value).__name__
        raise CheckpointError(
            f"{where} returns {what}; it must return tensors, in tuples, lists, dicts or dataclasses. "
            "Leave the others out, for example with inputs={..., 'use_cache': False} for a cache"
        )
    for key, entry in entries:
        before = name or (_OUTPUT if key.isdigit() else "")
        yield from _walk(entry, "_".join(part for part in (before, key) if part), where=where)


def named_outputs(value: object, *, where: str) -> list[tuple[str, Tensor]]:
    """Names and tensors of what a `forward` returned; None is left out.

    Names are keys and field names, joined by "_". Entries of a tuple are `output`, `output_1`, ...

    Args:
        value: what it returned.
        where: who returned it, for messages.

    Raises:
        CheckpointError: there is no tensor, or something other than tensors.
    """
    # A parameter that is returned as it is must be copied: in a float64 reference it has no values in memory.
    found = [(n, t.clone() if isinstance(t, nn.Parameter) else t) for n, t in _walk(value, "", where=where)]
    if not found:
        raise CheckpointError(f"{where} returns no tensor")
    return found


def unique_names(names: Sequence[str], taken: Collection[str]) -> tuple[str, ...]:
    """The names, each with "_output" or a number after it if it is taken."""
    used = set(taken)
    unique = []
    for name in names:
        candidate = name if name not in used else f"{name}_output"
        number = 1
        while candidate in used:
            candidate = f"{name}_output_{number}"
            number += 1
        used.add(candidate)
        unique.append(candidate)
    return tuple(unique)
