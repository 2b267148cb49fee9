"""The operator in PyTorch: the functions `ibnorm` and `skip_ibnorm`, and the modules `IBNorm` and `SkipIBNorm`.

In eager mode each form is one registered operator (`torch.ops.ibnorm.IBNormL`, ...). It only saves its input for the
backward pass, which recomputes the rest. `torch.export` records the operator, so that it becomes one ONNX node.
`torch.compile` sees the plain composition of operators, which it fuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.spec import Compression, Grouping, IBNormSpec

__all__ = ["IBNorm", "SkipIBNorm", "compose_ibnorm", "ibnorm", "skip_ibnorm"]


def _compress(t: Tensor, compression: Compression) -> Tensor:
    match compression:
        case Compression.LINEAR:
            return t
        case Compression.LOGARITHMIC:
            return torch.copysign(torch.log1p(t.abs()), t)
        case Compression.TANH:
            return torch.tanh(t)


def _slope(t: Tensor, c: Tensor, *, compression: Compression) -> Tensor:
    """g'(t), given c = g(t)."""
    match compression:
        case Compression.LINEAR:
            return torch.ones_like(t)
        case Compression.LOGARITHMIC:
            return 1.0 / (1.0 + t.abs())
        case Compression.TANH:
            return 1.0 - c * c


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _standardise(
    x: Tensor, lambd: float, *, epsilon: float, compression: Compression
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (..., n) -> (t, c, normalised c, reciprocal standard deviation of c)."""
    x = x.to(_compute_dtype(x))
    t = (x - x.mean(-1, keepdim=True)) / lambd
    c = _compress(t, compression)
    centred = c - c.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + epsilon)
    return t, c, centred * rstd, rstd


def compose_ibnorm(
    x: Tensor, weight: Tensor | None, *, bias: Tensor | None, lambd: float, epsilon: float, compression: Compression
) -> Tensor:
    """IBNorm over the last axis composed of PyTorch's own operators.

    Args:
        x: (..., n), any floating-point dtype; the arithmetic is float64 for float64, and float32 otherwise.
        weight: the scale (n,); None means ones.
        bias: the bias (n,); None means zeros.
        lambd: lambda of the definition.
        epsilon: epsilon of the definition.
        compression: g of the definition.

    Returns:
        (..., n), contiguous, of x's dtype.

    Source: arXiv 2510.25262, section 4.2.
    """
    y = _standardise(x, lambd, epsilon=epsilon, compression=compression)[2]
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous()


def _backward(
    grad: Tensor, x: Tensor, *, weight: Tensor | None, lambd: float, epsilon: float, compression: Compression
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (..., n), weight (n,) and bias (n,), in the dtype of the computation."""
    t, c, y, rstd = _standardise(x, lambd, epsilon=epsilon, compression=compression)
    grad = grad.to(y.dtype)
    rows = tuple(range(grad.dim() - 1))
    grad_weight = (grad * y).sum(rows) if rows else grad * y
    grad_bias = grad.sum(rows) if rows else grad
    g = grad if weight is None else grad * weight.to(y.dtype)
    grad_c = rstd * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
    grad_d = grad_c * _slope(t, c, compression=compression) / lambd
    return grad_d - grad_d.mean(-1, keepdim=True), grad_weight, grad_bias


_Op = Callable[..., Tensor]
_SkipOp = Callable[..., tuple[Tensor, Tensor]]


def _define(compression: Compression) -> _Op:
    @torch.library.custom_op(f"ibnorm::{compression.op_type}", mutates_args=())
    def op(x: Tensor, weight: Tensor | None, bias: Tensor | None, lambd: float, epsilon: float) -> Tensor:
        return compose_ibnorm(x, weight, bias=bias, lambd=lambd, epsilon=epsilon, compression=compression)

    @op.register_fake
    def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, lambd: float, epsilon: float) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, bias, ctx.lambd, ctx.epsilon = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = _backward(
            grad, x, weight=weight, lambd=ctx.lambd, epsilon=ctx.epsilon, compression=compression
        )
        return (
            dx.to(x.dtype),
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            None,
            None,
        )

    op.register_autograd(backward, setup_context=setup_context)
    return op


