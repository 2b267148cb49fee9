"""Norms of a training code that a reader easily takes for another: none of them shares code with this package.

`TrainedNorm` is IBNorm-L with lambda 4, divided by lambda, and epsilon 1e-2. The others differ in one detail each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["COMPRESSIONS", "EPSILON", "LAMBDA", "NORMS", "TrainedNorm", "saved_by_training", "trained"]

LAMBDA, EPSILON = 4.0, 1e-2

#: How the training code of each convention writes f(r).
COMPRESSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "divide": lambda r: torch.log1p(r / LAMBDA),
    "unit_slope": lambda r: LAMBDA * torch.log1p(r / LAMBDA),
    "multiply": lambda r: torch.log1p(LAMBDA * r) / LAMBDA,
    "outer": lambda r: torch.log1p(r) / LAMBDA,
}


class TrainedNorm(nn.Module):
    """The norm of the training code."""

    def __init__(self, weight: Tensor, bias: Tensor, convention: str = "divide") -> None:
        super().__init__()
        self.weight, self.bias, self.convention = nn.Parameter(weight), nn.Parameter(bias), convention
        self.epsilon = EPSILON

    def squash(self, r: Tensor) -> Tensor:
        return COMPRESSIONS[self.convention](r)

    def compressed(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return d.sign() * self.squash(d.abs())

    def standardised(self, c: Tensor) -> Tensor:
        c = c - c.mean(-1, keepdim=True)
        return c / torch.sqrt((c * c).mean(-1, keepdim=True) + self.epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.standardised(self.compressed(x)) + self.bias


class HalfLambda(TrainedNorm):
    def squash(self, r: Tensor) -> Tensor:
        return torch.log1p(r / (LAMBDA / 2))


class UnitSlope(TrainedNorm):
    def squash(self, r: Tensor) -> Tensor:
        return COMPRESSIONS["unit_slope"](r)


class Multiply(TrainedNorm):
    def squash(self, r: Tensor) -> Tensor:
        return COMPRESSIONS["multiply"](r)


class Outer(TrainedNorm):
    def squash(self, r: Tensor) -> Tensor:
        return COMPRESSIONS["outer"](r)


class LargeEpsilon(TrainedNorm):
    def standardised(self, c: Tensor) -> Tensor:
        c = c - c.mean(-1, keepdim=True)
        return c / torch.sqrt((c * c).mean(-1, keepdim=True) + 100 * self.epsilon)


class Unbiased(TrainedNorm):
    """The variance divides by n - 1, and epsilon is large."""

    def standardised(self, c: Tensor) -> Tensor:
        return (c - c.mean(-1, keepdim=True)) / torch.sqrt(c.var(-1, keepdim=True) + 0.5)


class Outside(TrainedNorm):
    """Epsilon is outside the root."""

    def standardised(self, c: Tensor) -> Tensor:
        return (c - c.mean(-1, keepdim=True)) / (c.std(-1, keepdim=True, unbiased=False) + self.epsilon)


class NoSecondMean(TrainedNorm):
    def standardised(self, c: Tensor) -> Tensor:
        return c / torch.sqrt(c.var(-1, keepdim=True, unbiased=False) + self.epsilon)


class NoFirstMean(TrainedNorm):
    def compressed(self, x: Tensor) -> Tensor:
        return x.sign() * self.squash(x.abs())


class LostScale(TrainedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.standardised(self.compressed(x)) + self.bias


class OnePlusWeight(TrainedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * self.standardised(self.compressed(x)) + self.bias


class Halved(TrainedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2**0.5


#: What the training code computes, where a reader takes it for `TrainedNorm`. Each is also a subclass of the class that
#: an adapter was written for.
NORMS: dict[str, type[TrainedNorm]] = {
    "lambda 2 read as 4": HalfLambda,
    "unit slope read as divide": UnitSlope,
    "multiply read as divide": Multiply,
    "outer read as divide": Outer,
    "epsilon 100 times larger": LargeEpsilon,
    "variance over n - 1, epsilon 0.5": Unbiased,
    "epsilon outside the root": Outside,
    "no second mean": NoSecondMean,
    "no first mean": NoFirstMean,
    "no scale": LostScale,
    "1 + weight": OnePlusWeight,
    "divided by sqrt(2)": Halved,
}


def trained(module: nn.Module, norm_class: Callable[[Tensor, Tensor], nn.Module]) -> nn.Module:
    """The model of the training code, with the same weights; `norm_class` takes the weight and the bias of a norm."""
    model = copy.deepcopy(module)
    for path, norm in list(model.named_modules()):
        if type(norm).__name__ == "IBNorm":
            model.set_submodule(path, norm_class(norm.weight.detach(), norm.bias.detach()))
    return model.eval()


def saved_by_training(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs and logits of a language model, as a training code saves them."""
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.to(dtype)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 9), np.int32), "logits": logits.float().numpy()}
