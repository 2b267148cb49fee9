"""TensorRT and TensorRT-RTX as runners: an engine built for the file, run on PyTorch's current GPU and stream.

Not yet run on a GPU. Calls as in the developer guide's Python example: set_input_shape, set_tensor_address,
execute_async_v3.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibnorm_export.artifact import ExportedModel
from ibnorm_export.engine import EngineOptions, Runtime, bindings, build_engine
from ibnorm_export.errors import BackendUnavailable, EngineError
from ibnorm_export.loaded import Arrays

__all__ = ["TrtRunner"]

_TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64,
    "INT32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip


class TrtRunner:
    """An engine with the default profile, and an execution context.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".
        model: what to run; the norms run as functions.

    Raises:
        BackendUnavailable: the runtime is not installed, or there is no GPU.
        EngineError: the engine cannot be built or loaded.
    """

    def __init__(self, backend: str, model: ExportedModel) -> None:
        self.name = backend
        runtime = Runtime(backend)
        trt = bindings(runtime)
        if not torch.cuda.is_available():
            raise BackendUnavailable(
                f"backend {backend} needs an NVIDIA GPU, its driver and a CUDA build of torch, and torch "
                f"{torch.__version__} sees no GPU here; `ibnorm-export build-engine --runtime tensorrt-rtx` "
                "builds without one"
            )
        with tempfile.TemporaryDirectory() as folder:
            plan = build_engine(model, Path(folder) / "model.plan", EngineOptions(runtime)).path.read_bytes()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{model.path}: {backend} {trt.__version__} does not load the engine that it built")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]

    def _dtype(self, name: str) -> torch.dtype:
        return _TYPES[self._engine.get_tensor_dtype(name).name]

    def run(self, inputs: Arrays) -> Arrays:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        held: dict[str, Any] = {}
        with torch.cuda.stream(stream):
            for name in self._inputs:
                held[name] = torch.from_numpy(np.ascontiguousarray(inputs[name])).to("cuda", self._dtype(name))
                if not self._context.set_input_shape(name, tuple(held[name].shape)):
                    raise EngineError(
                        f"{name} has shape {list(held[name].shape)}, which is outside the engine's profile"
                    )
            for name in self._outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                held[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
            for name, tensor in held.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise EngineError(f"{self.name} refuses to run the engine")
        stream.synchronize()
        outputs = {name: held[name] for name in self._outputs}
        return {n: (t.float() if t.dtype is torch.bfloat16 else t).cpu().numpy() for n, t in outputs.items()}
