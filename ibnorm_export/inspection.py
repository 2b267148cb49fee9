"""What is in an exported file or a checkpoint, as plain values for printing or JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ibnorm_export.artifacts.exported_model import ExportedModel, NormNode, dtype_name
from ibnorm_export.errors import ModelFileError

__all__ = ["inspect_checkpoint", "inspect_file"]


def _number(model: ExportedModel, norm: NormNode, *, attribute: str) -> float:
    value = norm.attributes.get(attribute, float("nan"))
    if not isinstance(value, (int, float)):
        raise ModelFileError(f"{model.path}: {attribute} of the norm {norm.module} is {value!r}; it must be a number")
    return float(value)


def inspect_file(path: str | Path) -> dict[str, Any]:
    """Describe an ONNX file, of this package or of another tool; nothing is run.

    Raises:
        ModelFileError: the file cannot be read, or a norm's lambda or epsilon is no number.
    """
    model = ExportedModel(path)
    types = Counter(dtype_name(tensor.data_type) for tensor in model.weights.values())
    return {
        "path": str(model.path),
        "format": "ONNX of another tool" if model.metadata.is_empty else "ONNX, written by ibnorm-export",
        "size_bytes": model.size_bytes,
        "opset": model.opset,
        "dtype": model.dtype,
        "inputs": [f"{t.name} {t.dtype} {list(t.shape)}" for t in model.inputs],
        "outputs": [f"{t.name} {t.dtype} {list(t.shape)}" for t in model.outputs],
        "initializers": dict(types.most_common()),
        "functions": [f"{f.domain}::{f.name}" for f in model.proto.functions],
        "operators": model.operators,
        "metadata": {key: value for key, value in model.metadata.to_dict().items() if key not in ("norms", "config")},
        "norms": [
            {
                "module": norm.module,
                "op": norm.op_type,
                "lambda": _number(model, norm, attribute="lambd"),
                "epsilon": _number(model, norm, attribute="epsilon"),
            }
            for norm in model.norms
        ],
    }


def inspect_checkpoint(path: str | Path, factory: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint; its weights are read.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from ibnorm_export import models

    model = models.load(path, factory)
    parameters = list(model.module.parameters())
    types = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
    return {
        "path": str(path),
        "format": "checkpoint",
        "family": model.family,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": dict(types.most_common()),
        "inputs": [f"{s.name} {list(s.shape)}" for s in model.inputs],
        "outputs": list(model.outputs),
        "default_opset": model.opset,
        "source_sha256": model.source_sha256,
        "warnings": list(model.warnings),
        "norms": [
            {"module": module, "op": spec.op_type, "lambda": spec.lambd, "epsilon": spec.epsilon}
            for module, spec in model.norms.items()
        ],
    }
