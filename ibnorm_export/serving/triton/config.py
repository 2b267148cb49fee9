"""The text of a config.pbtxt, which describes a model to Triton.

The text is written without Triton's message type, because the packages that contain it may not be installed where a
model is packaged. Tests read every text back with that type.

Source: triton-inference-server/common, protobuf/model_config.proto.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.choices import whole_number
from ibnorm_export.errors import ExportError

if TYPE_CHECKING:  # the help of a command imports this module, and ONNX takes longer than the help
    from ibnorm_export.artifacts.exported_model import ExportedModel, Tensor

__all__ = ["ModelConfig", "TritonLimits", "batch_axis", "config_text", "triton_dtype"]

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
    """The name of an enumerator, which is written without quotes."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class TritonLimits:
    """How much a server accepts for one model.

    Args:
        max_batch: maximum number of rows that are computed together; 0 disables batching.
        max_queue: maximum number of waiting requests; more are refused at once.
        queue_timeout_ms: time in ms after which a waiting request is refused; 0 means no limit.
        queue_delay_us: time in microseconds that a request may wait for others of its shape.
        instances: number of sessions of the model. If the queue has a limit, Triton 2.51 prepares no batch while all
            instances compute, and with only one instance it idles for up to 0.5 s between two batches: 60 requests
            at once took 11 to 21 s with one instance, 1.3 s with two, and 0.9 s with one without limits.

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
            number = whole_number(getattr(self, name), name=name, least=least, error=ExportError)
            object.__setattr__(self, name, number)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The content of a config.pbtxt.

    Args:
        name: name of the model.
        backend: "onnxruntime" or "tensorrt".
        file: name of the model's file in the version folder.
        inputs, outputs: inputs and outputs, with their batch axis.
        limits: limits of this model; `max_batch` is 0 if rows cannot be computed together.
        gpu: run on GPUs instead of the CPU.
        library: absolute path of the library of fused kernels on the server; None if there is none.
        warmup: for each input its shape without the batch axis, and the name of the file with its bytes.
    """

    name: str
    backend: str
    _: KW_ONLY
    file: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    limits: TritonLimits
    gpu: bool = False
    library: str | None = None
    warmup: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)


def triton_dtype(tensor: Tensor) -> str:
    """Return Triton's name for the type of an input or output.

    Raises:
        ExportError: there is none.
    """
    if tensor.dtype not in _DTYPES:
        raise ExportError(
            f"{tensor.name} is {tensor.dtype}, which Triton cannot serve; it must be one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[tensor.dtype]


def batch_axis(model: ExportedModel) -> str | None:
    """Return the dynamic axis that is the first of every input and output, along which requests can be stacked."""
    first = {tensor.shape[0] if tensor.shape else None for tensor in (*model.inputs, *model.outputs)}
    only = first.pop() if len(first) == 1 else None
    # onnxruntime-genai's attention accepts only one row if several tokens follow a past
    genai = model.metadata.target is Target.ORT_GENAI
    return only if isinstance(only, str) and only != "?" and not genai else None


def config_text(config: ModelConfig) -> str:
    """Return the text of a config.pbtxt."""
    batched = config.limits.max_batch > 0
    message: dict[str, Any] = {
        "name": config.name,
        "backend": config.backend,
        "default_model_filename": config.file,
        "max_batch_size": config.limits.max_batch,
        "input": [_tensor(tensor, batched) for tensor in config.inputs],
        "output": [_tensor(tensor, batched) for tensor in config.outputs],
        "dynamic_batching": _dynamic_batching(config.limits),
        "instance_group": [{"count": config.limits.instances, "kind": _Name("KIND_GPU" if config.gpu else "KIND_CPU")}],
    }
    if config.library is not None:
        message["model_operations"] = {"op_library_filename": config.library}
    if config.warmup:
        message["model_warmup"] = _warmup(config, batched)
    return "\n".join(_lines(message, "")) + "\n"


def _dynamic_batching(limits: TritonLimits) -> dict[str, Any]:
    policy: dict[str, Any] = {"max_queue_size": limits.max_queue}
    if limits.queue_timeout_ms:
        microseconds = limits.queue_timeout_ms * 1000
        policy |= {"timeout_action": _Name("REJECT"), "default_timeout_microseconds": microseconds}
    return {"max_queue_delay_microseconds": limits.queue_delay_us, "default_queue_policy": policy}


def _warmup(config: ModelConfig, batched: bool) -> dict[str, Any]:
    types = {tensor.name: triton_dtype(tensor) for tensor in config.inputs}
    return {
        "name": "warmup",
        "batch_size": 1 if batched else 0,
        "inputs": [
            {"key": name, "value": {"data_type": _Name(types[name]), "dims": list(dims), "input_data_file": file}}
            for name, (dims, file) in config.warmup.items()
        ],
    }


def _tensor(tensor: Tensor, batched: bool) -> dict[str, Any]:
    dims = [axis if isinstance(axis, int) else -1 for axis in tensor.shape[1 if batched else 0 :]]
    fields: dict[str, Any] = {"name": tensor.name, "data_type": _Name(triton_dtype(tensor)), "dims": dims}
    if not dims:  # dims must not be empty: a scalar (for each row) is sent as one value
        fields |= {"dims": [1], "reshape": {}}
    return fields


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
