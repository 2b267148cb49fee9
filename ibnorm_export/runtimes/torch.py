"""PyTorch as a runner, eager or compiled, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.module_copy import copy_module
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.op.float64_mode import compute_in_float64

__all__ = ["Float64TorchRunner", "TorchCudaRunner", "TorchRunner"]


def _tensors(model: LoadedModel, inputs: Arrays, *, dtype: torch.dtype) -> list[torch.Tensor]:
    """The inputs in the model's order; floating-point ones in `dtype`."""
    tensors = []
    for spec in model.inputs:
        tensor = torch.from_numpy(np.ascontiguousarray(inputs[spec.name]))
        tensors.append(tensor.to(dtype) if spec.floating else tensor)
    return tensors


def _arrays(model: LoadedModel, outputs: Sequence[torch.Tensor]) -> Arrays:
    """The outputs by name; NumPy has no bfloat16, so such outputs become float32."""
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
        for name, tensor in zip(model.outputs, outputs, strict=True)
    }


@contextmanager
def _compile_errors() -> Iterator[None]:
    """Report a failure of torch.compile as one of the machine.

    Raises:
        BackendUnavailable: torch.compile cannot compile the model here.
    """
    try:
        yield
    except torch._inductor.exc.InductorError as error:
        raise BackendUnavailable(
            f"torch.compile cannot compile the model on this machine: {str(error).splitlines()[0]}"
        ) from error


class TorchRunner:
    """Runs a module of `model` in the dtype of its parameters.

    Args:
        model: the model, which names the inputs and outputs.
        module: a copy of the model's own module to run; None makes one.
        compiled: use torch.compile without dynamic shapes, so that each shape is compiled once.
    """

    thread_pool = "torch"  # shared by the process, so a benchmark need not wait between such runners

    def __init__(self, model: LoadedModel, module: nn.Module | None = None, *, compiled: bool = False) -> None:
        self.name = "torch.compile" if compiled else "torch"
        self._model = model
        entry = model.entry(module)
        self._dtype = next(p.dtype for p in entry.parameters() if p.is_floating_point())
        self._entry = torch.compile(entry, dynamic=False) if compiled else entry

    def run(self, inputs: Arrays) -> Arrays:
        tensors = _tensors(self._model, inputs, dtype=self._dtype)
        with torch.inference_mode(), _compile_errors():
            outputs = self._entry(*tensors)
        return _arrays(self._model, outputs)


class Float64TorchRunner(TorchRunner):
    """Runs a module in float64 throughout, also where its code casts to a narrower type.

    Args:
        model: the model, which names the inputs and outputs.
        module: a copy of the model's module in float64.
    """

    def __init__(self, model: LoadedModel, module: nn.Module) -> None:
        super().__init__(model, module)

    def run(self, inputs: Arrays) -> Arrays:
        with compute_in_float64():
            return super().run(inputs)


class TorchCudaRunner:
    """Runs a copy of a module on the GPU. TF32 is off, as in `OrtCudaRunner`.

    Args:
        model, module, compiled: as in `TorchRunner`; `torch.compile` may use CUDA graphs ("reduce-overhead").

    Raises:
        BackendUnavailable: torch finds no GPU.
    """

    def __init__(self, model: LoadedModel, module: nn.Module | None = None, *, compiled: bool = False) -> None:
        if not torch.cuda.is_available():
            raise BackendUnavailable(
                f"torch {torch.__version__} finds no GPU, which the comparison with torch needs here: install torch "
                "with CUDA"
            )
        self.name = "torch.compile" if compiled else "torch"
        self._model = model
        placed = copy_module(model.module if module is None else module).to("cuda")
        self._dtype = next(p.dtype for p in placed.parameters() if p.is_floating_point())
        entry = model.entry(placed)
        self._entry = torch.compile(entry, dynamic=False, mode="reduce-overhead") if compiled else entry

    def run(self, inputs: Arrays) -> Arrays:
        return _arrays(self._model, self._pass(self._place(inputs)))

    def timed(self, inputs: Arrays) -> Callable[[], float]:
        """See `DeviceRunner`. Two CUDA events on the stream measure the pass."""
        tensors = self._place(inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it

        def once() -> float:
            torch.cuda.synchronize()
            begin.record()
            self._pass(tensors)
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))

        return once

    def _place(self, inputs: Arrays) -> list[torch.Tensor]:
        return [tensor.to("cuda") for tensor in _tensors(self._model, inputs, dtype=self._dtype)]

    def _pass(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False), _compile_errors():
            outputs: tuple[torch.Tensor, ...] = self._entry(*tensors)
        return outputs
