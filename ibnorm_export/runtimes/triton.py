"""A model on a Triton server as a runner: the only module that imports Triton's client."""

from __future__ import annotations

from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError, listed, quoted
from ibnorm_export.runtimes.runner import Backend, Endpoint

__all__ = ["TritonRunner"]


def _is_host_and_port(text: str) -> bool:
    try:
        parts = urlsplit(f"//{text}")
        return bool(parts.hostname and parts.port)
    except ValueError:  # the port is not a number
        return False


def _connection_error(url: str, error: Exception) -> IBNormError:
    reason = error.message() if isinstance(error, InferenceServerException) else error
    if "unknown model" in str(reason):
        return IBNormError(f"the server at {url}: {reason}; choose with --name")
    protocol = "gRPC" if url.startswith("grpc://") else "HTTP"
    return BackendUnavailable(
        f"no Triton server answers {protocol} at {url} ({reason}); start one with `ibnorm-export serve`"
    )


class TritonRunner:
    """One model of a running server, through Triton's own client.

    Args:
        model: the file that the server should be serving.
        endpoint: the server's address and the model's name, which may be left out if the server has only one model.

    Raises:
        BackendUnavailable: no server answers at the address.
        IBNormError: the address is malformed, or the server has no such model.
        ModelFileError: the server's model has other inputs or outputs than the file.
    """

    name: str = Backend.TRITON

    def __init__(self, model: ExportedModel, endpoint: Endpoint) -> None:
        scheme, _, address = endpoint.url.rpartition("://")
        if scheme not in ("", "http", "grpc") or not _is_host_and_port(address):
            raise IBNormError(f"--url is {quoted(endpoint.url)}; it must be HOST:PORT (HTTP) or grpc://HOST:PORT")
        self._module: Any = tritonclient.grpc if scheme == "grpc" else tritonclient.http
        self._url = endpoint.url
        try:
            self._client = self._module.InferenceServerClient(address.rstrip("/"))
            self._client.is_server_live()
            self._model = endpoint.model or self._only_model()
            metadata = self._client.get_model_metadata(self._model, **self._as_json())
            self._types = {item["name"]: triton_to_np_dtype(item["datatype"]) for item in metadata["inputs"]}
            self._outputs = [item["name"] for item in metadata["outputs"]]
        except (OSError, HTTPException, InferenceServerException, ValueError, TypeError, KeyError) as error:
            raise _connection_error(endpoint.url, error) from error  # a server that is not Triton may answer anything
        self._check_tensors(model)

    def _check_tensors(self, model: ExportedModel) -> None:
        inputs, outputs = [t.name for t in model.inputs], [t.name for t in model.outputs]
        if (sorted(self._types), sorted(self._outputs)) != (sorted(inputs), sorted(outputs)):
            raise ModelFileError(
                f"{self._model} at {self._url} has the inputs {list(self._types)} and the outputs {self._outputs}; "
                f"{model.path} has the inputs {inputs} and the outputs {outputs}"
            )

    def run(self, inputs: Arrays) -> Arrays:
        tensors = []
        for name, dtype in self._types.items():
            array = np.ascontiguousarray(inputs[name].astype(dtype, copy=False))
            tensor = self._module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_data_from_numpy(array))
        try:
            result = self._client.infer(self._model, tensors)
            return {name: result.as_numpy(name) for name in self._outputs}
        except (OSError, HTTPException, InferenceServerException) as error:
            raise ModelFileError(f"{self._model} at {self._url}: {error}") from error

    def _as_json(self) -> dict[str, bool]:
        return {"as_json": True} if self._module is tritonclient.grpc else {}

    def _only_model(self) -> str:
        index = self._client.get_model_repository_index(**self._as_json())
        names = [item["name"] for item in (index.get("models", []) if isinstance(index, dict) else index)]
        if len(names) != 1:
            raise IBNormError(f"the server at {self._url} has the models {listed(names, 20)}; choose with --name")
        return str(names[0])
