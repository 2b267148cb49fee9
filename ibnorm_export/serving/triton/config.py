"""What Triton must know of a model, as the text of its config.pbtxt.

The text is written by hand from the model's own inputs and outputs: the message type lives in packages that only a
server's machine has. Tests read every text back with that type.

Source: triton-inference-server/common, protobuf/model_config.proto.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

from ibnorm_export.artifacts.exported_model import ExportedModel, Tensor
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.errors import ExportError

__all__ = ["Limits", "batch_axis", "config_text", "triton_dtype"]

_DTYPES: Final = {
    "fp32": "TYPE_FP32",
    "fp16": "TYPE_FP16",
    "bf16": "TYPE_BF16",
    "fp64": "TYPE_FP64",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}


class _Name(str):
    """An enumerator: text without quotes."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a server takes on for one model.

    Args:
        max_batch: most rows that are computed together; 0 is no batching.
        max_queue: requests that wait, beyond which more are refused at once.
        queue_timeout_ms: a request that has waited longer is refused; 0 is no limit.
        queue_delay_us: how long a request may wait for others of its shape.
        instances: of the model, each with its own session. Where a queue has a limit, Triton 2.51 prepares no batch
            while all instances compute, and with a single one stands still for up to 0.5 s between two batches: 60
            requests at once took 11 to 21 s on one instance, 1.3 s on two, 0.9 s on one without limits.

    Raises:
        ExportError: a value is outside its range.
    """

    max_batch: int = 8
    max_queue: int = 256
    _: KW_ONLY
    queue_timeout_ms: int = 0
    queue_delay_us: int = 0
    instances: int = 2

    def __post_init__(self) -> None:
        for name, least in (
            ("max_batch", 0),
            ("max_queue", 1),
            ("queue_timeout_ms", 0),
            ("queue_delay_us", 0),
            ("instances", 1),
        ):
            if getattr(self, name) < least:
                raise ExportError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One config.pbtxt.

    Args:
        name: of the model.
        backend: "onnxruntime" or "tensorrt".
        file: the model's file in the version folder.
        inputs, outputs: with their batch axis.
        limits: of this model; max_batch is 0 where rows cannot be computed together.
        gpu: run on GPUs, not on the CPU.
        library: of fused kernels, absolute on the server, or None.
        warmup: inputs by name: shape without the batch axis, and the file that holds their bytes.
    """

    name: str
    backend: str
    _: KW_ONLY
    file: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    limits: Limits
    gpu: bool = False
    library: str | None = None
    warmup: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)


def triton_dtype(tensor: Tensor) -> str:
    """Triton's name for the type of an input or output.

    Raises:
        ExportError: Triton has none.
    """
    if tensor.dtype not in _DTYPES:
        raise ExportError(
            f"{tensor.name} is {tensor.dtype}, for which Triton has no type here; known: {', '.join(_DTYPES)}"
        )
    return _DTYPES[tensor.dtype]


def batch_axis(model: ExportedModel) -> str | None:
    """Name of the dynamic axis that leads every input and output, so that rows of several requests can be stacked."""
    first = {tensor.shape[0] if tensor.shape else None for tensor in (*model.inputs, *model.outputs)}
    only = first.pop() if len(first) == 1 else None
    # onnxruntime-genai's attention takes one row where several tokens go behind a past
    genai = model.metadata.target is Target.ORT_GENAI
    return only if isinstance(only, str) and only != "?" and not genai else None


def config_text(config: ModelConfig) -> str:
    """config.pbtxt for one model."""
    batched = config.limits.max_batch > 0
    policy: dict[str, Any] = {"max_queue_size": config.limits.max_queue}
    if config.limits.queue_timeout_ms:
        microseconds = config.limits.queue_timeout_ms * 1000
        policy |= {"timeout_action": _Name("REJECT"), "default_timeout_microseconds": microseconds}
    message: dict[str, Any] = {
        "name": config.name,
        "backend": config.backend,
        "default_model_filename": config.file,
        "max_batch_size": config.limits.max_batch,
        "input": [_tensor(tensor, batched) for tensor in config.inputs],
        "output": [_tensor(tensor, batched) for tensor in config.outputs],
        "dynamic_batching": {
            "max_queue_delay_microseconds": config.limits.queue_delay_us,
            "default_queue_policy": policy,
        },
        "instance_group": [{"count": config.limits.instances, "kind": _Name("KIND_GPU" if config.gpu else "KIND_CPU")}],
    }
    if config.library is not None:
        message["model_operations"] = {"op_library_filename": config.library}
    if config.warmup:
        types = {tensor.name: triton_dtype(tensor) for tensor in config.inputs}
        message["model_warmup"] = {
            "name": "warmup",
            "batch_size": 1 if batched else 0,
            "inputs": [
                {"key": name, "value": {"data_type": _Name(types[name]), "dims": list(dims), "input_data_file": file}}
                for name, (dims, file) in config.warmup.items()
            ],
        }
    return "\n".join(_lines(message, "")) + "\n"


def _tensor(tensor: Tensor, batched: bool) -> dict[str, Any]:
    dims = [axis if isinstance(axis, int) else -1 for axis in tensor.shape[1 if batched else 0 :]]
    made: dict[str, Any] = {"name": tensor.name, "data_type": _Name(triton_dtype(tensor)), "dims": dims}
    if not dims:  # dims may not be empty: a scalar (to each row) is one value on the wire
        made |= {"dims": [1], "reshape": {}}
    return made


def _lines(message: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in message.items():
        if isinstance(value, list) and not (value and isinstance(value[0], dict)):
            lines.append(f"{indent}{key}: [{', '.join(map(str, value))}]")
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                lines += [f"{indent}{key} {{", *_lines(item, indent + "  "), f"{indent}}}"]
            else:
                quoted = isinstance(item, str) and not isinstance(item, _Name)
                lines.append(f"{indent}{key}: {json.dumps(item) if quoted else item}")
    return lines
