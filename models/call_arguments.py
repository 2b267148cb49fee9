"""How the inputs of a file become the arguments of a module's `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.axes import BATCH, axis_name
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import Inputs
from ibnorm_export.artifacts.tensors import Arrays, DType, InputSpec
from ibnorm_export.errors import CheckpointError, listed, quoted

__all__ = ["CallArguments", "Dynamic", "arguments_of_file", "read_arguments"]

#: Names of dynamic axes: axis -> name for every input that has the axis, or input -> axis -> name.
Dynamic = Mapping[int, str] | Mapping[str, Mapping[int, str]]

#: Types that `forward` may take where the file has int64.
_INTEGERS: Final = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

#: Constants that a file's metadata can hold.
_CONSTANTS: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The inputs of a module, and how `forward` takes them.

    Args:
        specs: the inputs, in order.
        by_name: whether `forward` takes them as keywords; otherwise they are positional.
        integers: types that `forward` takes by input name, where the file has int64.
        constants: other arguments, by name.
        ranges: the smallest and the largest legal integer, by input name.
        sizes: the largest size of dynamic axes, by name of the axis.
        examples: example inputs by name; empty if only names and shapes are known.
    """

    specs: tuple[InputSpec, ...]
    by_name: bool
    _: KW_ONLY
    integers: Mapping[str, torch.dtype] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Tensor] = field(default_factory=dict)

    def call(self, module: nn.Module, *tensors: Tensor) -> object:
        """Call `module` with one tensor for each input."""
        values = {
            spec.name: tensor.to(self.integers[spec.name]) if spec.name in self.integers else tensor
            for spec, tensor in zip(self.specs, tensors, strict=True)
        }
        if self.by_name:
            return module(**values, **self.constants)
        return module(*values.values(), **self.constants)

    def draw(self, rng: np.random.Generator, index: int) -> Arrays:
        """Inputs to compare on: the example itself first, then values like it, with other sizes of dynamic axes.

        Integers are drawn between the smallest and the largest of the example, or 0 and 1 if there was none.
        Floating-point inputs are normal values, with the mean and the standard deviation of the example.
        """
        if index == 0 and self.examples:
            return {spec.name: _array(self.examples[spec.name], floating=spec.floating) for spec in self.specs}
        sizes: dict[str, int] = {}
        drawn: Arrays = {}
        for spec in self.specs:
            example = self.examples.get(spec.name)
            shape = [self._size(spec, axis, sizes=sizes, index=index) for axis in range(len(spec.shape))]
            if not spec.floating:
                low, high = self.ranges.get(spec.name, (0, 1))
                drawn[spec.name] = rng.integers(low, high, shape, dtype=np.int64, endpoint=True)
                continue
            values = rng.standard_normal(shape, dtype=np.float32)
            if example is not None and example.numel() > 1 and bool(torch.isfinite(example).all()):
                deviation, mean = torch.std_mean(example.double())
                values = (values * float(deviation) + float(mean)).astype(np.float32)
            drawn[spec.name] = values
        return drawn

    def _size(self, spec: InputSpec, axis: int, *, sizes: dict[str, int], index: int) -> int:
        """The size of one axis in sample `index`; axes other than batches are at most as long as in the example."""
        name = spec.shape[axis]
        if isinstance(name, int):
            return name
        if name not in sizes:
            small = (2, 1, 5, 3)[index % 4]
            longest = small if axis_name(name) == BATCH else self.sizes.get(name, small)
            sizes[name] = longest if index % 2 == 0 else min(small, longest)
        return sizes[name]

    @property
    def trace_sizes(self) -> dict[str, int]:
        """Sizes of dynamic axes that a model can be traced with: those above 1."""
        return {axis: size for axis, size in self.sizes.items() if size > 1}

    def to_dict(self) -> dict[str, Any]:
        """What the inputs of a file do not show, for its metadata; empty if they show everything."""
        integers = {name: str(dtype).removeprefix("torch.") for name, dtype in self.integers.items()}
        ranges = {name: list(limits) for name, limits in self.ranges.items()}
        found = {"integers": integers, "constants": dict(self.constants), "ranges": ranges, "sizes": dict(self.sizes)}
        return {key: value for key, value in found.items() if value}


def _array(tensor: Tensor, *, floating: bool) -> np.ndarray[Any, Any]:
    return tensor.to(torch.float32 if floating else torch.int64).numpy()


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)


