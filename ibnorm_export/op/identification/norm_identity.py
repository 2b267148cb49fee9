"""What a norm of unknown code is, and the norm of this package that computes the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.identification.fitting import Fit
from ibnorm_export.op.norm_variants import AxesIBNorm, BatchIBNorm, ChannelIBNorm
from ibnorm_export.op.spec import Compression, Grouping, IBNormSpec
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.text_report import Report

__all__ = ["NormIdentity"]


@dataclass(frozen=True, slots=True)
class NormIdentity(Report):
    """What a norm is.

    It is true for a member of the family, and false for anything else. It has more than eight fields because a
    replacement is built from it.

    Args:
        module: the norm, as it was given.
        spec: the member, in canonical form; None if the norm is not a member.
        kind: "S", "L" or "T", or what the norm is instead, in words.
        residual: norm of what the formula leaves unexplained over the norm of the output, in float64.
        features: number of values of the scale and of the bias.
        lambd: lambda of the formula; 1 for S, which is identified by epsilon * lambda^2; None if no formula fits.
        epsilon: epsilon of the formula, in the same way.
        channel_axis: the axis that scale and bias follow: -1, or 1 for features on the channels.
        elements: the axes that scale and bias follow together, as sizes, where each element has its own, as in
            LayerNorm((C, H, W)); empty otherwise.
        grouping: which values share statistics, in words.
        weight: the scale (features,), or of the shape of `elements`: the norm's own parameter where it is the scale as
            it is, a float64 parameter where the scale is derived from others, None if the scale is 1.
        bias_parameter: the bias, in the same way; None if it is 0.
        statistics: for grouping 'batch': float64 `running_mean`, `compressed_mean` and `compressed_var` (features,).
        parameters: what every parameter and buffer of the norm is, by name.
        difference: for a norm that is not a member: how it differs, and how far off the nearest member is.
        fit: the formula that explains its values; None if no known one does.
    """

    module: nn.Module = field(repr=False)
    spec: IBNormSpec | None
    _: KW_ONLY
    kind: str
    residual: float
    features: int
    lambd: float | None = None
    epsilon: float | None = None
    channel_axis: int = -1
    elements: tuple[int, ...] = ()
    grouping: str = "last axis"
    weight: nn.Parameter | None = field(default=None, repr=False)
    bias_parameter: nn.Parameter | None = field(default=None, repr=False)
    statistics: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    parameters: Mapping[str, str] = field(default_factory=dict)
    difference: str = ""
    fit: Fit | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return self.spec is not None

    @property
    def scale(self) -> Tensor | None:
        """The scale in float64, of the shape of `weight`; None if it is 1."""
        return None if self.weight is None else self.weight.detach().to(torch.float64)

    @property
    def bias(self) -> Tensor | None:
        """The bias in float64, of the shape of `bias_parameter`; None if it is 0."""
        return None if self.bias_parameter is None else self.bias_parameter.detach().to(torch.float64)

    def replacement(self) -> nn.Module:
        """Return the norm of this package that computes the same, in the training mode of the norm.

        Its parameters are the norm's own objects where they are the scale and the bias as they are.

        Raises:
            SpecError: the norm is not a member of the family.
        """
        if self.spec is None:
            raise SpecError(f"{type(self.module).__name__} has no replacement: {self.difference}")
        norm: IBNorm | BatchIBNorm
        match self.spec.grouping:
            case Grouping.LAST:
                norm = (ChannelIBNorm if self.channel_axis == 1 else IBNorm)(self.features, self.spec)
            case Grouping.AXES:
                norm = AxesIBNorm(self.features, self.spec, channel_axis=self.channel_axis)
            case Grouping.BATCH:
                norm = BatchIBNorm(self.features, self.spec, channel_axis=self.channel_axis)
                for name, value in self.statistics.items():
                    norm.register_buffer(name, value.clone())
        norm.weight, norm.bias = self.weight, self.bias_parameter
        return norm.train(self.module.training)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "class": type(self.module).__name__,
            "member": bool(self),
            "kind": self.kind,
            "lambda": self.lambd,
            "epsilon": self.epsilon,
            "grouping": self.grouping,
            "features": self.features,
            "residual": self.residual if math.isfinite(self.residual) else None,
            "parameters": dict(self.parameters),
            "config": None if self.spec is None else self.spec.to_config(),
            "difference": self.difference,
        }

    def __str__(self) -> str:
        name = type(self.module).__name__
        if self.spec is None:
            return f"{name} is not IBNorm: {self.difference}"
        product = " (S is identified by epsilon * lambda^2)" if self.spec.compression is Compression.LINEAR else ""
        lines = [
            f"{name} is IBNorm-{self.kind}: lambda {self.lambd:.12g}, epsilon {self.epsilon:.12g}{product}",
            f"  grouping   {self.grouping}, {self.features} features",
            f"  residual   {self.residual:.1e}",
        ]
        width = max((8, *map(len, self.parameters)))
        lines += [f"  {name:{width}}   {meaning}" for name, meaning in self.parameters.items()]
        return "\n".join(lines)
