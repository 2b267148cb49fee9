"""Export, verify, benchmark and serve models that normalise with IBNorm (arXiv 2510.25262).

All public names can be imported from this package: `from ibnorm_export import load, export, verify`. Importing the
package imports neither torch nor a runtime; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibnorm_export.analysis.norms import analyze
    from ibnorm_export.analysis.options import AnalysisOptions
    from ibnorm_export.analysis.report import AnalysisReport
    from ibnorm_export.api import bench, export, verify
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.loaded_model import CustomModel, LoadedModel
    from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
    from ibnorm_export.artifacts.tensors import DType, InputSpec
    from ibnorm_export.benchmark.options import BenchOptions, GenerationOptions, Timing
    from ibnorm_export.benchmark.report import BenchReport, GenerationReport
    from ibnorm_export.errors import (
        BackendUnavailable,
        CheckpointError,
        ConfigError,
        EngineError,
        ExportError,
        IBNormError,
        ModelFileError,
        ParityError,
        PromptError,
        SpecError,
    )
    from ibnorm_export.evaluation.evaluate import evaluate
    from ibnorm_export.evaluation.options import EvaluationOptions, TaskName
    from ibnorm_export.evaluation.report import EvaluationReport
    from ibnorm_export.evaluation.sweep import sweep
    from ibnorm_export.evaluation.sweep_options import Preference, SweepOptions
    from ibnorm_export.evaluation.sweep_report import SweepReport
    from ibnorm_export.exporter.options import ExportOptions
    from ibnorm_export.findings.code import FindingCode
    from ibnorm_export.findings.explanation import Explanation, explain
    from ibnorm_export.gate.report import CheckReport
    from ibnorm_export.gate.run import check
    from ibnorm_export.graph.quantization import Quantization
    from ibnorm_export.json_document import json_schema
    from ibnorm_export.models.checkpoint_import import import_checkpoint
    from ibnorm_export.models.importers.report import ImportKind, ImportReport
    from ibnorm_export.models.in_memory import from_module
    from ibnorm_export.models.loading import load
    from ibnorm_export.models.norm_identities import identify_checkpoint
    from ibnorm_export.op.identification.norms import IdentityReport, NormIdentity, identify, identify_norms
    from ibnorm_export.op.replace_norms import replace_norms
    from ibnorm_export.op.spec import Compression, Convention, Grouping, IBNormSpec, LayerRule, NormConfig, NormKind
    from ibnorm_export.op.torch_op import IBNorm, SkipIBNorm, ibnorm, skip_ibnorm
    from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels
    from ibnorm_export.runtimes.tensorrt.build import build_engine
    from ibnorm_export.runtimes.tensorrt.engine import Engine
    from ibnorm_export.runtimes.tensorrt.options import EngineOptions, NormRoute, Runtime
    from ibnorm_export.serving.options import ReadyServer, ServeOptions
    from ibnorm_export.serving.serve import serve
    from ibnorm_export.serving.text_limits import TextLimits
    from ibnorm_export.serving.triton.config import TritonLimits
    from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions, RepositoryFormat, TritonBackend
    from ibnorm_export.serving.triton.repository import Package, package
    from ibnorm_export.verifier.options import InputCoverage
    from ibnorm_export.verifier.report import ParityReport
    from ibnorm_export.verifier.verify import VerifyOptions

#: The only place that states the version; the build reads it from here.
__version__ = "0.1.0"

__all__ = [
    "AnalysisOptions",
    "AnalysisReport",
    "Backend",
    "BackendUnavailable",
    "BenchOptions",
    "BenchReport",
    "CacheKind",
    "CheckReport",
    "CheckpointError",
    "Compression",
    "ConfigError",
    "Convention",
    "CustomModel",
    "DType",
    "Endpoint",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EvaluationOptions",
    "EvaluationReport",
    "Explanation",
    "ExportError",
    "ExportOptions",
    "ExportedModel",
    "FindingCode",
    "GenerationOptions",
    "GenerationReport",
    "Grouping",
    "IBNorm",
    "IBNormError",
    "IBNormSpec",
    "IdentityReport",
    "ImportKind",
    "ImportReport",
    "InputCoverage",
    "InputSpec",
    "Kernels",
    "LayerRule",
    "LoadedModel",
    "ModelFileError",
    "NormConfig",
    "NormIdentity",
    "NormKind",
    "NormRoute",
    "Package",
    "PackageOptions",
    "PackagedNorms",
    "ParityError",
    "ParityReport",
    "Preference",
    "PromptError",
    "Quantization",
    "ReadyServer",
    "RepositoryFormat",
    "Runtime",
    "ServeOptions",
    "SkipIBNorm",
    "SpecError",
    "SweepOptions",
    "SweepReport",
    "Target",
    "Task",
    "TaskName",
    "TextLimits",
    "Timing",
    "TritonBackend",
    "TritonLimits",
    "VerifyOptions",
    "analyze",
    "bench",
    "build_engine",
    "check",
    "evaluate",
    "explain",
    "export",
    "from_module",
    "ibnorm",
    "identify",
    "identify_checkpoint",
    "identify_norms",
    "import_checkpoint",
    "json_schema",
    "load",
    "package",
    "replace_norms",
    "serve",
    "skip_ibnorm",
    "sweep",
    "verify",
]

#: The module that defines each public name: the imports above, for use at run time.
_HOME = {
    name: f"ibnorm_export.{module}"
    for module, names in {
        "analysis.norms": ("analyze",),
        "analysis.options": ("AnalysisOptions",),
        "analysis.report": ("AnalysisReport",),
        "api": ("bench", "export", "verify"),
        "artifacts.exported_model": ("ExportedModel",),
        "artifacts.loaded_model": ("CustomModel", "LoadedModel"),
        "artifacts.metadata": ("CacheKind", "Target", "Task"),
        "artifacts.tensors": ("DType", "InputSpec"),
        "benchmark.options": ("BenchOptions", "GenerationOptions", "Timing"),
        "benchmark.report": ("BenchReport", "GenerationReport"),
        "errors": (
            "BackendUnavailable",
            "CheckpointError",
            "ConfigError",
            "EngineError",
            "ExportError",
            "IBNormError",
            "ModelFileError",
            "ParityError",
            "PromptError",
            "SpecError",
        ),
        "evaluation.evaluate": ("evaluate",),
        "evaluation.options": ("EvaluationOptions", "TaskName"),
        "evaluation.report": ("EvaluationReport",),
        "evaluation.sweep": ("sweep",),
        "evaluation.sweep_options": ("Preference", "SweepOptions"),
        "evaluation.sweep_report": ("SweepReport",),
        "exporter.options": ("ExportOptions",),
        "findings.code": ("FindingCode",),
        "findings.explanation": ("Explanation", "explain"),
        "gate.report": ("CheckReport",),
        "gate.run": ("check",),
        "graph.quantization": ("Quantization",),
        "json_document": ("json_schema",),
        "models.checkpoint_import": ("import_checkpoint",),
        "models.importers.report": ("ImportKind", "ImportReport"),
        "models.in_memory": ("from_module",),
        "models.loading": ("load",),
        "models.norm_identities": ("identify_checkpoint",),
        "op.identification.norms": ("IdentityReport", "NormIdentity", "identify", "identify_norms"),
        "op.replace_norms": ("replace_norms",),
        "op.spec": ("Compression", "Convention", "Grouping", "IBNormSpec", "LayerRule", "NormConfig", "NormKind"),
        "op.torch_op": ("IBNorm", "SkipIBNorm", "ibnorm", "skip_ibnorm"),
        "runtimes.runner": ("Backend", "Endpoint", "Kernels"),
        "runtimes.tensorrt.build": ("build_engine",),
        "runtimes.tensorrt.engine": ("Engine",),
        "runtimes.tensorrt.options": ("EngineOptions", "NormRoute", "Runtime"),
        "serving.options": ("ReadyServer", "ServeOptions"),
        "serving.serve": ("serve",),
        "serving.text_limits": ("TextLimits",),
        "serving.triton.config": ("TritonLimits",),
        "serving.triton.options": ("RepositoryFormat", "PackageOptions", "TritonBackend", "PackagedNorms"),
        "serving.triton.repository": ("Package", "package"),
        "verifier.report": ("ParityReport",),
        "verifier.options": ("InputCoverage",),
        "verifier.verify": ("VerifyOptions",),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
