"""Which formula explains the samples of a norm: that of the family, or a known one beside it."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.op.identification.fitting import COMPRESSIONS, OTHER_COMPRESSIONS, Array, Fit, fit, refine, snap
from ibnorm_export.op.identification.forms import FAMILY, NEIGHBOURS
from ibnorm_export.op.identification.norm_identity import NormIdentity
from ibnorm_export.op.identification.rows import Rows

__all__ = ["describe_other", "fit_family"]

_NO_FORMULA: Final = "no known formula explains its output"


def fit_family(rows: Rows, start: Fit | None) -> Fit:
    """The best member; S if it explains the outputs, because L and T with a large lambda do so too."""
    if start is not None and start.form is FAMILY:
        again = start.measured(rows.x, rows.y)
        if again.explains:
            return again
        near = refine(start, rows.x, y=rows.y)
        if near.explains:
            return snap(near, rows.x, y=rows.y)
    elif start is not None and refine(start, rows.x, y=rows.y).explains:
        return refine(dataclasses.replace(start, form=FAMILY, bound=math.inf), rows.x, y=rows.y)
    best: Fit | None = None
    x, y = rows.some(rows.y)
    for compression in COMPRESSIONS:
        found = fit(FAMILY, compression, x=x, y=y)
        found = refine(found, rows.x, y=rows.y) if found.explains else found
        if found.explains:
            return snap(found, rows.x, y=rows.y)
        if best is None or found.residual < best.residual:
            best = found
    assert best is not None  # COMPRESSIONS is not empty
    return best


def describe_other(
    rows: Rows, nearest: Fit, *, words: str, start: Fit | None = None, explain: bool = True
) -> NormIdentity:
    """What a norm is that is not a member, and how far off the nearest member is."""
    kind, sentence, found = "unknown", _NO_FORMULA, None
    if explain:
        kind, sentence, found = _named(rows, nearest, words=words, start=start)
    identity = NormIdentity(
        rows.probe.original,
        None,
        kind=kind,
        residual=nearest.residual if found is None else found.residual,
        features=rows.groups.size,
        lambd=None if found is None else found.lambd,
        epsilon=None if found is None else found.epsilon,
        grouping=words,
        parameters=dict.fromkeys(rows.probe.tensors(), "kept as it is"),
        fit=found,
    )
    formula = "" if found is None else f", with {_numbers(found)} (residual {found.residual:.1e})"
    member = f". The nearest member, IBNorm-{nearest.compression} with {_numbers(nearest)}, is off by "
    member = "" if nearest.explains else f"{member}{nearest.residual:.1e}"
    return dataclasses.replace(identity, difference=f"{sentence}{formula}{member}")


def _numbers(found: Fit) -> str:
    bound = f", bound {found.bound:.6g}" if math.isfinite(found.bound) else ""
    return f"lambda {found.lambd:.6g} and epsilon {found.epsilon:.6g}{bound}"


def _named(rows: Rows, nearest: Fit, *, words: str, start: Fit | None) -> tuple[str, str, Fit | None]:
    """Kind, sentence and fit of a norm that is not a member."""
    if nearest.explains:  # the formula is right, but not the values that share statistics
        over = f"{rows.structure.groups} groups of {words}" if rows.structure.groups > 1 else words
        kind = f"{nearest.compression}, statistics over {over}"
        return kind, f"the statistics are those of {over}, which IBNorm does not have", nearest
    if bounded := _bounded(rows):
        found, sentence = bounded
        return f"{found.compression}, clipped output", sentence, found
    if start is not None and start.form is not FAMILY:
        again = refine(start, rows.x, y=rows.y)
        if again.explains:
            return _kind(again), again.form.sentence, snap(again, rows.x, y=rows.y)
    if (match := _neighbour(rows, nearest)) is not None:
        sentence = match.form.sentence
        if match.form is FAMILY:
            sentence = f"the compression is {match.compression}, not S, L or T"
        return _kind(match), sentence, match
    return "unknown", _NO_FORMULA, None


def _neighbour(rows: Rows, nearest: Fit) -> Fit | None:
    """The form outside the family that explains the outputs, if one does."""
    x, y = rows.some(rows.y)
    kinds = [nearest.compression, *(g for g in COMPRESSIONS if g != nearest.compression)]
    pairs = [(form, g) for g in kinds for form in NEIGHBOURS] + [(FAMILY, g) for g in OTHER_COMPRESSIONS]
    # Most differences leave the lambda of the nearest member about right, so that one search near it finds them.
    for near in (nearest.lambd, None):
        for form, compression in pairs:
            found = fit(form, compression, x=x, y=y, near=near)
            if found.explains and (everywhere := refine(found, rows.x, y=rows.y)).explains:
                return snap(everywhere, rows.x, y=rows.y)
    return None


def _kind(found: Fit) -> str:
    if found.form.name == "no mean" and found.compression == "S":
        return "RMSNorm"
    return ", ".join(filter(None, (found.compression, found.form.name)))


def _bounded(rows: Rows) -> tuple[Fit, str] | None:
    """The member that explains the outputs that are not at a bound, and what the bounds are."""
    mask, shared = _saturated(rows.y)
    if not shared.size or mask.mean() > 0.7:
        return None
    y = np.where(mask, np.nan, rows.y)
    for compression in COMPRESSIONS:
        found = fit(FAMILY, compression, x=rows.x, y=y)
        if found.explains:
            low, high = float(rows.y.min()), float(rows.y.max())
            if len(shared) == 1:
                side = "below" if shared[0] == low else "above"
                words = f"values {side} {shared[0]:g} are cut off, as in an activation"
            else:
                words = f"the output is clipped, between {low:.6g} and {high:.6g} at most"
            return snap(found, rows.x, y=y), words
    return None


def _saturated(y: Array) -> tuple[NDArray[np.bool_], Array]:
    """Which outputs may be at a bound, and the values that several samples share.

    A position whose largest or smallest value occurs in several samples has a bound there. The same bound may be met by
    one sample at other positions, so that theirs are left out as well.
    """
    mask = np.zeros(y.shape, bool)
    shared = [np.zeros(0)]
    for bound in (y.max(), y.min()):
        at = y == bound
        if at.sum() >= 3:
            mask |= at
            shared.append(y[at])
    for bounds in (y.max(0), y.min(0)):
        at = y == bounds
        several = at.sum(0) >= 2
        if several.any():
            mask |= at
            shared.append(y[at & several])
    return mask, np.unique(np.concatenate(shared))
