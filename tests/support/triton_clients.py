"""Requests to Triton through its own clients."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import np_to_triton_dtype

from ibnorm_export.artifacts.exported_model import ExportedModel
from tests.support.running_server import Running

Arrays = dict[str, np.ndarray[Any, Any]]

CLIENTS: Final = (tritonclient.http, tritonclient.grpc)
#: The status with which each protocol refuses a request when the queue is full.
REFUSED: Final = {tritonclient.http: "503", tritonclient.grpc: "StatusCode.UNAVAILABLE"}


def draw(model: ExportedModel, rng: np.random.Generator, batch: int, sequence: int) -> Arrays:
    """Random inputs by name, in the types of the model."""
    types = {"fp32": np.float32, "fp16": np.float16}
    made: Arrays = {}
    for tensor in model.inputs:
        shape = [{"batch_size": batch, "sequence_length": sequence}.get(str(axis), axis) for axis in tensor.shape]
        if tensor.dtype in types:
            made[tensor.name] = rng.standard_normal(shape).astype(types[tensor.dtype])
        else:
            made[tensor.name] = np.ones(shape, np.int64) if "mask" in tensor.name else rng.integers(0, 256, shape)
    return made


def connect(server: Running, module: ModuleType) -> Any:
    """A client, for a `with` block: one that the garbage collector closes raises an error in its thread."""
    return module.InferenceServerClient(server.http if module is tritonclient.http else server.grpc)


def ask(client: Any, module: ModuleType, model: str, arrays: Arrays, **options: Any) -> np.ndarray[Any, Any]:
    """Send one request and return the logits.

    Raises:
        InferenceServerException: the server refuses it.
    """
    given = []
    for name, array in arrays.items():
        tensor = module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        given.append(tensor.set_data_from_numpy(array))
    answer: np.ndarray[Any, Any] = client.infer(model, given, **options).as_numpy("logits")
    return answer
