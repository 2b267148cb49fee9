"""Ways to run a model: each takes arrays by input name and gives arrays by output name."""

from __future__ import annotations

from ibnorm_export.runtimes.norm_executions import NormExecution
from ibnorm_export.runtimes.registry import BACKENDS, open_runner
from ibnorm_export.runtimes.runner import Kernels, Runner

__all__ = ["BACKENDS", "Kernels", "NormExecution", "Runner", "open_runner"]
