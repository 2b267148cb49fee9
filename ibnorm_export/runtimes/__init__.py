"""Ways to run a model: each takes arrays by input name and gives arrays by output name."""

from __future__ import annotations

from ibnorm_export.runtimes.runner import BACKENDS, Kernels, NormExecution, Runner, open_runner

__all__ = ["BACKENDS", "Kernels", "NormExecution", "Runner", "open_runner"]
