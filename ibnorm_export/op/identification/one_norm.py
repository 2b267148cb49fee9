"""Identify a norm at one shape of its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification.effects import find_effects
from ibnorm_export.op.identification.fitting import Fit
from ibnorm_export.op.identification.formulas import describe_other, fit_family
from ibnorm_export.op.identification.norm_identity import NormIdentity
from ibnorm_export.op.identification.probe import NormProbe, Structure, inputs, perturbed, structure, trimmed
from ibnorm_export.op.identification.replacement import AGREES, build_member, confirm, output_difference, resize
from ibnorm_export.op.identification.rows import Rows
from ibnorm_export.op.identification.running_statistics import identify_pointwise
from ibnorm_export.op.spec import Grouping

__all__ = ["identify_at"]


def identify_at(
    probe: NormProbe, shape: Sequence[int], *, start: Fit | None = None, explain: bool = True
) -> NormIdentity:
    """Identify a norm that takes inputs of a shape.

    Args:
        probe: the norm.
        shape: shape of an input, the batch first.
        start: the fit of an equal norm, which is tried first.
        explain: find out what a norm is that is not a member; it is only named "unknown" otherwise.

    Raises:
        SpecError: as for `identify`.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise SpecError(f"shape is {tuple(shape)}; it must have the batch first, and at least one more axis")
    probe.check_plain_call(shape)
    small = trimmed(probe, shape)
    with _live(probe, small):
        found = structure(probe, small)
    small = trimmed(probe, shape, axes=found.axes)
    identity = _identify(probe, small, found=found, start=start, explain=explain)
    if not identity or small == tuple(shape):
        return identity
    sized = resize(identity, shape)
    if sized is not None and all(small[axis] == shape[axis] for axis in found.axes):
        return sized
    if sized is not None and output_difference(probe, sized, x=inputs(shape, seed=9)) <= AGREES:
        return sized
    return _identify(probe, tuple(shape), found=found, start=identity.fit, explain=explain)


def _identify(
    probe: NormProbe, shape: tuple[int, ...], *, found: Structure, start: Fit | None, explain: bool
) -> NormIdentity:
    """Identify a norm of a known structure with samples of a shape."""
    with _live(probe, shape) as is_live:
        if found.axes:
            rows = Rows(probe, shape, found=found)
            best = fit_family(rows, start)
            grouping, words = _spec_grouping(found.axes, len(shape))
            if not best.explains or grouping is None or found.groups > 1:
                return describe_other(rows, best, words=words, start=start, explain=explain)
            effects = find_effects(rows, best)
        else:
            identity, tried = identify_pointwise(probe, shape)
    if found.axes:
        assert grouping is not None  # otherwise it is not a member, which has been returned
        real = rows if is_live else Rows(probe, shape, found=found)
        identity, tried = build_member(real, best, grouping=grouping, words=words, effects=effects), real.inputs
    return confirm(probe, identity, samples=tried) if identity else identity


def _spec_grouping(axes: tuple[int, ...], rank: int) -> tuple[Grouping | None, str]:
    """The grouping of statistics over some axes of an input of a rank, and its words."""
    if axes == (rank - 1,):
        return Grouping.LAST, "last axis"
    if axes == (1,):
        return Grouping.LAST, "channels (axis 1)"
    if axes == tuple(range(axes[0], rank)):
        return Grouping.AXES, f"axes {list(axes)}"
    return None, f"axes {list(axes)}"


@contextmanager
def _live(probe: NormProbe, shape: Sequence[int]) -> Iterator[bool]:
    """Make the output depend on the input: parameters that are 0, such as a scale, get other values meanwhile.

    Yields:
        Whether it depended on the input already.
    """
    if _depends_on_input(probe, shape):
        yield True
        return
    parameters = [t for t in dict(probe.copy.named_parameters()).values() if t.is_floating_point()]
    for chosen in [*([p] for p in parameters), parameters]:
        with ExitStack() as changed:
            for parameter in chosen:
                changed.enter_context(perturbed(parameter))
            if _depends_on_input(probe, shape):
                yield False
                return
    raise SpecError(f"the output of {probe.name} does not depend on its input")


def _depends_on_input(probe: NormProbe, shape: Sequence[int]) -> bool:
    one, other = (probe(inputs(shape, seed=seed)) for seed in (6, 7))
    return not np.array_equal(one, other)
