"""One kind of fault: data, so that the table of kinds can be listed, counted and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Final

from tests.verifier.faults.edit import Edit

__all__ = [
    "BATCHED",
    "DECODERS",
    "EVERY",
    "GENAI",
    "HALF",
    "IMAGES",
    "LLAMAS",
    "NORMED",
    "QUANTISED",
    "TEXTS",
    "VITS",
    "Kind",
]

#: Forms that kinds are planted in. One of each family, and those that are built or checked in another way.
TEXTS: Final = ("llama", "gpt2")
VITS: Final = ("vit", "vit inlined")
IMAGES: Final = ("vit", "resnet", "resnet axes", "resnet batch")
LLAMAS: Final = ("llama", "llama decoder", "llama static", "llama int8")
DECODERS: Final = ("llama decoder", "gpt2 decoder", "llama int8")
GENAI: Final = ("llama genai", "llama genai bf16")
HALF: Final = ("llama fp16", "vit bf16", "resnet batch fp16")
QUANTISED: Final = ("llama int8", "llama int4")
BATCHED: Final = ("resnet batch", "resnet batch fp16")
NORMED: Final = ("llama", "gpt2", "vit bf16", "resnet", "llama genai")
EVERY: Final = ("llama", "gpt2", "vit", "resnet", "vit bf16", "llama genai bf16", "llama int4")


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Args:
        name: what is wrong.
        forms: the forms that it is planted in.
        plant: changes the file, or its folder.
        group: what the kind is about.
        cannot: why verification may pass a file with it; the change of the output is then measured. Empty if it must
            be found.
    """

    name: str
    forms: tuple[str, ...]
    plant: Callable[[Edit], object]
    _: KW_ONLY
    group: str = ""
    cannot: str = ""
