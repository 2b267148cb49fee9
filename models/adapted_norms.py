"""Norms that a registered adapter converts: the replacement, checked against the class that it replaces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ibnorm_export.errors import CheckpointError, IBNormError
from ibnorm_export.models.registry import Adapter
from ibnorm_export.op.agreement import Agreement, float64_tensors, perturbed
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.op.norm_variants import AxesIBNorm, BatchIBNorm, ChannelIBNorm
from ibnorm_export.op.spec import Grouping, IBNormSpec
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["adapted"]

#: Standard deviations and means of the drawn rows.
_DEVIATIONS: Final = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
_MEANS: Final = (0.0, 10.0)

#: Buffers of a norm with running statistics, by the name that `BatchIBNorm` gives them.
_STATISTICS: Final = ("running_mean", "compressed_mean", "compressed_var")


def adapted(
    norm: nn.Module, adapter: Adapter, *, path: str, seen: Tensor | None, suggest: Callable[[], str]
) -> nn.Module:
    """Return what replaces a norm, with the norm's own parameters.

    It is checked against the norm in float64: on values that reached it, on drawn rows, and on drawn rows after each of
    its parameters and buffers has changed, so that none is dropped.

    Args:
        norm: an instance of the user's class.
        adapter: what was registered for the class.
        path: where the norm is in the model, for messages.
        seen: values that reached it; None if it did not run.
        suggest: (on failure only) which reading would fit, in words.

    Raises:
        CheckpointError: the adapter fails, or what it returns is not what the class computes; the message states which
            reading would fit.
    """
    where = f"{path} ({type(norm).__name__})"
    rows = _drawn_rows(norm, seen, where=where)
    candidates = list(_candidates(norm, adapter, shape=rows.shape, where=where))
    values = [rows] if seen is None else [seen, rows]
    errors = {index: _compare(norm, candidate, values) for index, candidate in enumerate(candidates)}
    index = min(errors, key=lambda i: (not errors[i], errors[i].error))
    if not errors[index]:
        raise CheckpointError(
            f"{where}: the adapter reads it as {_describe(candidates[index])}, which differs from the class by "
            f"{errors[index].error:.3g} (relative, in float64; at most {errors[index].tolerance:.1e}). {suggest()}"
        )
    _require_every_tensor(norm, adapter, index, rows=rows, where=where)
    return candidates[index]


def _drawn_rows(norm: nn.Module, seen: Tensor | None, *, where: str) -> Tensor:
    """Values of the shape that reaches the norm, with many standard deviations and means along the first axis."""
    if seen is not None and seen.dim() >= 2:
        shape = tuple(seen.shape[1:])
    else:
        parameter = next((p for p in norm.parameters() if p.dim()), None)
        size = getattr(norm, "normalized_shape", None) if parameter is None else parameter.shape
        if size is None:
            raise CheckpointError(f"{where} did not run and has no parameter, so its size is unknown: remove it")
        shape = (int(size if isinstance(size, int) else size[-1]),)
    rows = [(deviation, mean) for deviation in _DEVIATIONS for mean in _MEANS]
    values = torch.randn((len(rows), *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, (deviation, mean) in zip(values, rows, strict=True):
        row.mul_(deviation).add_(mean * deviation)
    return values


def _candidates(norm: nn.Module, adapter: Adapter, *, shape: torch.Size, where: str) -> Iterator[nn.Module]:
    """The modules that the adapter's answer may mean: the spec does not state where the features are."""
    try:
        given = adapter(norm)
    except IBNormError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise CheckpointError(f"{where}: the adapter raised {type(error).__name__}: {error}") from error
    if isinstance(given, nn.Module):
        yield given
        return
    if not isinstance(given, IBNormSpec):
        raise CheckpointError(f"{where}: the adapter returned {type(given).__name__}; it must return an IBNormSpec")
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    spec = replace(given, scale=weight is not None, bias=bias is not None)
    sizes = {parameter.numel() for parameter in (weight, bias) if parameter is not None}
    axes = [axis for axis in ((-1, 1) if len(shape) > 2 else (-1,)) if sizes <= {shape[axis]}]
    if not axes:
        raise CheckpointError(
            f"{where}: weight and bias have {sorted(sizes)} values, but the input has shape {tuple(shape)}, so they "
            "are neither for its last axis nor for its axis 1"
        )
    for axis in axes:
        new = _empty(spec, shape[axis], axis=axis, where=where)
        for name, parameter in (("weight", weight), ("bias", bias)):
            if parameter is not None:
                flat = parameter if parameter.dim() == 1 else nn.Parameter(parameter.detach().reshape(-1), False)
                setattr(new, name, flat)
        if isinstance(new, BatchIBNorm):
            _take_statistics(new, norm, where=where)
        yield new.eval()


