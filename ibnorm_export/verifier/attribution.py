"""Which link adds the error: four corners of every comparison, and ONNX Runtime's optimisation levels.

float64 PyTorch --dtype--> PyTorch in the file's type --exporter--> functions, unoptimised
--optimiser--> functions, optimised --kernel--> fused kernels. A link is to blame when the corner in
front of it keeps the bound and the corner behind it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ibnorm_export.verifier.report import Blame, Level, Link, OutputParity

__all__ = ["FUNCTIONS", "FUSED", "split"]

#: Names of the runtime's two corners, as in `OutputParity.norms`.
FUSED: Final = "fused"
FUNCTIONS: Final = "as functions"


@dataclass(frozen=True, slots=True)
class _Corners:
    """One output in the corners that ran."""

    own: float
    functions: OutputParity | None
    fused: OutputParity | None

    @property
    def failed(self) -> bool:
        return any(corner is not None and not corner.passed for corner in (self.functions, self.fused))

    @property
    def excess(self) -> float:
        """The largest error over what is allowed; infinite where one is not a number."""
        found = [c.error / c.allowed if c.allowed else c.error for c in (self.functions, self.fused) if c is not None]
        return float(np.nan_to_num(max(found, default=0.0), nan=np.inf))


def _worst(outputs: Sequence[OutputParity]) -> tuple[str, _Corners] | None:
    """The output that failed by the most, or, where none did, the one nearest to its bound."""
    corners: dict[str, _Corners] = {}
    for output in outputs:
        if output.norms not in (FUSED, FUNCTIONS):
            continue
        both = {o.norms: o for o in outputs if o.name == output.name}
        corners[output.name] = _Corners(output.torch_error, both.get(FUNCTIONS), both.get(FUSED))
    if not corners:
        return None
    return max(corners.items(), key=lambda item: (item[1].failed, item[1].excess))


def _optimiser(levels: Sequence[Level]) -> Link:
    if not levels:
        return Link("optimiser", None, False, "levels are compared when the functions leave the bound")
    first, last = levels[0], levels[-1]
    if last.passed:
        return Link("optimiser", last.error, False, "the drawn samples keep the bound at every level")
    if not first.passed:
        return Link("optimiser", last.error, False, f"the error is there without it too (level {first.name})")
    guilty = next(level for level in levels if not level.passed)
    return Link(
        "optimiser",
        last.error,
        True,
        f"level {first.name} has {first.error:.2e}, level {guilty.name} {guilty.error:.2e}: allowed is "
        f"{guilty.allowed:.2e}",
    )


def split(outputs: Sequence[OutputParity], dtype: str, *, levels: Sequence[Level] = ()) -> Blame | None:
    """Blame for the worst output, in words.

    Args:
        outputs: judged, norms "fused" and "as functions".
        dtype: short name of the file's type.
        levels: of ONNX Runtime's optimiser, lowest first, functions alone; empty where not compared.

    Returns:
        The split, or None where nothing was judged.
    """
    found = _worst(outputs)
    if found is None:
        return None
    name, corners = found
    functions, fused = corners.functions, corners.fused
    own_fails = not np.isfinite(corners.own)
    links = [Link("dtype", corners.own, own_fails, f"PyTorch in {dtype} against PyTorch in float64")]
    optimiser = _optimiser(levels)
    bare = functions if functions is not None else fused
    assert bare is not None
    by_functions = not bare.passed and not own_fails
    exporter_error = levels[0].error if levels else bare.error
    ran = FUNCTIONS if functions is not None else FUSED
    links.append(
        Link(
            "exporter",
            exporter_error,
            by_functions and not optimiser.guilty,
            f"the file with norms {ran}{', not optimised' if levels else ''}",
        )
    )
    links.append(optimiser)
    if fused is not None and functions is not None:
        guilty = not fused.passed and functions.passed and not own_fails
        says = "the file with fused kernels"
        if not fused.passed and not functions.passed:
            says += ": the functions leave the bound too"
        links.append(Link("kernel", fused.error, guilty, says))
    else:
        links.append(Link("kernel", None, False, "one way of running the norms was compared, so nothing is beside it"))
    return Blame(
        name, dtype, links=tuple(links), levels=tuple(levels), words=_words(name, dtype, corners=corners, links=links)
    )


def _words(name: str, dtype: str, *, corners: _Corners, links: Sequence[Link]) -> str:
    guilty = [link for link in links if link.guilty]
    costs = f"{name}: {dtype} itself costs {corners.own:.2e}"
    ran = [(FUNCTIONS, corners.functions), ("with fused kernels", corners.fused)]
    told = ", ".join(f"{c.error:.2e} {how}" for how, c in ran if c is not None)
    if not guilty:
        return f"{costs}, the file has {told}: no link adds error beyond its bound"
    return f"{costs}, the file has {told}. The {guilty[0].name} is to blame: {guilty[0].says}"
