"""Runtimes that run a model: each runner takes arrays by input name and returns arrays by output name."""

from __future__ import annotations

from ibnorm_export.runtimes.norm_executions import NormExecution
from ibnorm_export.runtimes.registry import BACKENDS, open_runner
from ibnorm_export.runtimes.runner import Backend, Kernels, NormImplementation, Runner

__all__ = ["BACKENDS", "Backend", "Kernels", "NormExecution", "NormImplementation", "Runner", "open_runner"]
