"""ONNX Runtime on an NVIDIA GPU as a runner; torch holds its buffers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.runtimes.ort import OrtError, first_line, open_session, read_profile, session_options
from ibnorm_export.runtimes.runner import Backend

__all__ = ["CUDA_PROVIDER", "OrtCudaRunner", "missing_for_cuda"]

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
_TORCH_TYPES: Final = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}
_ONNX_TYPES: Final[dict[torch.dtype, int]] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL,
}


def missing_for_cuda(providers: Sequence[str], torch_cuda: str | None, *, devices: int) -> str:
    """Return, in one line, what is missing for backend ort-cuda, and how to install it; empty if nothing is.

    Args:
        providers: execution providers of the installed ONNX Runtime.
        torch_cuda: the CUDA version for which torch is built; None for a CPU build.
        devices: number of GPUs that torch finds.
    """
    if CUDA_PROVIDER not in providers:
        return (
            f"backend ort-cuda needs onnxruntime-gpu: the installed ONNX Runtime has no {CUDA_PROVIDER}, only "
            f"{', '.join(providers)}; pip uninstall onnxruntime, then pip install 'ibnorm-export[gpu]'"
        )
    if torch_cuda is None:
        return "backend ort-cuda needs torch with CUDA for its buffers, but the installed torch is a CPU build"
    if devices < 1:
        return "backend ort-cuda needs an NVIDIA GPU, but torch finds none; check the driver with nvidia-smi"
    return ""


class _Bound:
    """Device buffers for one set of input shapes. Their addresses never change, as a captured graph requires."""

    def __init__(self, binding: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.binding = binding
        self.inputs = inputs
        self.outputs: dict[str, torch.Tensor] = {}
        self.options = ort.RunOptions()


class OrtCudaRunner:
    """An ONNX Runtime session on a GPU, at the optimisation level at which models are served.

    Inputs and outputs are bound to device buffers that torch allocates. The first pass with a set of input shapes is
    captured as a CUDA graph; later passes replay it. TF32 is off, so float32 is computed in float32.

    Args:
        source: a file, or a serialised model.
        threads: number of threads for the nodes that stay on the host; None is the runtime's default.
        library: fused kernels to register; None runs the norms as functions.
        profile: prefix of a profile, as in `OrtRunner`. A profiled session uses no CUDA graphs, because a profile
            does not show their nodes.
        optimised: file to which the session writes its optimised graph; None writes none.

    Raises:
        BackendUnavailable: there is no GPU, or the installed runtime has no CUDA.
        ModelFileError: the runtime cannot load the model; the message quotes the runtime's own.
    """

    name: str = Backend.ORT_CUDA

    def __init__(
        self,
        source: Path | bytes,
        threads: int | None = None,
        *,
        library: Path | None = None,
        profile: Path | None = None,
        optimised: Path | None = None,
    ) -> None:
        if problem := missing_for_cuda(
            ort.get_available_providers(), torch.version.cuda, devices=torch.cuda.device_count()
        ):
            raise BackendUnavailable(problem)
        options = session_options(threads, profile)
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
            )
        graphs = profile is None
        provider = {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1" if graphs else "0"}
        self._session = open_session(
            source, options, library=library, providers=[(CUDA_PROVIDER, provider), "CPUExecutionProvider"]
        )
        if CUDA_PROVIDER not in self._session.get_providers():  # the runtime falls back to the CPU with only a warning
            raise BackendUnavailable(
                f"ONNX Runtime {ort.__version__} cannot load its {CUDA_PROVIDER}: the CUDA or cuDNN libraries for "
                "which it was built are missing; pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        self._graphs = graphs
        self._types = {i.name: _TORCH_TYPES[i.type] for i in self._session.get_inputs()}
        self._outputs = {o.name: _TORCH_TYPES[o.type] for o in self._session.get_outputs()}
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}

    def run(self, inputs: Arrays) -> Arrays:
        bound = self._place(inputs)
        self._pass(bound)
        return {
            name: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).cpu().numpy()
            for name, tensor in bound.outputs.items()
        }

    def timed(self, inputs: Arrays) -> Callable[[], float]:
        """See `DeviceRunner`. The host's clock measures the pass; the device is idle before and after it."""
        bound = self._place(inputs)

        def once() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            self._pass(bound)
            return (time.perf_counter_ns() - start) / 1e6

        return once

    def end_profile(self) -> list[dict[str, Any]]:
        """End the profile and return its events as ONNX Runtime wrote them."""
        return read_profile(self._session)

    def _pass(self, bound: _Bound) -> None:
        try:
            self._session.run_with_iobinding(bound.binding, bound.options)
        except OrtError as error:
            raise ModelFileError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        torch.cuda.synchronize()

    def _place(self, inputs: Arrays) -> _Bound:
        """Copy `inputs` into the buffers for their shapes, which are allocated at the first call."""
        key = tuple(inputs[name].shape for name in self._types)
        if key not in self._bound:
            self._bound[key] = self._bind(inputs)
        bound = self._bound[key]
        for name, buffer in bound.inputs.items():
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(inputs[name])))
        torch.cuda.synchronize()
        return bound

    def _bind(self, inputs: Arrays) -> _Bound:
        binding = self._session.io_binding()
        buffers = {
            name: torch.from_numpy(np.ascontiguousarray(inputs[name])).to("cuda", dtype)
            for name, dtype in self._types.items()
        }
        for name, tensor in buffers.items():
            binding.bind_input(name, "cuda", 0, _ONNX_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        for name in self._outputs:
            binding.bind_output(name, "cuda")
        bound = _Bound(binding, buffers)
        torch.cuda.synchronize()
        bound.options.add_run_config_entry("gpu_graph_id", "-1")  # a pass without a graph shows the outputs' shapes
        self._pass(bound)
        shapes = [value.shape() for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        for (name, dtype), shape in zip(self._outputs.items(), shapes, strict=True):
            tensor = torch.empty(shape, dtype=dtype, device="cuda")
            binding.bind_output(name, "cuda", 0, _ONNX_TYPES[dtype], shape, tensor.data_ptr())
            bound.outputs[name] = tensor
        if self._graphs:
            bound.options = ort.RunOptions()
            bound.options.add_run_config_entry("gpu_graph_id", str(len(self._bound) + 1))
        return bound
