"""The operator in torch: `ibnorm`, `skip_ibnorm`, the `IBNorm` module, and `replace_norms`.

In eager mode each form is one registered operator (`torch.ops.ibnorm.IBNormL`, ...) that keeps its
input alone for the backward pass and recomputes the rest. `torch.export` records that operator,
which is what makes one ONNX node of it; `torch.compile` is given the plain composition, which its
code generator fuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.spec import Compression, Grouping, IBNormSpec, NormConfig, NormKind

__all__ = ["IBNorm", "SkipIBNorm", "ibnorm", "replace_norms", "skip_ibnorm"]


def _compress(t: Tensor, compression: Compression) -> Tensor:
    match compression:
        case Compression.LINEAR:
            return t
        case Compression.LOGARITHMIC:
            return torch.copysign(torch.log1p(t.abs()), t)
        case Compression.TANH:
            return torch.tanh(t)


def _slope(t: Tensor, c: Tensor, compression: Compression) -> Tensor:
    """g'(t), given c = g(t)."""
    match compression:
        case Compression.LINEAR:
            return torch.ones_like(t)
        case Compression.LOGARITHMIC:
            return 1.0 / (1.0 + t.abs())
        case Compression.TANH:
            return 1.0 - c * c


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _standardise(
    x: Tensor, lambd: float, epsilon: float, compression: Compression
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (..., n) -> (t, c, normalised c, reciprocal standard deviation of c)."""
    x = x.to(_arithmetic(x))
    t = (x - x.mean(-1, keepdim=True)) / lambd
    c = _compress(t, compression)
    centred = c - c.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + epsilon)
    return t, c, centred * rstd, rstd


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lambd: float, epsilon: float, compression: Compression
) -> Tensor:
    y = _standardise(x, lambd, epsilon, compression)[2]
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous()


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, lambd: float, epsilon: float, compression: Compression
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (..., n), weight (n,) and bias (n,), in the arithmetic's dtype."""
    t, c, y, rstd = _standardise(x, lambd, epsilon, compression)
    grad = grad.to(y.dtype)
    rows = tuple(range(grad.dim() - 1))
    grad_weight = (grad * y).sum(rows) if rows else grad * y
    grad_bias = grad.sum(rows) if rows else grad
    g = grad if weight is None else grad * weight.to(y.dtype)
    grad_c = rstd * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
    grad_d = grad_c * _slope(t, c, compression) / lambd
    return grad_d - grad_d.mean(-1, keepdim=True), grad_weight, grad_bias


_Op = Callable[..., Tensor]
_SkipOp = Callable[..., tuple[Tensor, Tensor]]


def _define(compression: Compression) -> _Op:
    @torch.library.custom_op(f"ibnorm::{compression.op_type}", mutates_args=())
    def op(x: Tensor, weight: Tensor | None, bias: Tensor | None, lambd: float, epsilon: float) -> Tensor:
        return _forward(x, weight, bias, lambd, epsilon, compression)

    @op.register_fake
    def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, lambd: float, epsilon: float) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, bias, ctx.lambd, ctx.epsilon = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = _backward(grad, x, weight, ctx.lambd, ctx.epsilon, compression)
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
        return _forward(total, weight, bias, lambd, epsilon, compression), total

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
        dx, dweight, dbias = _backward(grad, total, weight, ctx.lambd, ctx.epsilon, compression)
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


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: IBNormSpec) -> None:
    if spec.grouping is not Grouping.LAST:
        raise SpecError(f"grouping is {spec.grouping.value!r}; this version normalises the last axis only ('last')")
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
    bias: Tensor | None,  # (n,)
    spec: IBNormSpec,
) -> Tensor:  # (..., n), contiguous, of x's dtype
    """IBNorm over the last axis; differentiable.

    Args:
        x: any floating dtype, which the result has too, under autocast as well. Arithmetic is float64
            for float64 and float32 otherwise.
        weight: scale, or None for ones; any floating dtype.
        bias: or None for zeros; any floating dtype.
        spec: compression, lambda (in units of x) and epsilon. Its `scale` and `bias` are not
            consulted: what is passed counts.

    Raises:
        SpecError: a shape, dtype or grouping does not fit.

    Source: arXiv 2510.25262, section 4.2.
    """
    _check(x, weight, bias, spec)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _forward(x, weight, bias, spec.lambd, spec.epsilon, spec.compression)
    return _OPS[spec.compression](x, weight, bias, spec.lambd, spec.epsilon)


def skip_ibnorm(
    x: Tensor,  # (..., n)
    skip: Tensor,  # (..., n)
    weight: Tensor | None,  # (n,)
    bias: Tensor | None,  # (n,)
    spec: IBNormSpec,
) -> tuple[Tensor, Tensor]:  # both (..., n), contiguous, of x's dtype
    """(IBNorm of the sum, sum) with sum = x + skip rounded to x's dtype; differentiable.

    Raises:
        SpecError: as `ibnorm`, or x and skip differ in shape or dtype.
    """
    _check(x, weight, bias, spec)
    if x.shape != skip.shape or x.dtype != skip.dtype:
        raise SpecError(
            f"x is {x.dtype} {tuple(x.shape)} and skip is {skip.dtype} {tuple(skip.shape)}; they must be equal"
        )
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        total = (x + skip).contiguous()
        return _forward(total, weight, bias, spec.lambd, spec.epsilon, spec.compression), total
    return _SKIP_OPS[spec.compression](x, skip, weight, bias, spec.lambd, spec.epsilon)


