"""A model behind a Triton server as a runner: the one module that imports its client."""

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
from ibnorm_export.errors import BackendUnavailable, IBNormError, ModelFileError
from ibnorm_export.runtimes.runner import Endpoint

__all__ = ["TritonRunner"]

#: Seconds that a request may take.
_TIMEOUT_S = 120.0


def _is_place(text: str) -> bool:
    """Whether it is HOST:PORT."""
    try:
        parts = urlsplit(f"//{text}")
        return bool(parts.hostname and parts.port)
    except ValueError:  # of the port
        return False


class TritonRunner:
    """One model of a running server, through its own client.

    Args:
        model: the file that the server should be serving.
        endpoint: HTTP as HOST:PORT, gRPC as grpc://HOST:PORT; and the model's name there, which may be left out
            where the server has one model.

    Raises:
        BackendUnavailable: no server answers there.
        IBNormError: that is no place, or the server has no such model.
        ModelFileError: its model takes or gives something else than the file.
    """

    name = "triton"

    def __init__(self, model: ExportedModel, endpoint: Endpoint) -> None:
        scheme, _, place = endpoint.url.rpartition("://")
        if scheme not in ("", "http", "grpc") or not _is_place(place):
            raise IBNormError(f"--url is {endpoint.url!r}; it must be HOST:PORT (HTTP) or grpc://HOST:PORT")
        self._module: Any = tritonclient.grpc if scheme == "grpc" else tritonclient.http
        self._where = endpoint.url
        try:
            self._client = self._module.InferenceServerClient(place.rstrip("/"))
            self._client.is_server_live()
            self._model = endpoint.model or self._only_model()
            about = self._client.get_model_metadata(self._model, **self._as_json())
            self._types = {item["name"]: triton_to_np_dtype(item["datatype"]) for item in about["inputs"]}
            self._outputs = [item["name"] for item in about["outputs"]]
        except (OSError, HTTPException, InferenceServerException, ValueError, TypeError, KeyError) as error:
            why = error.message() if isinstance(error, InferenceServerException) else error  # of any server, any value
            if "unknown model" in str(why):
                raise IBNormError(f"the server at {endpoint.url}: {why}; choose with --name") from error
            protocol = "gRPC" if scheme == "grpc" else "HTTP"
            raise BackendUnavailable(
                f"no Triton answers {protocol} at {endpoint.url} ({why}); start one with `ibnorm-export serve`"
            ) from error
        wanted = [t.name for t in model.inputs], [t.name for t in model.outputs]
        if (sorted(self._types), sorted(self._outputs)) != (sorted(wanted[0]), sorted(wanted[1])):
            raise ModelFileError(
                f"{self._model} at {endpoint.url} takes {list(self._types)} and gives {self._outputs}; "
                f"{model.path} takes {wanted[0]} and gives {wanted[1]}"
            )

    def run(self, inputs: Arrays) -> Arrays:
        given = []
        for name, dtype in self._types.items():
            array = np.ascontiguousarray(inputs[name].astype(dtype, copy=False))
            tensor = self._module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            given.append(tensor.set_data_from_numpy(array))
        try:
            result = self._client.infer(self._model, given)
            return {name: result.as_numpy(name) for name in self._outputs}
        except (OSError, HTTPException, InferenceServerException) as error:
            raise ModelFileError(f"{self._model} at {self._where}: {error}") from error

    def _as_json(self) -> dict[str, bool]:
        return {"as_json": True} if self._module is tritonclient.grpc else {}

    def _only_model(self) -> str:
        index = self._client.get_model_repository_index(**self._as_json())
        names = [item["name"] for item in (index.get("models", []) if isinstance(index, dict) else index)]
        if len(names) != 1:
            raise IBNormError(f"the server at {self._where} has the models {', '.join(names)}; choose with --name")
        return str(names[0])
