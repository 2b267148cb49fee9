"""The baseline error over several realisations of rounding.

One run of PyTorch is one draw of rounding errors, which may be lucky: another processor sums in another order. On
ill-conditioned inputs, draws differ by a factor of several. So some samples are run again with other orders of
summation, and with the last bits of the weights changed, each time against float64 with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.module_copy import deep_copy
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.op.spec import Compression
from ibnorm_export.op.torch_op import compose_ibnorm
from ibnorm_export.runtimes.torch import Float64TorchRunner, TorchRunner

__all__ = ["largest_errors", "pooled_spread"]

#: Partial sums that run side by side, as in the vector registers of a small processor.
_LANES: Final = 4
#: Parts into which the inner dimension of a matrix product is cut.
_PARTS: Final = 8
#: Weights whose last bits are changed, in values; a copy of them is made. Small ones come first.
_MOST_CHANGED: Final = 2**28
#: Seeds of the changes of last bits, one for each realisation.
_SEEDS: Final = (1,)

_aten = torch.ops.aten


def _relative_error(actual: Any, truth: Any) -> float:
    size = float(np.linalg.norm(truth.astype(np.float64)))
    return float(np.linalg.norm(actual.astype(np.float64) - truth)) / size if size else 0.0


class _OtherOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Sums one after the other in a few lanes, from the end: products of matrices, and means over the last axis."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._replacements: dict[Any, Callable[..., Any]] = {
            _aten.mm.default: _product,
            _aten.bmm.default: _product,
            _aten.addmm.default: _biased_product,
            _aten.mean.dim: _mean,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ibnorm":
            return self._norm(func, *args)
        replacement = self._replacements.get(func)
        result = None if replacement is None or kwargs else replacement(*args)
        return func(*args, **(kwargs or {})) if result is None else result

    def _norm(self, func: Any, *args: Any) -> Any:
        name = func._schema.name.rpartition("::")[2]
        compression = next(c for c in Compression if name in (c.op_type, c.skip_op_type))
        skip = name == compression.skip_op_type
        x, rest = ((args[0] + args[1]).contiguous(), args[2:]) if skip else (args[0], args[1:])
        weight, bias, lambd, epsilon = rest
        with self:
            y = compose_ibnorm(x, weight, bias=bias, lambd=lambd, epsilon=epsilon, compression=compression)
        return (y, x) if skip else y


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, k) times b (..., k, n), with partial products from the end of k."""
    step = max(1, -(-a.shape[-1] // _PARTS))
    wide = torch.promote_types(a.dtype, torch.float32)
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=wide)
    for start in reversed(range(0, a.shape[-1], step)):
        total += a[..., start : start + step].to(wide) @ b[..., start : start + step, :].to(wide)
    return total.to(a.dtype)


def _biased_product(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (_product(a.float(), b.float()) + bias.float()).to(a.dtype) if a.dtype != torch.float64 else bias + a @ b


def _mean(x: Tensor, axes: Sequence[int], keepdim: bool = False) -> Tensor | None:
    """The mean over the last axis; None for other axes."""
    if [axis % x.dim() for axis in axes] != [x.dim() - 1] or x.shape[-1] < 2 * _LANES:
        return None
    size = x.shape[-1]
    padded = nn.functional.pad(x, (0, -size % _LANES)).reshape(*x.shape[:-1], -1, _LANES)
    lanes = torch.zeros_like(padded[..., 0, :])
    for index in reversed(range(padded.shape[-2])):
        lanes = lanes + padded[..., index, :]
    total = lanes[..., 0]
    for lane in range(1, _LANES):
        total = total + lanes[..., lane]
    mean = total / size
    return mean.unsqueeze(-1) if keepdim else mean


def _run_in_other_order(model: LoadedModel, module: nn.Module, inputs: Arrays) -> Arrays:
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    tensors = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in model.inputs]
    with torch.no_grad(), _OtherOrder():
        outputs = model.entry(module)(*(t.to(dtype) if t.is_floating_point() else t for t in tensors))
    return {
        name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in zip(model.outputs, outputs, strict=True)
    }


def _with_other_last_bits(model: LoadedModel, dtype: torch.dtype, *, seed: int) -> LoadedModel:
    """A copy in `dtype` whose weights differ from those of `model` by at most their last bit or so."""
    module = model.in_dtype(dtype)
    generator = np.random.default_rng(seed)  # several times faster than PyTorch's
    room = _MOST_CHANGED
    parameters: dict[int, object] = {id(parameter): parameter for parameter in module.parameters()}
    for parameter in sorted(module.parameters(), key=lambda p: p.numel()):
        if not parameter.is_floating_point() or parameter.numel() > room:
            continue
        room -= parameter.numel()
        change = torch.from_numpy(generator.random(tuple(parameter.shape), dtype=np.float32)) * 2 - 1
        changed = (parameter.detach().double() * (1 + change * torch.finfo(dtype).eps)).to(dtype)
        # Not by assigning to `data`, which a `Widened` parameter shares with that of `model`.
        parameters[id(parameter)] = nn.Parameter(changed, requires_grad=False)
    return replace(model, module=deep_copy(module, parameters), original=None)


def largest_errors(
    model: LoadedModel,
    baseline: nn.Module,
    *,
    dtype: torch.dtype,
    samples: Sequence[tuple[Arrays, Arrays, Callable[[Arrays, str], Any]]],
    names: Collection[str],
) -> list[Mapping[str, float]]:
    """Measure the baseline error of some samples under several realisations of rounding.

    Args:
        model: the checkpoint.
        baseline: its module in `dtype`.
        dtype: dtype of the baseline.
        samples: inputs, outputs in float64, and what selects the values of an output that are defined.
        names: the outputs.

    Returns:
        For each sample, the largest relative error by output.
    """
    found: list[dict[str, float]] = [dict.fromkeys(names, 0.0) for _ in samples]

    def add(index: int, actual: Arrays, truth: Arrays) -> None:
        select = samples[index][2]
        for name in names:
            error = _relative_error(select(actual, name), select(truth, name))
            if np.isfinite(error):
                found[index][name] = max(found[index][name], error)

    if not model.replaced_norms:  # otherwise the truth has other norms than the baseline
        for index, (inputs, truth, _) in enumerate(samples):
            add(index, _run_in_other_order(model, baseline, inputs), truth)
    for changed in _changed_models(model, dtype):
        narrow, exact = TorchRunner(changed, changed.module), Float64TorchRunner(changed, changed.in_float64())
        for index, (inputs, _, _) in enumerate(samples):
            add(index, narrow.run(inputs), exact.run(inputs))
    return list(found)


def _changed_models(model: LoadedModel, dtype: torch.dtype) -> Iterator[LoadedModel]:
    for seed in _SEEDS:
        yield _with_other_last_bits(model, dtype, seed=seed)


def pooled_spread(own: Sequence[float], largest: Sequence[float]) -> float:
    """How much larger the error is under the worst realisation than in one run, over several samples; at least 1."""
    squares = sum(error**2 for error in own)
    return max(1.0, float(np.sqrt(sum(error**2 for error in largest) / squares))) if squares else 1.0