def _empty(spec: IBNormSpec, features: int, *, axis: int, where: str) -> nn.Module:
    try:
        match spec.grouping:
            case Grouping.LAST:
                return IBNorm(features, spec) if axis == -1 else ChannelIBNorm(features, spec)
            case Grouping.AXES:
                return AxesIBNorm(features, spec, channel_axis=axis)
            case Grouping.BATCH:
                return BatchIBNorm(features, spec, channel_axis=axis)
    except IBNormError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _take_statistics(new: BatchIBNorm, norm: nn.Module, *, where: str) -> None:
    buffers = {name: getattr(norm, name, None) for name in _STATISTICS}
    missing = [name for name, buffer in buffers.items() if not isinstance(buffer, Tensor)]
    if missing:
        raise CheckpointError(
            f"{where}: grouping 'batch' needs {', '.join(_STATISTICS)}, and it has no {', '.join(missing)}; "
            "remove the adapter (the norm is then identified), or return a BatchIBNorm from it"
        )
    for name, buffer in buffers.items():
        assert isinstance(buffer, Tensor)
        new.register_buffer(name, buffer.detach().reshape(-1))


def _describe(norm: nn.Module) -> str:
    spec = getattr(norm, "spec", None)
    if not isinstance(spec, IBNormSpec):
        return type(norm).__name__
    return f"{spec.op_type} with lambda {spec.lambd:.6g} and epsilon {spec.epsilon:.6g} (canonical)"


def _compare(norm: nn.Module, candidate: nn.Module, values: list[Tensor]) -> Agreement:
    agreement = Agreement()
    with compute_in_float64(), torch.no_grad():
        for x in values:
            try:
                actual = float64_tensors(candidate(x.clone()))
            except (RuntimeError, IndexError, IBNormError):  # this reading does not fit the shape
                actual = []
            expected = float64_tensors(norm(x.clone()))
            agreement.add(actual, expected, rounded=lambda x=x: float64_tensors(norm(perturbed(x.clone()))))  # type: ignore[misc]  # binds x
    return agreement


def _require_every_tensor(norm: nn.Module, adapter: Adapter, index: int, *, rows: Tensor, where: str) -> None:
    """Raise CheckpointError if a parameter or buffer changes the norm's output, and not that of its replacement."""
    tensors: Mapping[str, Any] = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    for name in (name for name, tensor in tensors.items() if tensor.is_floating_point()):
        changed = copy.deepcopy(norm)
        tensor = changed.get_parameter(name) if name in dict(norm.named_parameters()) else changed.get_buffer(name)
        with torch.no_grad():
            tensor.mul_(1.25).add_(0.125 * torch.sign(tensor) + 0.0625)
        candidates = list(_candidates(changed, adapter, shape=rows.shape, where=where))
        if not _compare(changed, candidates[index], [rows]):
            raise CheckpointError(
                f"{where}: the adapter drops {name!r}, which changes what the class computes. Only `weight` and `bias` "
                "are taken from the class: remove the adapter (the norm is then identified with all its parameters), "
                "or return the module that computes it, for example an IBNorm, from the adapter"
            )
