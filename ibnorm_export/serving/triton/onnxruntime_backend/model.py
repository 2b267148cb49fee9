"""Triton's "onnxruntime" backend where there is no C++ one: the same model_config, over the onnxruntime package.

Triton's Python backend loads this file in a process of its own; it is no module of the package and imports nothing of
it. What it reads of the config is what the C++ backend reads: the file, the op library, the outputs that are asked
for, thread counts.

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
            # packaged for the server's own place: here it lies in the model's folder, checked before the server began
            options.register_custom_ops_library(str(folder / Path(declared).name))
        file = folder / args["model_version"] / (config.get("default_model_filename") or "model.onnx")
        self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._inputs = [item["name"] for item in config["input"]]
        self._batched = int(config.get("max_batch_size", 0)) > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; requests of equal shapes run as one batch."""
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
        # through DLPack both ways: the stubs were built for NumPy 1, and with 2 their own conversions, which say
        # nothing, repeat the first row of an input and send an output empty
        return {name: np.from_dlpack(pb.get_input_tensor_by_name(request, name)) for name in self._inputs}

    def _run(self, feeds: list[dict[str, Any]], names: list[str]) -> list[Any]:
        one = len(feeds) == 1
        together = feeds[0] if one else {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        try:
            outputs = self._session.run(names, together)
        except Exception as error:  # noqa: BLE001  # whatever the runtime says becomes the answer to these requests
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
