"""Norms that do not normalise the last axis: over channels, over several axes, and with running statistics.

A convolutional network has its features on axis 1, (batch, channels, ...). `ChannelIBNorm` moves them to the end and
back. Grouping 'axes' flattens the normalised axes into one, because an ONNX function needs constant axes. Grouping
'batch' has running statistics and is element-wise at inference. Scale and bias are per channel, as in the norms that
these modules replace.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.spec import Compression, Grouping, IBNormSpec
from ibnorm_export.op.torch_op import IBNorm, ibnorm

__all__ = [
    "AxesIBNorm",
    "BatchIBNorm",
    "ChannelIBNorm",
    "ChannelLayerNorm",
    "ChannelRMSNorm",
    "FeatureBatchNorm",
    "OffsetRMSNorm",
]

#: Weight of a new batch in the running statistics, as in PyTorch's BatchNorm.
MOMENTUM: Final = 0.1


class ChannelIBNorm(IBNorm):
    """IBNorm over the channels of every position: x (batch, features, ...) -> same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of every position: x (batch, features, ...) -> same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class ChannelRMSNorm(nn.RMSNorm):
    """RMSNorm over the channels of every position: x (batch, features, ...) -> same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm that multiplies by `offset + weight`, as Gemma's does: x (..., features) -> same shape."""

    offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, (self.offset + self.weight).to(x.dtype), self.eps)


class FeatureBatchNorm(nn.BatchNorm1d):
    """BatchNorm of features on the last axis: x (..., features) -> same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1).contiguous()

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any rank."""


def _per_channel(parameter: Tensor, x: Tensor, *, channel_axis: int) -> Tensor:
    return parameter if channel_axis == -1 else parameter.reshape(-1, *[1] * (x.dim() - 2))


class AxesIBNorm(IBNorm):
    """IBNorm jointly over the axes [axis, rank), as in ONNX LayerNormalization; scale and bias are per channel.

    Args:
        features: size of the channel axis.
        spec: the norm, with grouping 'axes'.
        channel_axis: 1, or -1 if the features are on the last axis. With -1, scale and bias may be replaced by others
            of the shape of several last axes, one value for each element.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        SpecError: the grouping is not 'axes', or the axis includes the batch.
    """

    node_has_affine = False

    def __init__(
        self,
        features: int,
        spec: IBNormSpec,
        *,
        channel_axis: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if spec.grouping is not Grouping.AXES or spec.axis == 0:
            raise SpecError(
                f"grouping {spec.grouping.value!r} with axis {spec.axis}; it must be 'axes' with an axis other than 0"
            )
        self._rows = dataclasses.replace(spec, grouping=Grouping.LAST, axis=-1)
        super().__init__(features, self._rows, device=device, dtype=dtype)
        self.spec = spec
        self.channel_axis = channel_axis

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, features, ...), or (..., features) -> same shape and dtype."""
        y = ibnorm(x.flatten(self.spec.axis), None, bias=None, spec=self._rows).reshape(x.shape)
        if self.weight is not None:
            y = y * _per_channel(self.weight, x, channel_axis=self.channel_axis)
        if self.bias is not None:
            y = y + _per_channel(self.bias, x, channel_axis=self.channel_axis)
        return y.to(x.dtype)


def _compress(t: Tensor, compression: Compression) -> Tensor:
    """g(t). For export, the logarithm is written as in the ONNX function, which is accurate for small t."""
    if compression is Compression.TANH:
        return torch.tanh(t)
    if torch.compiler.is_exporting():
        q = (1.0 + t.abs()).clamp(min=1.0 + 2.0**-23)
        return t * torch.log(q) / (q - 1.0)
    return torch.copysign(torch.log1p(t.abs()), t)


class BatchIBNorm(nn.Module):
    """IBNorm with statistics per channel over the batch; element-wise at inference.

        y = scale * (g((x - running_mean) / lambda) - compressed_mean) / sqrt(compressed_var + epsilon) + bias

    With compression S it is affine in x: one BatchNormalization, which runtimes fold into the convolution before it.

    Args:
        features: size of the channel axis.
        spec: the norm, with grouping 'batch'.
        channel_axis: 1, or -1 if the features are on the last axis.
        device: device of parameters and running statistics.
        dtype: dtype of parameters and running statistics.

    Raises:
        SpecError: the grouping is not 'batch'.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor  # (features,), of x
    compressed_mean: Tensor  # (features,), of c
    compressed_var: Tensor  # (features,), of c

    def __init__(
        self,
        features: int,
        spec: IBNormSpec,
        *,
        channel_axis: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.grouping is not Grouping.BATCH:
            raise SpecError(f"grouping is {spec.grouping.value!r}; it must be 'batch'")
        self.features, self.spec, self.channel_axis = features, spec, channel_axis
        self.momentum = MOMENTUM
        ones, zeros = (f(features, device=device, dtype=dtype) for f in (torch.ones, torch.zeros))
        self.weight = nn.Parameter(ones.clone()) if spec.scale else None
        self.bias = nn.Parameter(zeros.clone()) if spec.bias else None
        self.register_buffer("running_mean", zeros.clone())
        self.register_buffer("compressed_mean", zeros)
        self.register_buffer("compressed_var", ones)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, features, ...), or (..., features) -> same shape and dtype; training updates the statistics."""
        first = x if self.channel_axis == 1 else x.movedim(-1, 1)
        y = self._normalise(first.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
        return (y if self.channel_axis == 1 else y.movedim(1, -1)).to(x.dtype).contiguous()

    def _normalise(self, x: Tensor) -> Tensor:
        def converted(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.to(x.dtype)

        spec, linear = self.spec, self.spec.compression is Compression.LINEAR
        weight, bias = converted(self.weight), converted(self.bias)
        mean, c_mean, c_var = (b.to(x.dtype) for b in (self.running_mean, self.compressed_mean, self.compressed_var))
        if linear and not self.training:
            squared = spec.lambd**2
            return F.batch_norm(
                x, mean + spec.lambd * c_mean, squared * c_var, weight, bias, eps=squared * spec.epsilon
            )
        if self.training:
            mean = x.mean([axis for axis in range(x.dim()) if axis != 1])
        t = (x - mean.reshape(-1, *[1] * (x.dim() - 2))) / spec.lambd
        c = t if linear else _compress(t, spec.compression)
        if not self.training:
            return F.batch_norm(c, c_mean, c_var, weight, bias, eps=spec.epsilon)
        self._update(mean, c)
        return F.batch_norm(c, None, None, weight, bias, training=True, eps=spec.epsilon)

    @torch.no_grad()
    def _update(self, mean: Tensor, c: Tensor) -> None:
        over = [axis for axis in range(c.dim()) if axis != 1]
        statistics = (mean, c.mean(over), c.var(over, correction=0))
        for running, new in zip(
            (self.running_mean, self.compressed_mean, self.compressed_var), statistics, strict=True
        ):
            running.lerp_(new.to(running.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.features}, {self.spec}, running statistics"
