"""Put weights into a model, and report those that do not fit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.mapped_pages import release_pages
from ibnorm_export.errors import CheckpointError, listed, printable

__all__ = ["fill", "nonfinite_warnings", "raise_mismatch", "tied_names"]

#: Elements that are looked at in one go.
_BLOCK_ELEMENTS: Final = 1 << 22


def raise_mismatch(source: Path, missing: list[str], *, extra: list[str], shapes: list[str]) -> None:
    """Raise CheckpointError if any name or shape does not fit."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({listed(sorted(missing))})")
    if extra:
        parts.append(f"{len(extra)} not in the model ({listed(sorted(extra))})")
    if shapes:
        parts.append(f"{len(shapes)} of the wrong shape ({listed(sorted(shapes))})")
    if parts:
        near = _nearest(missing, extra)
        hint = f". Perhaps {near}" if near else ""
        raise CheckpointError(f"{source}: weights do not fit the model: {'; '.join(parts)}{hint}")


def _nearest(missing: list[str], extra: list[str]) -> str:
    """For the first names that are not in the model, the missing name that each may be."""
    wanted, candidates = frozenset(missing), sorted(missing)[:1000]
    pairs = []
    for name in sorted(extra)[:5]:
        parts = name.split(".")
        found = [tail for start in range(1, len(parts)) if (tail := ".".join(parts[start:])) in wanted]
        found = found or difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
        pairs += [f"{name} may be {found[0]}"] if found else []
    return printable(", ".join(pairs[:3]))


def _is_finite(parameter: Tensor) -> bool:
    """Whether all values are finite; the pages of a mapped file are given back as they are read."""
    if not parameter.is_floating_point():
        return True
    for block in torch.split(parameter.detach().reshape(-1), _BLOCK_ELEMENTS):
        # The extremes of values of which one is NaN are NaN.
        finite = block.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(block))).all())
        release_pages(block)
        if not finite:
            return False
    return True


def nonfinite_warnings(module: nn.Module) -> tuple[str, ...]:
    """Return a warning if a parameter contains NaN or infinity."""
    bad = [name for name, p in module.named_parameters() if not _is_finite(p)]
    return (f"NaN or infinity in weights: {listed(sorted(bad))}",) if bad else ()


def tied_names(module: nn.Module) -> list[list[str]]:
    """Names in the state dict of a module, grouped by the tensor that they are; a tied weight has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def fill(module: nn.Module, state: Mapping[str, Tensor], *, source: Path) -> None:
    """Load `state` into `module`. For tied weights, one name is enough.

    Raises:
        CheckpointError: a name or shape does not fit; the message names it.
    """
    model_state = module.state_dict()
    present = {name for names in tied_names(module) if any(n in state for n in names) for name in names}
    shared = set(state) & set(model_state)
    raise_mismatch(
        source,
        [name for name in model_state if name not in present],
        extra=[name for name in state if name not in model_state],
        shapes=[
            f"{n}: file {tuple(state[n].shape)}, model {tuple(model_state[n].shape)}"
            for n in shared
            if state[n].shape != model_state[n].shape
        ],
    )
    module.load_state_dict(dict(state), strict=False)
