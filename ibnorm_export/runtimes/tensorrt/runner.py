"""TensorRT and TensorRT-RTX as runners: an engine built from the file, on PyTorch's current GPU.

This has not been run on a GPU yet. The calls follow the Python examples of the developer guide:
set_optimization_profile_async, set_input_shape, set_tensor_address, execute_async_v3, and the last one under capture
for a CUDA graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable, EngineError
from ibnorm_export.runtimes.tensorrt.bindings import bindings
from ibnorm_export.runtimes.tensorrt.build import build_engine
from ibnorm_export.runtimes.tensorrt.engine import Engine, read_engine
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, Runtime
from ibnorm_export.runtimes.tensorrt.profiles import fitting_profile

__all__ = ["TrtRunner"]

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


class TrtRunner:
    """An engine with an execution context. The shapes of the inputs choose the profile.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".
        model: the model to run.
        engine: an existing engine of `model`; None builds one with the default options.

    Raises:
        BackendUnavailable: the runtime is not installed, or there is no GPU.
        EngineError: the engine was built for another file, runtime, version or GPU, or cannot be built or loaded.
    """

    def __init__(self, backend: str, model: ExportedModel, *, engine: Path | None = None) -> None:
        self.name = str(backend)
        runtime = Runtime(backend)
        # Read first, so that a bad engine is reported even without a GPU.
        read = None if engine is None else read_engine(engine, model, wanted=runtime)
        trt = bindings(runtime)
        if not torch.cuda.is_available():
            raise BackendUnavailable(
                f"backend {backend} needs an NVIDIA GPU, its driver and a CUDA build of torch, but torch "
                f"{torch.__version__} finds no GPU; `ibnorm-export build-engine --runtime tensorrt-rtx` builds an "
                "engine without one"
            )
        with tempfile.TemporaryDirectory() as folder:
            used: Engine = read or build_engine(model, Path(folder) / "model.plan", options=EngineOptions(runtime))
            plan = used.path.read_bytes()
        self._profiles = used.description.profiles
        self._held: list[dict[str, torch.Tensor]] = []
        self._axes = {tensor.name: tensor.shape for tensor in model.inputs}
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{used.path.name}: {backend} {trt.__version__} does not load it; build it again")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]

    def _dtype(self, name: str) -> torch.dtype:
        return _TYPES[self._engine.get_tensor_dtype(name).name]

    def _place(self, inputs: Arrays, stream: Any) -> dict[str, torch.Tensor]:
        """Set the profile, and bind a device tensor to every input and output."""
        held = {
            name: torch.from_numpy(np.ascontiguousarray(inputs[name])).to("cuda", self._dtype(name))
            for name in self._inputs
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        chosen = fitting_profile(self._profiles, self._axes, shapes=shapes)
        if not self._context.set_optimization_profile_async(chosen, stream.cuda_stream):
            raise EngineError(f"{self.name} rejects profile {chosen} of the engine")
        stream.synchronize()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError(f"{self.name} rejects {name} with shape {list(shape)}")
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            held[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        for name, tensor in held.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        return held

    def _enqueue(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"{self.name} cannot run the engine")

    def run(self, inputs: Arrays) -> Arrays:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
        with torch.cuda.stream(stream):
            held = self._place(inputs, stream)
            self._enqueue(stream)
        stream.synchronize()
        outputs = {name: held[name] for name in self._outputs}
        return {n: (t.float() if t.dtype is torch.bfloat16 else t).cpu().numpy() for n, t in outputs.items()}

    def timed(self, inputs: Arrays) -> Callable[[], float]:
        """See `DeviceRunner`. Events on the device measure a CUDA graph of one pass."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
        with torch.cuda.stream(stream):
            held = self._place(inputs, stream)
            self._enqueue(stream)  # the first pass allocates memory, which cannot be captured
        stream.synchronize()
        self._held.append(held)  # keeps alive what the graph reads and writes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._enqueue(stream)

        def once() -> float:
            with torch.cuda.stream(stream):
                begin.record()
                graph.replay()
                end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))

        return once