def _takes_names(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether `forward` takes every name as a keyword.

    Raises:
        CheckpointError: it takes other names only.
    """
    parameters = _parameters(module)
    kinds = {parameter.kind for parameter in parameters.values()}
    if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        unknown = [name for name in names if name not in parameters]
        if unknown:
            raise CheckpointError(
                f"forward of {type(module).__name__} takes {listed(parameters)}, not {listed(unknown)}"
            )
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return all(parameters[name].kind in keywords if name in parameters else any_name for name in names)


def _named(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Values by the name of the argument of `forward`."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    values = [inputs] if isinstance(inputs, (Tensor, np.ndarray)) else list(inputs)
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = _parameters(module)
    names = [name for name, p in parameters.items() if p.kind in positional]
    if len(values) > len(names) and any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        names += ["input" if i == len(names) == 0 else f"input_{i}" for i in range(len(names), len(values))]
    if len(values) > len(names):
        raise CheckpointError(
            f"inputs has {len(values)} values, but forward of {type(module).__name__} takes {len(names)} "
            f"({listed(names)})"
        )
    return dict(zip(names, values, strict=False))


def _spec(name: str, tensor: Tensor, *, first: int | None, dynamic: Dynamic | None) -> InputSpec:
    shape: list[int | str] = list(tensor.shape)
    if dynamic is None:
        if shape and shape[0] == first:
            shape[0] = BATCH
    else:
        axes = dynamic.get(name, {}) if any(isinstance(key, str) for key in dynamic) else dynamic  # type: ignore[call-overload]  # one of the two forms
        for axis, label in axes.items():
            if not isinstance(axis, int) or not isinstance(label, str) or not label:
                raise CheckpointError(
                    f"dynamic is {quoted(dynamic)}; it must map an axis to a name, for example {{0: 'batch_size'}}"
                )
            if -len(shape) <= axis < len(shape):
                shape[axis] = label
            elif axes is not dynamic:
                raise CheckpointError(f"dynamic names axis {axis} of {name}, which has shape {tuple(tensor.shape)}")
    return InputSpec(name, tuple(shape), tensor.is_floating_point())


def _require_known(dynamic: Dynamic | None, names: Sequence[str]) -> None:
    unknown = [key for key in dynamic or {} if isinstance(key, str) and key not in names]
    if unknown:
        raise CheckpointError(f"dynamic names {unknown}, which are not inputs; the inputs are {list(names)}")


def read_arguments(module: nn.Module, inputs: Inputs, *, dynamic: Dynamic | None = None) -> CallArguments:
    """Read example inputs, or specs, of a module.

    Args:
        module: the module, whose `forward` names the inputs.
        inputs: one tensor, a tuple in the order of `forward`, or a dict by argument name; or a sequence of `InputSpec`.
            Values of a dict that are not tensors are constants of the call.
        dynamic: names of dynamic axes; None makes the first axis of every input "batch_size" if it has the size of
            the first input's.

    Raises:
        CheckpointError: an input is not a tensor of a supported type, has no place in `forward`, or an axis is unknown.
    """
    if isinstance(inputs, Sequence) and inputs and all(isinstance(spec, InputSpec) for spec in inputs):
        if dynamic is not None:
            raise CheckpointError("inputs are specs, which name their dynamic axes; leave out dynamic")
        specs = tuple(inputs)
        return CallArguments(specs, _takes_names(module, [spec.name for spec in specs]))
    named = _named(module, inputs)
    tensors = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in named.items()}
    constants = {n: v for n, v in tensors.items() if not isinstance(v, Tensor)}
    tensors = {n: v.detach().cpu() for n, v in tensors.items() if isinstance(v, Tensor)}
    for name, value in constants.items():
        if not isinstance(inputs, Mapping) or not isinstance(value, _CONSTANTS):
            raise CheckpointError(
                f"input {name!r} is {type(value).__name__}; it must be a tensor (in a dict of inputs also a number, a "
                "text or None, which stays constant)"
            )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.dtype not in _INTEGERS:
            raise CheckpointError(f"input {name!r} has type {tensor.dtype}; it must be floating point, integer or bool")
    if not tensors:
        raise CheckpointError("inputs has no tensor; give example inputs, for example inputs=torch.randn(2, 16)")
    _require_known(dynamic, list(tensors))
    first = next((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), None)
    specs = tuple(_spec(name, tensor, first=first, dynamic=dynamic) for name, tensor in tensors.items())
    return CallArguments(
        specs,
        _takes_names(module, [*tensors, *constants]),
        integers={n: t.dtype for n, t in tensors.items() if not t.is_floating_point() and t.dtype != torch.int64},
        constants=constants,
        ranges={n: (int(t.min()), int(t.max())) for n, t in tensors.items() if not t.is_floating_point() and t.numel()},
        sizes={
            axis: size
            for spec in specs
            for axis, size in zip(spec.shape, tensors[spec.name].shape, strict=True)
            if isinstance(axis, str)
        },
        examples=tensors,
    )


def arguments_of_file(module: nn.Module, exported: ExportedModel) -> CallArguments:
    """Read the inputs of a module from a file that was exported from it."""
    specs = tuple(InputSpec(t.name, t.shape, t.dtype in tuple(DType)) for t in exported.inputs)
    recorded = exported.metadata.arguments
    constants = dict(recorded.get("constants", {}))
    return CallArguments(
        specs,
        _takes_names(module, [*(spec.name for spec in specs), *constants]),
        integers={name: getattr(torch, dtype) for name, dtype in recorded.get("integers", {}).items()},
        constants=constants,
        ranges={name: (low, high) for name, (low, high) in recorded.get("ranges", {}).items()},
        sizes=recorded.get("sizes", {}),
    )
