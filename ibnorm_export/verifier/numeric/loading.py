"""Load the file itself in a runtime, whatever copy of it the numbers come from."""

from __future__ import annotations

from dataclasses import replace

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.runtime_versions import ONNX_RUNTIME, check_installed
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ModelFileError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.runtimes.registry import BACKENDS
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.finding import Finding
from ibnorm_export.verifier.steps import NOTHING, Part

__all__ = ["load_itself"]


def load_itself(comparison: Comparison, _found: Part = NOTHING) -> Part:
    """Load the file itself in the runtime, if a copy of it was run.

    Half-precision files are run as a copy that rounds, quantised ones as a copy that does not.
    """
    file = comparison.file
    options = comparison.options
    on_cpu = options.backend == Backend.ORT_CPU
    copied = file.dtype is not DType.FP32 or (on_cpu and file.metadata.quantization is not None)
    if BACKENDS[options.backend].rounds or not copied:
        return Part()
    comparison.variants.make_room()
    problem, note = _load(file) if on_cpu else (_open(replace(comparison, copy=None)), "")
    return Part(
        findings=(Finding("runtime", problem, code=FindingCode.FILE_REFUSED),) if problem else (),
        notes=(note,) if note else (),
    )


def _open(comparison: Comparison) -> str:
    """What is wrong with the file on a backend other than ONNX Runtime; empty if the backend loads it."""
    try:
        for key in comparison.variants:
            comparison.variants.open(key)
    except ModelFileError as error:
        return str(error)
    finally:
        comparison.variants.close()
    return ""


def _load(file: ExportedModel) -> tuple[str, str]:
    """What is wrong with the file, and what could not be tried; both empty if the runtime loads it."""
    from ibnorm_export.runtimes.ort import MissingKernelError, open_session, session_options

    check_installed(file, ONNX_RUNTIME)
    try:
        options = session_options(None, None, maps_weights=True)  # nothing runs, so nothing needs to be prepared
        open_session(file.path, options, library=None, providers=["CPUExecutionProvider"], level="none")
    except MissingKernelError:
        return "", (
            f"ONNX Runtime accepts the types of the file, but cannot run it on a CPU, where operators in {file.dtype} "
            "have no kernels"
        )
    except ModelFileError as error:
        return str(error), ""
    return "", ""
