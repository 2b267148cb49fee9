"""What is in an exported file or a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibnorm_export.artifacts.exported_model import ExportedModel, NormNode, dtype_name
from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.artifacts.onnx_file import resolve
from ibnorm_export.artifacts.runtime_versions import required_versions
from ibnorm_export.errors import ModelFileError, quoted
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.text_report import text_table
from ibnorm_export.verifier.finding import Finding

__all__ = [
    "CheckpointInspection",
    "FileInspection",
    "InspectedNorm",
    "InspectedTensor",
    "inspect",
    "inspect_checkpoint",
    "inspect_file",
]


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """One input or output.

    Args:
        name: its name.
        dtype: its element type; None if that of the model's weights, or unknown.
        shape: a size is a number, or the name of a dynamic axis; None if it is unknown.
    """

    name: str
    dtype: str | None = None
    shape: tuple[int | str, ...] | None = None

    def __str__(self) -> str:
        shape = None if self.shape is None else f"[{', '.join(map(str, self.shape))}]"
        return " ".join(part for part in (self.name, self.dtype, shape) if part)


@dataclass(frozen=True, slots=True)
class InspectedNorm:
    """One norm.

    Args:
        module: path of the norm in the checkpoint.
        op: op type, e.g. "IBNormL".
        lambd: canonical lambda.
        epsilon: canonical epsilon.
    """

    module: str
    op: str
    _: KW_ONLY
    lambd: float
    epsilon: float


class _Inspection:
    """What both kinds of inspection have in common: how they are printed and serialised."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `inspect --json` prints."""
        found = asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass
        norms = [{"lambda" if key == "lambd" else key: v for key, v in norm.items()} for norm in found.pop("norms")]
        return {**found, "norms": norms}

    def __str__(self) -> str:
        found = self.to_dict()
        norms, findings = found.pop("norms"), found.pop("findings", ())
        found |= {name: tuple(map(str, getattr(self, name))) for name in ("inputs", "outputs")}
        lines = [f"{name.replace('_', ' ')}: {_text(value)}" for name, value in found.items()]
        title = "1 norm" if len(norms) == 1 else f"{len(norms)} norms"
        rows = [(n["module"], n["op"], f"{n['lambda']:g}", f"{n['epsilon']:.3g}") for n in norms]
        lines.append(text_table(title, ("module", "op", "lambda", "epsilon"), rows=rows) if norms else title)
        lines += [_text(f"note: {finding['what']} [{finding['code']}]") for finding in findings]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class FileInspection(_Inspection):
    """What is in an ONNX file.

    Args:
        path: path of the file.
        format: the tool that wrote it.
        size_bytes: size with its external data.
        opset: version of the default domain.
        dtype: type in which the model computes.
        inputs, outputs: name, type and shape of each.
        initializers: number of weights of each type.
        functions: domain and name of each local function.
        operators: number of nodes of each op type.
        requires: the oldest version that runs the file, by runtime.
        metadata: what the export wrote about the model.
        norms: the norms, with lambda and epsilon in canonical form.
    """

    path: str
    format: str
    _: KW_ONLY
    size_bytes: int
    opset: int
    dtype: str
    inputs: tuple[InspectedTensor, ...]
    outputs: tuple[InspectedTensor, ...]
    initializers: Mapping[str, int]
    functions: tuple[str, ...]
    operators: Mapping[str, int]
    requires: Mapping[str, str]
    metadata: Mapping[str, Any]
    norms: tuple[InspectedNorm, ...]


@dataclass(frozen=True, slots=True)
class CheckpointInspection(_Inspection):
    """What is in a checkpoint.

    Args:
        path: path of the checkpoint.
        format: "checkpoint".
        family: family of the model.
        parameters: number of parameters.
        tensors: number of parameter tensors of each type.
        inputs: name, type and shape of each input.
        outputs: name of each output.
        default_opset: opset of an export without an explicit opset.
        source_sha256: sha256 of the weights.
        findings: what was assumed when the checkpoint was read, and what an export would warn about.
        stated: the `ibnorm` section of the checkpoint as it is written, with its own convention of lambda; None for a
            model that the user's own code builds.
        norms: the norms, with lambda and epsilon in canonical form.
    """

    path: str
    format: str
    _: KW_ONLY
    family: str
    parameters: int
    tensors: Mapping[str, int]
    inputs: tuple[InspectedTensor, ...]
    outputs: tuple[InspectedTensor, ...]
    default_opset: int
    source_sha256: str
    findings: tuple[Finding, ...]
    stated: Mapping[str, Any] | None
    norms: tuple[InspectedNorm, ...]


