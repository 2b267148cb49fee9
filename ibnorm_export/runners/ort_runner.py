"""ONNX Runtime as a runner: the one module that imports it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ibnorm_export.artifact import ExportedModel
from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.graph_passes.static_cache import CAPACITY
from ibnorm_export.loaded import Arrays
from ibnorm_export.placement import copies_beside
from ibnorm_export.runners.base import NormExecution

__all__ = ["LEVELS", "OrtCudaRunner", "OrtError", "OrtRunner", "missing_for_cuda", "norm_executions"]

#: Everything that ONNX Runtime raises of its own.
OrtError = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoModel,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    state.EPFail,
)

#: Optimisation levels, lowest first; the last is what is served.
LEVELS: Final = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}

#: Tokens behind those of a cache in place, and what is in them: results must not depend on it.
_SPARE: Final = 3
_UNUSED: Final = 100.0

_CUDA: Final = "CUDAExecutionProvider"
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


def missing_for_cuda(providers: Sequence[str], torch_cuda: str | None, devices: int) -> str:
    """What backend ort-cuda lacks on a machine, and what to do about it, in one line; empty when nothing.

    Args:
        providers: of the installed ONNX Runtime.
        torch_cuda: the CUDA version that torch is built for, None for a CPU build.
        devices: number of GPUs that answer.
    """
    if _CUDA not in providers:
        return (
            f"backend ort-cuda needs onnxruntime-gpu: the installed ONNX Runtime has no {_CUDA}, only "
            f"{', '.join(providers)}; pip uninstall onnxruntime, then pip install 'ibnorm-export[gpu]'"
        )
    if torch_cuda is None:
        return "backend ort-cuda needs torch with CUDA, which holds its buffers: the installed torch is a CPU build"
    if devices < 1:
        return "backend ort-cuda needs an NVIDIA GPU: none answers here; check the driver with nvidia-smi"
    return ""


def _session(
    source: Path | bytes,
    options: ort.SessionOptions,
    library: Path | None,
    providers: Sequence[Any],
    level: str = "all",
) -> ort.InferenceSession:
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them
    label = "the model" if isinstance(source, bytes) else str(source)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=list(providers)
        )
    except OrtError as error:
        raise ModelFileError(f"{label}: ONNX Runtime cannot load it: {_first_line(error)}") from error


class OrtRunner:
    """An ONNX Runtime session on the CPU.

    A cache that the model keeps in place is given and returned as one that grows, copied into a buffer and out of it:
    `ort_text` binds the buffer itself.

    Args:
        source: a file, or a serialised model.
        threads: of the session; None is the runtime's default.
        library: fused kernels to register; None runs the norms as functions.
        profile: prefix of a file that the session writes its profile to when `end_profile` is called.
        level: of optimisation, a key of `LEVELS`; the default is what is served.

    Raises:
        ModelFileError: the runtime cannot load the model; its own words follow.
    """

    name = "ort-cpu"

    def __init__(
        self,
        source: Path | bytes,
        threads: int | None = None,
        library: Path | None = None,
        profile: Path | None = None,
        level: str = "all",
    ) -> None:
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self._session = _session(source, options, library, ["CPUExecutionProvider"], level)
        self._types = {i.name: _NUMPY_TYPES.get(i.type) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._in_place = frozenset(i.name for i in self._session.get_inputs() if CAPACITY in i.shape)

    def run(self, inputs: Arrays) -> Arrays:
        if not self._in_place:
            return self._run(inputs)
        total = inputs["attention_mask"].shape[1]
        outputs = self._run({n: _with_room(a, total) if n in self._in_place else a for n, a in inputs.items()})
        return {name: a[:, :, :total] if name.startswith("present.") else a for name, a in outputs.items()}

    def _run(self, inputs: Arrays) -> Arrays:
        converted = {
            name: np.ascontiguousarray(array.astype(self._types.get(name) or array.dtype, copy=False))
            for name, array in inputs.items()
        }
        try:
            outputs = self._session.run(None, converted)
        except OrtError as error:
            raise ModelFileError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def end_profile(self) -> list[dict[str, Any]]:
        """Events of the session so far, as ONNX Runtime wrote them; ends the profile."""
        return _read_profile(self._session)


def _with_room(cache: NDArray[Any], total: int) -> NDArray[Any]:
    """A cache (batch, heads, past, head) in a buffer of `total` tokens and some more, which count for nothing."""
    batch, heads, past, head = cache.shape
    buffer = np.full((batch, heads, total + _SPARE, head), _UNUSED, dtype=cache.dtype)
    buffer[:, :, :past] = cache
    return buffer


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
        library: Path | None = None,
        profile: Path | None = None,
        optimised: Path | None = None,
    ) -> None:
        if problem := missing_for_cuda(ort.get_available_providers(), torch.version.cuda, torch.cuda.device_count()):
            raise BackendUnavailable(problem)
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
            )
        graphs = profile is None
        provider = {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1" if graphs else "0"}
        self._session = _session(source, options, library, [(_CUDA, provider), "CPUExecutionProvider"])
        if _CUDA not in self._session.get_providers():  # the runtime falls back by itself, with a warning
            raise BackendUnavailable(
                f"ONNX Runtime {ort.__version__} cannot load its {_CUDA}: CUDA or cuDNN libraries of the version that "
                "it was built for are missing; pip install 'onnxruntime-gpu[cuda,cudnn]'"
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
        return _read_profile(self._session)

    def _pass(self, bound: _Bound) -> None:
        try:
            self._session.run_with_iobinding(bound.binding, bound.options)
        except OrtError as error:
            raise ModelFileError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
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


def _read_profile(session: ort.InferenceSession) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def norm_executions(
    model: ExportedModel, inputs: Arrays, library: Path | None, backend: str = "ort-cpu"
) -> tuple[NormExecution, ...]:
    """Which implementation ran for every norm of `model`, from the session's own profile of one pass.

    A fused kernel appears under the node's name and op type; a function has been expanded into other
    nodes, so neither does. On a GPU the graph that the session ran is read for copies beside the norms.
    """
    if not model.norms:
        return ()
    wanted = frozenset((n.name, n.op_type) for n in model.norms)
    expected: str = ""
    copies: Mapping[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        runner: OrtRunner | OrtCudaRunner
        if backend == "ort-cuda":
            expected, optimised = _CUDA, Path(folder) / "optimised.onnx"
            runner = OrtCudaRunner(model.path, library=library, profile=Path(folder) / "norms", optimised=optimised)
            copies = copies_beside(onnx.load(optimised, load_external_data=False).graph, wanted)
        else:
            runner = OrtRunner(model.path, library=library, profile=Path(folder) / "norms")
        runner.run(inputs)
        events = runner.end_profile()
    return _executions(model, events, expected, copies)


def _executions(
    model: ExportedModel, events: Sequence[dict[str, Any]], expected: str, copies: Mapping[tuple[str, str], int]
) -> tuple[NormExecution, ...]:
    """Every norm of `model` by the events of a profile and the copies beside it."""
    ran = {
        (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]): event["args"].get("provider", "")
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return tuple(
        NormExecution(n.module, n.op_type, "fused", ran[key], expected, copies.get(key, 0))
        if (key := (n.name, n.op_type)) in ran
        else NormExecution(n.module, n.op_type, "function", "", expected)
        for n in model.norms
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