class IBNorm(nn.Module):
    """IBNorm over the last axis, with the parameter names of LayerNorm: `weight` and `bias`.

    Args:
        features: n, the size of the last axis.
        spec: what to compute, and whether `weight` and `bias` exist.
        device, dtype: of the parameters.

    Raises:
        SpecError: the grouping is not 'last', the only one of this version, or features < 1.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        spec: IBNormSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.grouping is not Grouping.LAST:
            raise SpecError(f"grouping is {spec.grouping.value!r}; this version normalises the last axis only ('last')")
        if features < 1:
            raise SpecError(f"features is {features}; it must be at least 1")
        self.features = features
        self.spec = spec
        new = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(features, **new)) if spec.scale else None  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(features, **new)) if spec.bias else None  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features) -> same shape and dtype."""
        return ibnorm(x, self.weight, self.bias, self.spec)

    def extra_repr(self) -> str:
        return f"{self.features}, {self.spec}"


class SkipIBNorm(IBNorm):
    """IBNorm of a residual sum: (x, skip) -> (normalised sum, sum)."""

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x, skip (..., features) -> two of the same shape and dtype."""
        return skip_ibnorm(x, skip, self.weight, self.bias, self.spec)


def _is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation over features: torch's own, or a class named like one."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return True
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _features(module: nn.Module, path: str) -> int:
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        raise SpecError(
            f"{path} is {type(module).__name__}; replacing it takes grouping 'batch' or 'axes', which this "
            "version does not have yet"
        )
    shape = getattr(module, "normalized_shape", None)
    weight = getattr(module, "weight", None)
    if shape is None and isinstance(weight, Tensor):
        shape = tuple(weight.shape)
    if shape is None or len(tuple(shape)) != 1:
        raise SpecError(f"{path} ({type(module).__name__}) normalises {shape}; only one last axis can be replaced")
    return int(shape[0])


def _build(kind: NormKind, spec: IBNormSpec, features: int, like: Tensor | None, path: str) -> nn.Module:
    device = None if like is None else like.device
    dtype = None if like is None else like.dtype
    match kind:
        case NormKind.IBNORM:
            return IBNorm(features, spec, device=device, dtype=dtype)
        case NormKind.LAYERNORM:
            affine = spec.scale or spec.bias
            return nn.LayerNorm(
                features, spec.epsilon, elementwise_affine=affine, bias=spec.bias, device=device, dtype=dtype
            )
        case NormKind.RMSNORM:
            return nn.RMSNorm(features, spec.epsilon, elementwise_affine=spec.scale, device=device, dtype=dtype)
        case NormKind.BATCHNORM:
            raise SpecError(f"{path}: norm 'batchnorm' is not supported yet")


def replace_norms(model: nn.Module, config: NormConfig | IBNormSpec) -> dict[str, nn.Module]:
    """Replace every normalisation of `model` in place, as the config says.

    LayerNorm and RMSNorm of torch are replaced, and classes of other libraries whose name ends in
    LayerNorm or RMSNorm. A new norm takes over the old one's `weight` and `bias` where both have
    them.

    Args:
        model: any torch model.
        config: one spec for all places, or a checkpoint's config with exceptions by module path.

    Returns:
        The new norms by module path, in the order of the model.

    Raises:
        SpecError: the model has no norm, a norm cannot be replaced, or a rule matches nothing.
    """
    if isinstance(config, IBNormSpec):
        config = NormConfig(config)
    found = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if _is_norm(module)]
    found = [(path, module) for path, module in found if not isinstance(module, IBNorm)]
    if not found:
        raise SpecError(f"{type(model).__name__} has no LayerNorm or RMSNorm to replace")
    for rule in config.layers:
        if not any(config.at(path)[1] is rule.spec for path, _ in found):
            raise SpecError(f"the rule for {rule.match!r} decides no norm; there are {[path for path, _ in found]}")
    replaced: dict[str, nn.Module] = {}
    shared: dict[int, nn.Module] = {}
    for path, module in found:
        if id(module) not in shared:
            kind, spec = config.at(path)
            weight = getattr(module, "weight", None)
            new = _build(kind, spec, _features(module, path), weight, path)
            with torch.no_grad():
                for name in ("weight", "bias"):
                    old, own = getattr(module, name, None), getattr(new, name, None)
                    if isinstance(old, Tensor) and isinstance(own, Tensor) and not own.is_meta:
                        own.copy_(old)
            new.train(module.training)
            shared[id(module)] = new
        model.set_submodule(path, shared[id(module)])
        replaced[path] = shared[id(module)]
    return replaced
