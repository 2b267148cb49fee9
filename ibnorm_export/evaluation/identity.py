"""Hashes of what determines the answers of a model, by which cached results are found again."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ibnorm_export.environment import version_of
from ibnorm_export.files import sha256_of

if TYPE_CHECKING:  # importing torch takes seconds, and exported files do not need it
    from torch import nn

    from ibnorm_export.artifacts.loaded_model import LoadedModel

__all__ = ["hash_of", "torch_identity"]

#: Packages whose modules do not change without their version, which is known, or the hash of the checkpoint.
_KNOWN_CODE: Final = ("torch", "transformers", "timm", "torchvision", "ibnorm_export")


def hash_of(facts: dict[str, Any]) -> str:
    """SHA-256 of facts that JSON can hold, whatever their order."""
    return sha256_of(json.dumps(facts, sort_keys=True).encode())


def torch_identity(model: LoadedModel) -> str:
    """Hash of what determines the answers of a model in PyTorch: its weights, as they are in memory, and its code.

    The hash of the checkpoint's files is not enough: it does not show which of two sets of weights was chosen, what has
    changed in memory since, or the code of a model of the user's own.
    """
    facts = {
        "source": model.source_sha256,
        "weights": _weights_hash(model.module),
        "modules": re.sub(" at 0x[0-9a-f]+", "", repr(model.module)),
        "code": _code_hashes(model.module),
        "backend": "torch",
        "version": version_of("torch"),
    }
    return hash_of(facts)


def _weights_hash(module: nn.Module) -> str:
    """Hash of names, types, shapes and values of parameters and buffers."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code_hashes(module: nn.Module) -> list[str]:
    """Hashes of the files that define modules, other than those of packages whose versions are known."""
    files = set()
    for kind in {type(part) for part in module.modules()}:
        if kind.__module__.partition(".")[0] not in _KNOWN_CODE:
            try:
                files.add(inspect.getsourcefile(kind))
            except (TypeError, OSError):  # a class of a notebook has no file
                continue
    return sorted(sha256_of(Path(file)) for file in files if file and Path(file).is_file())
