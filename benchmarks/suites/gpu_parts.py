"""The parts of a check on a GPU: what each found, and what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.rows import Figure, Row, Target
from benchmarks.suites.gpu_machine import Array
from ibnorm_export.op.spec import Compression
from tests.support import trt_plugin
from tests.support.cuda_emulator import DTYPES, Accuracy

__all__ = ["Part", "skip_of", "tensor", "variants"]


_MAX_FAILURES = 20


@dataclass(slots=True)
class Part:
    """Result of one part: it passes if it ran, measured something and nothing failed."""

    name: str
    not_run: str = ""
    failures: list[str] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "not run" if self.not_run else "fail" if self.failures or not self.figures else "pass"

    def row(self) -> Row:
        """The row of this part; it has no target if the part was not run."""
        if self.not_run:
            return Row(self.name, {}, note=f"not run: {self.not_run}")
        counts = {"failures": Figure(len(self.failures)), "measured": Figure(len(self.figures))}
        targets = (Target("failures", 0), Target("measured", 1, at_least=True))
        details = {"failures": self.failures[:_MAX_FAILURES], "figures": self.figures}
        figures = {**counts, "time": Figure(round(self.seconds, 1), "s")}
        return Row(self.name, figures, targets=targets, details=details, note="; ".join(self.failures[:1]))

    def worst(self, found: Sequence[Accuracy], **what: Any) -> None:
        """Add one line of figures: the worst of several tensors."""
        self.figures.append(
            {
                **what,
                "tensors": len(found),
                "error": max(a.error for a in found),
                "ulp": max(a.ulp for a in found),
                "equal": min(a.equal for a in found),
            }
        )


def variants() -> Iterator[tuple[str, Compression]]:
    """Every data type with every compression."""
    return ((dtype, kind) for dtype in DTYPES for kind in Compression)


def skip_of(x: Array) -> tuple[Array, Array]:
    """Another tensor of the same kind, and their sum rounded to the type."""
    skip = np.ascontiguousarray(x[::-1])
    return skip, (x.astype(np.float32) + skip.astype(np.float32)).astype(x.dtype)


def tensor(array: torch.Tensor, shape: tuple[int, ...] | None = None) -> trt_plugin.Tensor:
    """Describe a tensor on the device to the plugin."""
    return trt_plugin.Tensor(shape or tuple(array.shape), str(array.dtype).removeprefix("torch."), array.data_ptr())
