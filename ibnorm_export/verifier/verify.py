"""(exported file, checkpoint) -> ParityReport: does the file say, and compute, what the checkpoint means?

Two verdicts. *Static* reads the file: every norm node, function body and weight against the
checkpoint. *Numeric* runs it: PyTorch in float64 is the truth, PyTorch in the model's own dtype is
the yardstick, and a runtime fails when it is clearly further from the truth than PyTorch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import without_padding
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import Target, Task
from ibnorm_export.artifacts.stress_inputs import draw_stress_inputs
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import ModelFileError
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.runner import Endpoint, Kernels
from ibnorm_export.verifier.coverage import Reach, reach
from ibnorm_export.verifier.numeric import Runtime, check_numeric, round_inputs
from ibnorm_export.verifier.quality import demand_predictions
from ibnorm_export.verifier.report import Finding, NumericReport, OutputParity, ParityReport, StaticReport
from ibnorm_export.verifier.static import check_static
from ibnorm_export.verifier.tolerances import BOUNDS, Bound

__all__ = [
    "BOUNDS",
    "Bound",
    "Finding",
    "NumericReport",
    "OutputParity",
    "ParityReport",
    "StaticReport",
    "VerifyOptions",
    "verify",
]


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify.

    Args:
        backend: see `ibnorm_export.runtimes.BACKENDS`.
        samples: how many inputs to draw; the family walks through the shapes that matter.
        seed: of the inputs.
        static: whether to give the static verdict too.
        kernels: how the norms run where the backend has a choice.
        require_fused: a norm that did not run as a fused kernel is a finding.
        layers: measure the error behind every norm and block too, and name the first that leaves its bound.
        endpoint: of the server, for backend "triton".
        engine: built from the file before, for TensorRT; None builds one.
        exposing: beside drawn samples, the inputs that expose wrong arithmetic; see `draw_stress_inputs`.
    """

    backend: str = "ort-cpu"
    samples: int = 4
    _: KW_ONLY
    seed: int = 0
    static: bool = True
    kernels: Kernels = Kernels.AUTO
    require_fused: bool = False
    layers: bool = False
    endpoint: Endpoint | None = None
    exposing: bool = False
    engine: Path | None = None


def _reached(model: LoadedModel, truth: nn.Module, *, inputs: Sequence[Arrays], index: int) -> Reach:
    """`reach` on one of the inputs.

    Raises:
        ModelFileError: PyTorch cannot run on it; the message has its ranges.
    """
    try:
        return reach(model, truth, inputs=inputs[index])
    except (IndexError, ValueError, RuntimeError) as error:
        ranges = ", ".join(f"{name} from {a.min()} to {a.max()}" for name, a in inputs[index].items() if a.size)
        raise ModelFileError(f"PyTorch cannot run the checkpoint on input {index} ({ranges}): {error}") from error


def verify(
    exported: ExportedModel,
    model: LoadedModel,
    *,
    options: VerifyOptions | None = None,
    inputs: Sequence[Arrays] | None = None,
    progress: Progress = silent,
    text: str | None = None,
) -> ParityReport:
    """Compare an exported file with its checkpoint.

    Args:
        exported: the file.
        model: the checkpoint, from `ibnorm_export.models.load`.
        options: backend, number of samples, seed.
        inputs: the user's own, instead of drawn samples; see `read_inputs`.
        progress: called as the work goes on.
        text: that a language model predicts; needs the checkpoint's tokenizer.

    Raises:
        ModelFileError: the file carries no metadata, is of another model, or cannot be loaded.
        BackendUnavailable: the backend is not installed.
    """
    options = VerifyOptions() if options is None else options
    metadata = exported.require_metadata()
    if metadata.family != model.family:
        raise ModelFileError(
            f"{exported.path} is a {metadata.family} model; the checkpoint {model.source} is {model.family}; "
            "name the one that it was exported from"
        )
    names = {tensor.name for tensor in exported.inputs}
    wanted = {spec.name for spec in model.inputs}
    optional = {"position_ids"} if model.task is Task.TEXT_GENERATION else set()
    if not wanted - optional <= names <= wanted:
        raise ModelFileError(
            f"{exported.path} takes {sorted(names)}; the checkpoint takes {[s.name for s in model.inputs]}"
        )
    if options.samples < 1:
        raise ModelFileError(f"samples is {options.samples}; it must be at least 1")
    notes = list(model.warnings)
    if metadata.source_sha256 != model.source_sha256:
        notes.append(
            "the file was exported from another copy of this checkpoint (the hashes of config and weights differ)"
        )
    dtype = torch_dtype(DType(exported.dtype))
    genai = metadata.target is Target.ORT_GENAI
    if inputs is None:
        rng = np.random.default_rng(options.seed)
        inputs = [model.sample(rng, index) for index in range(options.samples)]
        if options.exposing and (exposing := draw_stress_inputs(model, rng)):
            notes.append(f"samples from {len(inputs)} on are of {', '.join(exposing)}")
            inputs += exposing.values()
    elif genai and any((sample["attention_mask"] == 0).any() for sample in inputs):
        raise ModelFileError(
            f"rows of the inputs are of unequal length (attention_mask has zeros), which {exported.path} cannot carry: "
            "GroupQueryAttention counts positions without padding. Give rows of equal length, or export --target "
            "portable"
        )
    if model.task is Task.TEXT_GENERATION and model.max_positions == 1:
        notes.append("the model has one position: there is no cached step behind a prompt to compare")
    if genai:
        notes.append("rows of a batch are of equal length: GroupQueryAttention counts positions without padding")
        inputs = [without_padding(sample) for sample in inputs]
    inputs = [round_inputs(sample, dtype) for sample in inputs]

    tokens = None
    if text is not None:
        if model.task is not Task.TEXT_GENERATION:
            raise ModelFileError(f"{exported.path} was exported for {model.task}; a text is for text-generation")
        tokens = FolderTokenizer(Path(model.source), model.vocabulary).encode(text)
        demand_predictions(tokens)
    truth = model.in_float64()
    reached = _reached(model, truth, inputs=inputs, index=0)
    runtime = Runtime(
        options.backend,
        options.kernels,
        require_fused=options.require_fused,
        layers=options.layers,
        endpoint=options.endpoint,
        engine=options.engine,
    )
    static = check_static(exported, model, reached=reached) if options.static else None
    try:
        numeric = check_numeric(
            exported,
            model,
            truth=truth,
            runtime=runtime,
            samples=inputs,
            narrow=reached.narrow,
            progress=progress,
            text=tokens,
        )
    except ModelFileError as error:  # a file that the runtime refuses is a finding, beside the static ones
        findings = (Finding("runtime", str(error)),)
        numeric = NumericReport(
            options.backend,
            exported.dtype,
            method="nothing: it does not load",
            samples=0,
            outputs=(),
            findings=findings,
        )
    except (IndexError, ValueError, RuntimeError):  # is it an input behind the first that PyTorch refuses?
        for index in range(1, len(inputs)):
            _reached(model, truth, inputs=inputs, index=index)
        raise
    return ParityReport(str(exported.path), model.source, static=static, numeric=numeric, notes=tuple(notes))