def inspect(
    path: str | Path, factory: str | None = None, *, weights: Weights | None = None
) -> FileInspection | CheckpointInspection:
    """Describe an exported file or a checkpoint.

    Args:
        path: an .onnx file, a folder with a model.onnx, or a checkpoint.
        factory: "PACKAGE.MODULE:FACTORY" of a custom model, for a checkpoint.
        weights: raw or EMA weights, where a checkpoint has both.

    Raises:
        ModelFileError: the file cannot be read.
        CheckpointError: the checkpoint cannot be loaded.
    """
    if resolve(path).suffix == ".onnx":
        return inspect_file(path)
    return inspect_checkpoint(path, factory, weights=weights)


def inspect_file(path: str | Path) -> FileInspection:
    """Describe an ONNX file, written by this package or by another tool, without running it.

    Raises:
        ModelFileError: the file cannot be read, or a norm's lambda or epsilon is not a number.
    """
    model = ExportedModel(path)
    types = Counter(dtype_name(tensor.data_type) for tensor in model.weights.values())
    return FileInspection(
        str(model.path),
        f"ONNX, written by {'another tool' if model.metadata.is_empty else 'ibnorm-export'}",
        size_bytes=model.size_bytes,
        opset=model.opset,
        dtype=model.dtype,
        inputs=tuple(InspectedTensor(t.name, t.dtype, t.shape) for t in model.inputs),
        outputs=tuple(InspectedTensor(t.name, t.dtype, t.shape) for t in model.outputs),
        initializers=dict(types.most_common()),
        functions=tuple(f"{f.domain}::{f.name}" for f in model.proto.functions),
        operators=model.operators,
        requires=required_versions(model),
        metadata={
            key: value for key, value in model.metadata.to_dict().items() if key not in ("norms", "config", "requires")
        },
        norms=tuple(
            InspectedNorm(
                norm.module,
                norm.op_type,
                lambd=_number(model, norm, attribute="lambd"),
                epsilon=_number(model, norm, attribute="epsilon"),
            )
            for norm in model.norms
        ),
    )


def inspect_checkpoint(
    path: str | Path, factory: str | None = None, *, weights: Weights | None = None
) -> CheckpointInspection:
    """Describe a checkpoint; its weights are loaded.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    from ibnorm_export import models
    from ibnorm_export.models.containers import read_config

    model = models.load(path, factory, weights=weights)
    parameters = list(model.module.parameters())
    types = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
    return CheckpointInspection(
        str(path),
        "checkpoint",
        family=model.family,
        parameters=sum(p.numel() for p in parameters),
        tensors=dict(types.most_common()),
        inputs=tuple(InspectedTensor(s.name, None if s.floating else "int64", s.shape) for s in model.inputs),
        outputs=tuple(InspectedTensor(name) for name in model.outputs),
        default_opset=model.opset,
        source_sha256=model.source_sha256,
        findings=(
            *(Finding("checkpoint", note, code=FindingCode.CHECKPOINT_NOTE) for note in model.notes),
            *(Finding("checkpoint", text, code=FindingCode.CHECKPOINT_WARNING) for text in model.warnings),
        ),
        stated=None if model.section is None else read_config(Path(path))["ibnorm"],
        norms=tuple(
            InspectedNorm(module, spec.op_type, lambd=spec.lambd, epsilon=spec.epsilon)
            for module, spec in model.norms.items()
        ),
    )


def _number(model: ExportedModel, norm: NormNode, *, attribute: str) -> float:
    value = norm.attributes.get(attribute, float("nan"))
    if not isinstance(value, (int, float)):
        raise ModelFileError(
            f"{model.path}: {attribute} of the norm {norm.module} is {quoted(value)}; it must be a number"
        )
    # The file holds 32 bits: 1e-05, which the user wrote, is the shortest number that has them.
    return float(str(np.float32(value)))


def _text(value: Any) -> str:
    """A value on one line: a name from a file could otherwise add lines to the output."""
    return _joined(value).replace("\n", "\\n")


def _joined(value: Any) -> str:
    if isinstance(value, Mapping):
        found = ((name, one) for name, one in value.items() if one is not None)
        texts = (f"{name} ({_joined(one)})" if isinstance(one, Mapping) else f"{name} {one}" for name, one in found)
        return ", ".join(texts) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
