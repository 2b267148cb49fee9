"""What the norms of a stock architecture compute besides normalising, which their replacements must keep or refuse."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from ibnorm_export.errors import SpecError
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.replace_norms import is_norm
from ibnorm_export.op.spec import NormConfig
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["check_replaced", "check_stated"]

#: PyTorch's own norms, which multiply by their weight as it is.
_PLAIN: Final = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _has_offset(norm_class: type[nn.Module]) -> bool | None:
    """Whether a norm with a weight of zeros still lets its input through; None if the class cannot be tried alone."""
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            norm = norm_class(4)
            weight = getattr(norm, "weight", None)
            if not isinstance(weight, nn.Parameter):
                return False
            weight.zero_()
            y = norm(torch.tensor([[1.0, -2.0, 3.0, 5.0]]))
            return bool((y != 0).any())
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):  # it takes other arguments or shapes
        return None


def check_stated(model: nn.Module, norms: NormConfig) -> None:
    """Raise SpecError if a stock norm multiplies by `1 + weight` and the section does not say whether its own does.

    Args:
        model: the stock model, before its norms are replaced.
        norms: the section.
    """
    known: dict[type[nn.Module], bool | None] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if not is_norm(module) or kind in _PLAIN or isinstance(module, (IBNorm, BatchIBNorm)):
            continue
        if norms.at(path)[1].offset is not None or not norms.at(path)[1].scale:
            continue
        if kind not in known:
            known[kind] = _has_offset(kind)
        if known[kind] is not False:
            multiplies = "multiplies" if known[kind] else "may multiply"
            raise SpecError(
                f"{path} ({kind.__name__}) {multiplies} by 1 + weight; the ibnorm section must state whether the norm "
                'that replaces it does too ("offset": 1) or multiplies by the weight alone ("offset": 0)'
            )


def check_replaced(model: nn.Module) -> None:
    """Raise SpecError if a module that is called a norm is still of a class that this package does not know."""
    for path, module in model.named_modules():
        kind = type(module)
        named = "norm" in kind.__name__.lower() and not any(True for _ in module.children())
        ours = kind.__module__.startswith(("ibnorm_export.", "torch.nn."))
        if named and not ours:
            raise SpecError(
                f"{path} ({kind.__name__}) is called a norm, but is not a LayerNorm, RMSNorm or BatchNorm, so what "
                "replaces it is unknown. Build the model in your own code and use --model package.module:factory"
            )
