"""Export, verify, benchmark and serve models that normalise with IBNorm (arXiv 2510.25262).

Importing this package imports neither torch nor a runtime: names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ibnorm_export.errors import IBNormError
from ibnorm_export.op.spec import Compression, Convention, IBNormSpec, NormConfig

if TYPE_CHECKING:
    from ibnorm_export.op.replace_norms import replace_norms
    from ibnorm_export.op.torch_op import IBNorm, SkipIBNorm, ibnorm, skip_ibnorm

__version__ = "0.1.0"

__all__ = [
    "Compression",
    "Convention",
    "IBNorm",
    "IBNormError",
    "IBNormSpec",
    "NormConfig",
    "SkipIBNorm",
    "ibnorm",
    "replace_norms",
    "skip_ibnorm",
]

_LAZY = {
    **dict.fromkeys(("IBNorm", "SkipIBNorm", "ibnorm", "skip_ibnorm"), "ibnorm_export.op.torch_op"),
    "replace_norms": "ibnorm_export.op.replace_norms",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