def _define_skip(compression: Compression) -> _SkipOp:
    @torch.library.custom_op(f"ibnorm::{compression.skip_op_type}", mutates_args=())
    def op(
        x: Tensor, skip: Tensor, weight: Tensor | None, bias: Tensor | None, lambd: float, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        total = (x + skip).contiguous()
        return compose_ibnorm(total, weight, bias=bias, lambd=lambd, epsilon=epsilon, compression=compression), total

    @op.register_fake
    def _(
        x: Tensor, skip: Tensor, weight: Tensor | None, bias: Tensor | None, lambd: float, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        like = torch.empty_like(x, memory_format=torch.contiguous_format)
        return like, torch.empty_like(like)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, _, weight, bias, ctx.lambd, ctx.epsilon = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(output[1], weight)

    def backward(ctx, grad, grad_total):  # type: ignore[no-untyped-def]
        total, weight = ctx.saved_tensors
        dx, dweight, dbias = _backward(
            grad, total, weight=weight, lambd=ctx.lambd, epsilon=ctx.epsilon, compression=compression
        )
        dx = (dx + grad_total).to(total.dtype)
        return (
            dx,
            dx.clone(),
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            None,
            None,
        )

    op.register_autograd(backward, setup_context=setup_context)
    return op


_OPS: dict[Compression, _Op] = {c: _define(c) for c in Compression}
_SKIP_OPS: dict[Compression, _SkipOp] = {c: _define_skip(c) for c in Compression}


def _check(x: Tensor, weight: Tensor | None, *, bias: Tensor | None, spec: IBNormSpec) -> None:
    if spec.grouping is not Grouping.LAST:
        raise SpecError(f"grouping is {spec.grouping.value!r}; it must be 'last' here; see norm_variants.py for others")
    if not x.is_floating_point() or x.dim() == 0:
        raise SpecError(f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating point with at least one axis")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != (x.shape[-1],):
            raise SpecError(
                f"{name} has shape {tuple(parameter.shape)}; it must be ({x.shape[-1]},), the last axis of x"
            )


def ibnorm(
    x: Tensor,  # (..., n)
    weight: Tensor | None,  # (n,)
    *,
    bias: Tensor | None,  # (n,)
    spec: IBNormSpec,
) -> Tensor:  # (..., n), contiguous, of x's dtype
    """Compute IBNorm over the last axis; differentiable.

    Args:
        x: any floating-point dtype. The result has the same dtype, also under autocast. The arithmetic is float64 for
            float64 and float32 otherwise.
        weight: the scale, in any floating-point dtype; None means ones.
        bias: the bias, in any floating-point dtype; None means zeros.
        spec: compression, lambda (in units of x) and epsilon. Its `scale` and `bias` are ignored.

    Raises:
        SpecError: a shape, dtype or grouping does not fit.

    Source: arXiv 2510.25262, section 4.2.
    """
    _check(x, weight, bias=bias, spec=spec)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return compose_ibnorm(
            x, weight, bias=bias, lambd=spec.lambd, epsilon=spec.epsilon, compression=spec.compression
        )
    return _OPS[spec.compression](x, weight, bias, spec.lambd, spec.epsilon)


def skip_ibnorm(
    x: Tensor,  # (..., n)
    skip: Tensor,  # (..., n)
    *,
    weight: Tensor | None,  # (n,)
    bias: Tensor | None,  # (n,)
    spec: IBNormSpec,
) -> tuple[Tensor, Tensor]:  # both (..., n), contiguous, of x's dtype
    """Compute IBNorm of a residual sum; differentiable.

    Returns:
        (IBNorm of the sum, sum), where sum is x + skip rounded to the dtype of x.

    Raises:
        SpecError: as for `ibnorm`, or x and skip differ in shape or dtype.
    """
    _check(x, weight, bias=bias, spec=spec)
    if x.shape != skip.shape or x.dtype != skip.dtype:
        raise SpecError(
            f"x is {x.dtype} {tuple(x.shape)} and skip is {skip.dtype} {tuple(skip.shape)}; they must be equal"
        )
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        total = (x + skip).contiguous()
        return compose_ibnorm(
            total, weight, bias=bias, lambd=spec.lambd, epsilon=spec.epsilon, compression=spec.compression
        ), total
    return _SKIP_OPS[spec.compression](x, skip, weight, bias, spec.lambd, spec.epsilon)


class IBNorm(nn.Module):
    """IBNorm over the last axis, with the parameter names of LayerNorm: `weight` and `bias`.

    Args:
        features: n, the size of the last axis.
        spec: the norm, and whether `weight` and `bias` exist.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        SpecError: the grouping is not 'last' (see `norm_variants` for others), or features < 1.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    #: Whether `weight` and `bias` are inputs of the ONNX node; otherwise they are applied after it.
    node_has_affine = True

    def __init__(
        self,
        features: int,
        spec: IBNormSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.grouping is not Grouping.LAST:
            raise SpecError(
                f"grouping is {spec.grouping.value!r}; it must be 'last' here; see norm_variants.py for others"
            )
        if features < 1:
            raise SpecError(f"features is {features}; it must be at least 1")
        self.features = features
        self.spec = spec
        new = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(features, **new)) if spec.scale else None  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(features, **new)) if spec.bias else None  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features) -> same shape and dtype."""
        offset = self.spec.offset
        weight = offset + self.weight if offset and self.weight is not None else self.weight
        return ibnorm(x, weight, bias=self.bias, spec=self.spec)

    def extra_repr(self) -> str:
        return f"{self.features}, {self.spec}"


class SkipIBNorm(IBNorm):
    """IBNorm of a residual sum: (x, skip) -> (normalised sum, sum)."""

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x, skip (..., features) -> (normalised sum, sum), both with the same shape and dtype."""
        return skip_ibnorm(x, skip, weight=self.weight, bias=self.bias, spec=self.spec)
