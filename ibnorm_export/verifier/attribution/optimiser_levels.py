"""The worst output at each of ONNX Runtime's optimisation levels."""

from __future__ import annotations

import functools

import numpy as np

from ibnorm_export.runtimes.lazy_runners import LazyRunners
from ibnorm_export.runtimes.registry import fused_library
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.outputs.compare import compare_runner
from ibnorm_export.verifier.report_parts.attribution import OptimiserLevel

__all__ = ["measure_levels"]


def measure_levels(comparison: Comparison) -> tuple[OptimiserLevel, ...]:
    """Run the file at every level, norms as functions unless fused kernels are required.

    Returns:
        The levels, lowest first; empty for backends other than ONNX Runtime on the CPU.
    """
    options = comparison.options
    if options.backend != "ort-cpu" or options.provider is not None:
        return ()
    from ibnorm_export.runtimes.ort import LEVELS, OrtRunner

    comparison.variants.make_room()
    kernels = Kernels.FUSED if options.kernels is Kernels.FUSED else Kernels.FUNCTION
    library = fused_library(options.backend, kernels)
    runners = LazyRunners(
        {
            level: functools.partial(
                OrtRunner,
                comparison.running.path,
                library=library,
                data_folder=comparison.running.data_folder,
                level=level,
                maps_weights=comparison.maps_weights,
            )
            for level in LEVELS
        }
    )
    levels = []
    for level, runner in runners.items():
        outputs = compare_runner(comparison, runner, norms=level).outputs
        if outputs:
            worst = max(outputs, key=lambda output: (not output.passed, np.nan_to_num(output.error, nan=np.inf)))
            levels.append(OptimiserLevel(level, worst.error, worst.tolerance, worst.passed))
    runners.close()
    return tuple(levels)
