"""Faults that rounding to half precision hides, above all those that act only with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS"]

_Build = Callable[[Nodes, str], str]

_DECODERS: Final = ("llama decoder bf16", "gpt2 decoder fp16", "llama static fp16", "llama genai bf16")


def _size(n: Nodes, name: str, axis: int) -> str:
    return n("Shape", name, start=axis, end=axis + 1)


def _tokens(n: Nodes) -> str:
    return _size(n, "input_ids", 1)


def _with_cache(n: Nodes) -> str:
    """Whether there are more places than tokens: no number shows it."""
    return n("Greater", _size(n, "attention_mask", 1), _tokens(n))


def _several_with_cache(n: Nodes) -> str:
    return n("And", _with_cache(n), n("Greater", _tokens(n), np.array([1])))


def _one_token(n: Nodes) -> str:
    return n("Equal", _tokens(n), np.array([1]))


def _where(condition: Callable[[Nodes], str], other: _Build) -> Callable[[Edit], None]:
    """The last residual branch is another one under a condition."""
    return lambda e: e.splice(e.branch, lambda n, x: n("Where", condition(n), other(n, x), x))


def _larger(factor: float) -> _Build:
    return lambda n, x: n("Mul", x, np.float32(factor))


def _with_square(n: Nodes, x: str) -> str:
    """A little more where the values are large. No number shows it."""
    return n("Add", x, n("Mul", x, x))


def _without_bias(n: Nodes, x: str) -> str:
    return n("Sub", x, n.edit.tensor("mlp.c_proj.bias").name)


def _through_other_half(name: str) -> Callable[[Edit], None]:
    def build(n: Nodes, x: str) -> str:
        kinds = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        other = kinds[kinds[0] == n.edit.float_type]
        return n("Cast", n("Cast", x, to=other), to=n.edit.float_type)

    return lambda e: e.splice(name or e.branch, build)


KINDS: Final = tuple(
    Kind(name, forms, plant, group="half precision")
    for name, forms, plant in (
        ("a branch x 1.02 with a cache", _DECODERS, _where(_with_cache, _larger(1.02))),
        ("a branch x 1.02 with a cache and several tokens", _DECODERS, _where(_several_with_cache, _larger(1.02))),
        ("a branch plus its square", (*_DECODERS, "vit bf16"), lambda e: e.splice(e.branch, _with_square)),
        ("a branch plus its square with a cache", _DECODERS, _where(_with_cache, _with_square)),
        (
            "a branch plus its square with a cache and several tokens",
            _DECODERS,
            _where(_several_with_cache, _with_square),
        ),
        ("a branch plus its square for one token", (*_DECODERS, "llama fp16"), _where(_one_token, _with_square)),
        ("a bias left out with a cache", ("gpt2 decoder fp16",), _where(_with_cache, _without_bias)),
        (
            "a bias left out with a cache and several tokens",
            ("gpt2 decoder fp16",),
            _where(_several_with_cache, _without_bias),
        ),
        (
            "cached values through the other half type",
            ("llama decoder bf16", "gpt2 decoder fp16", "llama static fp16"),
            _through_other_half("past_key_values.0.value"),
        ),
        (
            "a branch through the other half type",
            ("llama decoder bf16", "vit fp16", "vit bf16", "llama genai bf16"),
            _through_other_half(""),
        ),
    )
)
