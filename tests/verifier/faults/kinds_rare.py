"""Faults that rare inputs show: patterns of padding, values of images and caches beyond ordinary ranges, one row.

None of them has a number that the model does not have, or compares floating-point data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx
import onnx.helper

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS", "seen_for"]

_Build = Callable[[Nodes, str], str]

_BOOL: Final = onnx.TensorProto.BOOL
_INT64: Final = onnx.TensorProto.INT64
_LARGEST: Final = np.float32(np.finfo(np.float32).max)
_TINY: Final = np.float32(np.finfo(np.float32).tiny)

_DECODERS: Final = ("llama decoder", "gpt2 decoder", "llama int8", "llama static")
_TEXTS: Final = ("llama", "gpt2", "llama decoder", "llama opset 18")
_ONE_ROW: Final = ("llama one row", "llama decoder one row")


# ---- patterns of padding ----


def _all_seen(n: Nodes, mask: str) -> str:
    return n("ConstantOfShape", n("Shape", mask), value=onnx.helper.make_tensor("one", _INT64, [1], [1]))


def _truth(n: Nodes, mask: str) -> str:
    return n("Cast", mask, to=_BOOL)


def _places(n: Nodes, mask: str) -> str:
    return n("Squeeze", n("Shape", mask, start=1, end=2))


def _closed(n: Nodes, mask: str) -> str:
    """A masked token between two others counts, in rows without padding at their ends."""
    seen, size = _truth(n, mask), _places(n, mask)
    places = n("Range", np.int64(0), size, np.int64(1))
    before = n("Gather", seen, n("Sub", places, np.int64(1)), axis=1)
    after = n("Gather", seen, n("Sub", places, n("Sub", size, np.int64(1))), axis=1)
    ends = n("And", n("Gather", seen, np.array([0]), axis=1), n("Gather", seen, np.array([-1]), axis=1))
    hole = n("And", n("And", before, after), ends)
    return n("Cast", n("Or", seen, hole), to=_INT64)


def _is_pattern(n: Nodes, mask: str, *pattern: int) -> str:
    """Whether the mask of a row begins with a pattern, which starts again at the end of a short row, (rows, 1)."""
    seen = n("Tile", _truth(n, mask), np.array([1, 8]))
    parts = [n("Gather", seen, np.array([place]), axis=1) for place in range(len(pattern))]
    parts = [part if wanted else n("Not", part) for part, wanted in zip(parts, pattern, strict=True)]
    found = parts[0]
    for part in parts[1:]:
        found = n("And", found, part)
    return found


def seen_for(*pattern: int) -> _Build:
    """Padding is ignored in rows of a pattern."""
    return lambda n, mask: n("Cast", n("Or", _truth(n, mask), _is_pattern(n, mask, *pattern)), to=_INT64)


def _zero_for(*pattern: int) -> _Build:
    """The logits of rows of a pattern are zero: a factor that is made of the mask."""

    def build(n: Nodes, x: str) -> str:
        factor = n("Where", _is_pattern(n, "attention_mask", *pattern), np.float32(0), np.float32(1))
        return n("Mul", x, n("Unsqueeze", factor, np.array([2])))

    return build


def _row_for(*pattern: int) -> _Build:
    """Rows of a pattern have the logits of the first row, which their number selects."""

    def build(n: Nodes, x: str) -> str:
        rows = n("Range", np.int64(0), n("Squeeze", n("Shape", "attention_mask", start=0, end=1)), np.int64(1))
        hit = n("Squeeze", _is_pattern(n, "attention_mask", *pattern), np.array([1]))
        return n("Gather", x, n("Where", hit, np.int64(0), rows), axis=0)

    return build


def _mask(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("attention_mask", build)


def _logits(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("logits", build)


def _target_without_padding(e: Edit) -> None:
    """The file states a target that takes no padding, and ignores it."""
    e.claim_new("target", "ort-genai")
    _mask(_all_seen)(e)


def _positions_are_places(n: Nodes, positions: str) -> str:
    """Tokens have the number of their place, whatever the position ids are."""
    past = n("Squeeze", n("Shape", "past_key_values.0.key", start=2, end=3))
    total = n("Squeeze", n("Shape", "attention_mask", start=1, end=2))
    return n("Expand", n("Range", past, total, np.int64(1)), n("Shape", positions))


# ---- values that overflow ----


def _first(build: _Build) -> Callable[[Edit], None]:
    """After the first convolution of an image."""
    return lambda e: e.splice(e.node("Conv").output[0], build)


def _attended(build: _Build) -> Callable[[Edit], None]:
    """After the first attention, whose values come from the cache."""

    def plant(e: Edit) -> None:
        found = [n for n in e.proto.graph.node if n.op_type in ("Attention", "GroupQueryAttention")]
        e.splice(found[0].output[0], build)

    return plant


def _smaller(n: Nodes, x: str, times: int) -> str:
    for _ in range(times):
        x = n("Mul", x, np.float32(0.5))
    return x


def _halved_by_infinity(n: Nodes, x: str) -> str:
    """Values above 2^14 are halved: their product with the largest number is infinite."""
    large = n("IsInf", n("Mul", _smaller(n, x, 14), _LARGEST))
    return n("Where", large, n("Mul", x, np.float32(0.5)), x)


def _halved_by_nan(n: Nodes, x: str) -> str:
    zero = n("Mul", n("Mul", _smaller(n, x, 14), _LARGEST), np.float32(0))
    return n("Where", n("IsNaN", zero), n("Mul", x, np.float32(0.5)), x)


def _halved_with_multiple(n: Nodes, x: str) -> str:
    """A value is halved where another one, which is computed from it, is NaN."""
    return n("Where", n("IsNaN", n("Mul", x, np.float32(1e10))), n("Mul", x, np.float32(0.5)), x)


def _plus_zero_times_largest(n: Nodes, x: str) -> str:
    return n("Add", x, n("Mul", n("Mul", _smaller(n, x, 14), _LARGEST), np.float32(0)))


def _doubled_and_halved(times: int) -> _Build:
    def build(n: Nodes, x: str) -> str:
        for _ in range(times):
            x = n("Add", x, x)
        return _smaller(n, x, times)

    return build


def _factor_and_inverse(factor: float) -> _Build:
    return lambda n, x: n("Div", n("Mul", x, np.float32(factor)), np.float32(factor))


def _plus_power(squares: int, share: np.float32) -> _Build:
    """A high power, so small that it shows only for large values."""

    def build(n: Nodes, x: str) -> str:
        power = x
        for _ in range(squares):
            power = n("Mul", power, power)
        return n("Add", x, n("Mul", power, share))

    return build


# ---- conversions by the type of another value ----


def _like(kind: int, *, back: int = 0) -> _Build:
    def build(n: Nodes, x: str) -> str:
        name = n.edit.new_name("type")
        n.edit.proto.graph.initializer.append(onnx.helper.make_tensor(name, kind, [1], [1.0 if kind != _INT64 else 1]))
        return n("Cast", n("CastLike", x, name), to=back or n.edit.float_type)

    return build


def _whole_by_like(n: Nodes, x: str) -> str:
    """Steps of 2^-22."""
    for _ in range(22):
        x = n("Mul", x, np.float32(2))
    x = _like(_INT64)(n, x)
    return _smaller(n, x, 22)


# ---- attention ----


def _more_attention(n: Nodes, x: str) -> str:
    """A mean over the tokens of a row is added."""
    rows = n("Unsqueeze", x, np.array([1]))
    return n("Add", x, n("Squeeze", n("Attention", rows, rows, rows), np.array([1])))


def _sum_by_product(n: Nodes, x: str) -> str:
    """The sum over the features, by a product with ones, to a high power and very small."""
    width = n.edit.values("lm_head").shape[0]
    total = n("MatMul", x, np.ones((width, 1), np.float32))
    for _ in range(3):
        total = n("Mul", total, total)
    return n("Add", x, n("Mul", total, _TINY))


KINDS: Final[tuple[Kind, ...]] = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "patterns of padding": (
            ("padding is ignored in a file of one row", _ONE_ROW, _mask(_all_seen), ""),
            ("a hole of one token is closed", (*_DECODERS, "llama", "llama decoder for OpenVINO"), _mask(_closed), ""),
            ("padding is ignored for one pattern", (*_TEXTS, *_DECODERS[1:]), _mask(seen_for(0, 1, 0, 1)), ""),
            ("logits are zero for one pattern", (*_TEXTS, *_DECODERS[1:]), _logits(_zero_for(1, 0, 1, 0)), ""),
            ("logits of the first row for one pattern", _TEXTS, _logits(_row_for(1, 0, 1, 0, 0)), ""),
            ("padding is ignored for one long pattern", _TEXTS, _mask(seen_for(0, 1, 0, 1, 1, 0, 1, 0)), ""),
            ("logits are zero for one long pattern", _TEXTS, _logits(_zero_for(1, 0, 1, 0, 1, 1, 0, 1)), ""),
            ("a target that takes no padding is stated", ("llama decoder fp16",), _target_without_padding, ""),
            (
                "positions are places",
                ("llama decoder", "gpt2 decoder", "llama decoder one row"),
                lambda e: e.splice("position_ids", _positions_are_places),
                "",
            ),
        ),
        "overflow": (
            (
                "values above 2^14 halved, by infinity",
                ("vit", "vit inlined", "resnet"),
                _first(_halved_by_infinity),
                "",
            ),
            ("a value halved where its multiple is NaN", ("vit",), _first(_halved_with_multiple), ""),
            ("values above 2^14 halved, by NaN", ("vit", "vit inlined", "resnet"), _first(_halved_by_nan), ""),
            ("NaN above 2^14", ("vit", "resnet", "resnet axes"), _first(_plus_zero_times_largest), ""),
            ("NaN above 2^14 of a cache", ("llama decoder", "gpt2 decoder"), _attended(_plus_zero_times_largest), ""),
            ("infinity above 2^18, by doubling", ("vit", "resnet"), _first(_doubled_and_halved(110)), ""),
            (
                "infinity above 2^18 of a cache, by doubling",
                ("llama decoder",),
                _attended(_doubled_and_halved(110)),
                "",
            ),
            ("times and over the width in fp16", ("vit fp16",), _first(_factor_and_inverse(32.0)), ""),
            ("a power of large values of a cache", ("llama decoder",), _attended(_plus_power(4, _TINY)), ""),
        ),
        "conversions by another value's type": (
            (
                "a branch through fp16",
                ("llama", "vit"),
                lambda e: e.splice(e.branch, _like(onnx.TensorProto.FLOAT16)),
                "",
            ),
            ("images' values through fp16", ("vit bf16",), _first(_like(onnx.TensorProto.FLOAT16)), ""),
            ("attention through fp16", ("llama decoder bf16",), _attended(_like(onnx.TensorProto.FLOAT16)), ""),
            ("images' values through whole numbers", ("vit", "resnet"), _first(_whole_by_like), ""),
        ),
        "sums beside the model": (
            ("one attention more", ("llama",), lambda e: e.splice(e.head_input, _more_attention), ""),
            ("sums by a product with ones", ("llama",), lambda e: e.splice(e.head_input, _sum_by_product), ""),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
