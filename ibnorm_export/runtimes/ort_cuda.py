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
    """What backend ort-cuda lacks on a machine, and what to do about it, in one line; empty when nothing.

    Args:
        providers: of the installed ONNX Runtime.
        torch_cuda: the CUDA version that torch is built for, None for a CPU build.
        devices: number of GPUs that answer.
    """
    if CUDA_PROVIDER not in providers:
        return (
            f"backend ort-cuda needs onnxruntime-gpu: the installed ONNX Runtime has no {CUDA_PROVIDER}, only "
            f"{', '.join(providers)}; pip uninstall onnxruntime, then pip install 'ibnorm-export[gpu]'"
        )
    if torch_cuda is None:
        return "backend ort-cuda needs torch with CUDA, which holds its buffers: the installed torch is a CPU build"
    if devices < 1:
        return "backend ort-cuda needs an NVIDIA GPU: none answers here; check the driver with nvidia-smi"
    return ""


class _Bound:
    """Device buffers of one set of input shapes: their addresses stay, as a captured graph needs."""

    def __init__(self, binding: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.binding = binding
        self.inputs = inputs
        self.outputs: dict[str, torch.Tensor] = {}
        self.options = ort.RunOptions()


class OrtCudaRunner:
    """An ONNX Runtime session on a GPU, at the optimisation level that is served.

    Inputs and outputs are bound to buffers on the device, held by torch; each set of input shapes is
    captured once as a CUDA graph and replayed after that. float32 is float32: TF32 is off.

    Args:
        source: a file, or a serialised model.
        threads: of the session, for what stays on the host; None is the runtime's default.
        library: fused kernels to register; None runs the norms as functions.
        profile: prefix of a profile, as in `OrtRunner`; a profiled session replays no graphs, whose
            nodes a profile cannot see.
        optimised: where the session writes the graph that it runs.

    Raises:
        BackendUnavailable: no GPU, or no CUDA in the installed runtime.
        ModelFileError: the runtime cannot load the model; its own words follow.
    """

    name = "ort-cuda"

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
        if CUDA_PROVIDER not in self._session.get_providers():  # the runtime falls back by itself, with a warning
            raise BackendUnavailable(
                f"ONNX Runtime {ort.__version__} cannot load its {CUDA_PROVIDER}: CUDA or cuDNN libraries of the "
                "version that it was built for are missing; pip install 'onnxruntime-gpu[cuda,cudnn]'"
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
        """See `DeviceRunner`: from an idle device to an idle device, by the host's clock."""
        bound = self._place(inputs)

        def once() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            self._pass(bound)
            return (time.perf_counter_ns() - start) / 1e6

        return once

    def end_profile(self) -> list[dict[str, Any]]:
        """Events of the session so far, as ONNX Runtime wrote them; ends the profile."""
        return read_profile(self._session)

    def _pass(self, bound: _Bound) -> None:
        try:
            self._session.run_with_iobinding(bound.binding, bound.options)
        except OrtError as error:
            raise ModelFileError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        torch.cuda.synchronize()

    def _place(self, inputs: Arrays) -> _Bound:
        """`inputs` in the buffers of their shapes, which the first call for these shapes makes."""
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
        bound.options.add_run_config_entry("gpu_graph_id", "-1")  # one plain pass, which tells the outputs' shapes
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
