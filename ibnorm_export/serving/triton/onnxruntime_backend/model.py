"""Replaces Triton's C++ backend "onnxruntime" if there is none: it runs the same config with the onnxruntime package.

Triton's Python backend loads this file in its own process. The file is not a module of this package and imports nothing
from it. It reads the same parts of the config as the C++ backend: the model file, the op library, the requested outputs
and the thread counts.

Source: triton-inference-server/python_backend, README.md, "Python-based backends".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb


class TritonPythonModel:
    """One instance of a model: an ONNX Runtime session on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        options = ort.SessionOptions()
        options.log_severity_level = 3
        parameters = config.get("parameters", {})
        if "intra_op_thread_count" in parameters:
            options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        if "inter_op_thread_count" in parameters:
            options.inter_op_num_threads = int(parameters["inter_op_thread_count"]["string_value"])
        for declared in config.get("model_operations", {}).get("op_library_filename", []):
            # the path is for the server; here the library is in the model's folder, and was checked before the start
            options.register_custom_ops_library(str(folder / Path(declared).name))
        file = folder / args["model_version"] / (config.get("default_model_filename") or "model.onnx")
        self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._inputs = [item["name"] for item in config["input"]]
        self._batched = int(config.get("max_batch_size", 0)) > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request; requests with equal shapes run as one batch."""
        feeds = [self._feed(request) for request in requests]
        groups: dict[Any, list[int]] = {}
        for index, (feed, request) in enumerate(zip(feeds, requests, strict=True)):
            shapes = tuple(array.shape[1:] for array in feed.values()) if self._batched else index
            groups.setdefault((shapes, tuple(request.requested_output_names())), []).append(index)
        responses: list[Any] = [None] * len(requests)
        for (_, names), members in groups.items():
            for index, response in zip(members, self._run([feeds[i] for i in members], list(names)), strict=True):
                responses[index] = response
        return responses

    def _feed(self, request: Any) -> dict[str, Any]:
        # DLPack in both directions: the stubs were built for NumPy 1, and with NumPy 2 their own conversions silently
        # repeat the first row of an input and send empty outputs
        return {name: np.from_dlpack(pb.get_input_tensor_by_name(request, name)) for name in self._inputs}

    def _run(self, feeds: list[dict[str, Any]], names: list[str]) -> list[Any]:
        one = len(feeds) == 1
        together = feeds[0] if one else {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        try:
            outputs = self._session.run(names, together)
        except Exception as error:  # noqa: BLE001  # every error of the runtime becomes the answer to these requests
            failed = pb.InferenceResponse(error=pb.TritonError(str(error)))
            return [failed for _ in feeds]
        ends = np.cumsum([len(next(iter(feed.values()))) for feed in feeds])[:-1]
        parts = [[output] if one else np.split(output, ends) for output in outputs]
        return [
            pb.InferenceResponse(
                [
                    pb.Tensor.from_dlpack(name, np.ascontiguousarray(part[i]))
                    for name, part in zip(names, parts, strict=True)
                ]
            )
            for i in range(len(feeds))
        ]
