"""Faults in forms that other kinds leave out: attention in several operators, fixed sizes, quantised folders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from tests.verifier.faults.edit import Array, Edit, Nodes
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS"]

_OLD: Final = ("llama opset 18", "llama decoder for OpenVINO")
_FIXED: Final = ("llama one row", "llama decoder one row")
_QUANTISED: Final = ("llama web int8", "llama genai int4")
_STATIC: Final = ("gpt2 static",)


# ---- attention in several operators ----


def _scores(e: Edit) -> onnx.NodeProto:
    """The Softmax of the first attention."""
    return e.node("Softmax")


def _softmax_axis(e: Edit) -> None:
    e.set(_scores(e), axis=-2)


def _scores_through(build: Callable[[Nodes, str], str]) -> Callable[[Edit], None]:
    return lambda e: e.splice_input(_scores(e), 0, build)


def _mask_turned(e: Edit) -> None:
    """Masked tokens count, and the others do not."""
    node = next(n for n in e.proto.graph.node if n.op_type == "Where" and "attn" in f"{n.metadata_props}")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def _heads_in_turn(e: Edit) -> None:
    """Heads of keys are repeated in turn, not each one twice."""
    node = next(n for n in e.proto.graph.node if n.op_type == "Expand" and "attn" in f"{n.metadata_props}")
    unsqueeze = e.producer(node.input[0])
    assert unsqueeze.op_type == "Unsqueeze"
    unsqueeze.input[1] = e.constant(np.array([1]))


def _halves_turned(e: Edit) -> None:
    """The halves of a rotated head change places."""
    node = next(
        n
        for n in e.proto.graph.node
        if n.op_type == "Concat" and len(n.input) == 2 and any(e_neg(e, name) for name in n.input)
    )
    node.input[0], node.input[1] = node.input[1], node.input[0]


def e_neg(e: Edit, name: str) -> bool:
    """Whether a value is the negative of another one."""
    return any(name in n.output and n.op_type == "Neg" for n in e.proto.graph.node)


def _no_negative(e: Edit) -> None:
    node = e.node("Neg")
    node.op_type = "Identity"


# ---- caches and fixed sizes ----


def _present(factor: float) -> Callable[[Edit], None]:
    return lambda e: e.splice("present.0.value", lambda n, x: n("Mul", x, np.float32(factor)))


def _last_logits(n: Nodes, x: str) -> str:
    """Every token has the logits of the last one."""
    last = n("Slice", x, np.array([-1]), np.array([2**31]), np.array([1]))
    return n("Expand", last, n("Shape", x))


def _scatter(build: Callable[[Nodes, str], str]) -> Callable[[Edit], None]:
    return lambda e: e.splice("cache/starts", build)


def _first_row(name: str) -> Callable[[Edit], None]:
    def build(n: Nodes, value: str) -> str:
        return n("Expand", n("Slice", value, np.array([0]), np.array([1]), np.array([0])), n("Shape", value))

    return lambda e: e.splice(name, build)


def _reversed(name: str, axis: int) -> Callable[[Edit], None]:
    def build(n: Nodes, value: str) -> str:
        return n("Slice", value, np.array([-1]), np.array([-(2**31)]), np.array([axis]), np.array([-1]))

    return lambda e: e.splice(name, build)


# ---- quantised folders ----


def _blocks(part: str, change: Callable[[Array], Array]) -> Callable[[Edit], None]:
    """Change a part of the first quantised matrix."""

    def plant(e: Edit) -> None:
        node = next(n for n in e.proto.graph.node if n.op_type == "MatMulNBits")
        name = node.input[{"Q": 1, "scales": 2, "zero_points": 3}[part]]
        tensor = next(t for t in e.proto.graph.initializer if t.name == name)
        array = onnx.numpy_helper.to_array(tensor).copy()
        e.store(tensor, change(array))

    return plant


def _first(change: Callable[[Any], Any]) -> Callable[[Array], Array]:
    def changed(array: Array) -> Array:
        flat = array.reshape(-1)
        flat[0] = change(flat[0])
        return array

    return changed


def _exchanged_matrices(e: Edit) -> None:
    """Two products have each other's matrix."""
    nodes = [n for n in e.proto.graph.node if n.op_type == "MatMulNBits"]
    shapes = [tuple(a.i for a in n.attribute if a.name in ("K", "N")) for n in nodes]
    first, second = next(
        (a, b) for i, a in enumerate(nodes) for j, b in enumerate(nodes) if i < j and shapes[i] == shapes[j]
    )
    for position in range(1, 4):
        first.input[position], second.input[position] = second.input[position], first.input[position]


def _claim(key: str, change: Callable[[Any], Any]) -> Callable[[Edit], None]:
    return lambda e: e.claim(key, change(e.claimed(key)))


def _embedding_row(e: Edit) -> None:
    name = next(t.name for t in e.proto.graph.initializer if "embed_tokens" in t.name)
    e.rewrite(name, lambda a: np.concatenate([a[:-1], a[:1]]))


def _section(section: Any) -> Callable[[Edit], None]:
    return lambda e: e.edit_json("config.json", lambda c: c.update({"transformers.js_config": section}))


KINDS: Final[tuple[Kind, ...]] = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "attention of several operators": (
            ("softmax over the queries", _OLD, _softmax_axis, ""),
            ("scores x 1.1", _OLD, _scores_through(lambda n, x: n("Mul", x, np.float32(1.1))), ""),
            (
                "scores clipped at 50",
                _OLD,
                _scores_through(lambda n, x: n("Clip", x, np.float32(-50), np.float32(50))),
                "",
            ),
            ("masked tokens have a score of -8", _OLD, _scores_through(lambda n, x: n("Max", x, np.float32(-8))), ""),
            ("the mask is turned round", _OLD, _mask_turned, ""),
            ("heads of keys in turn", _OLD, _heads_in_turn, ""),
            ("halves of a rotated head exchanged", _OLD, _halves_turned, ""),
            ("no half of a rotated head is negative", _OLD, _no_negative, ""),
            (
                "NaN of the scores is zero",
                _OLD,
                lambda e: e.splice(_scores(e).output[0], lambda n, x: n("Where", n("IsNaN", x), np.float32(0), x)),
                "no row is masked throughout",
            ),
        ),
        "further forms": (
            (
                "returned values x 1.01",
                ("llama decoder one row", "gpt2 static", "llama decoder fp16"),
                _present(1.01),
                "",
            ),
            (
                "every token has the last one's logits",
                (*_FIXED, "gpt2 static", "llama decoder fp16"),
                lambda e: e.splice("logits", _last_logits),
                "",
            ),
            ("the mask is reversed", (*_FIXED, "llama opset 18"), _reversed("attention_mask", 1), ""),
            ("slots stop at 60", _STATIC, _scatter(lambda n, x: n("Min", x, np.int64(60))), ""),
            ("slots one further", _STATIC, _scatter(lambda n, x: n("Add", x, np.int64(1))), ""),
            (
                "all rows have the cache of the first",
                (*_STATIC, "llama decoder fp16"),
                _first_row("past_key_values.0.key"),
                "",
            ),
            (
                "heads of the cache reversed",
                (*_STATIC, "llama decoder one row"),
                _reversed("past_key_values.0.value", 1),
                "",
            ),
            (
                "a cache of another kind is stated",
                ("llama web", "llama web int8"),
                _claim("cache", lambda c: "static"),
                "",
            ),
        ),
        "further quantised folders": (
            ("one packed byte", _QUANTISED, _blocks("Q", _first(lambda v: v ^ 0xF0)), ""),
            ("a scale x 1.2", _QUANTISED, _blocks("scales", _first(lambda v: v * 1.2)), ""),
            ("a zero point is one more", _QUANTISED, _blocks("zero_points", _first(lambda v: v + 1)), ""),
            ("two products have each other's matrix", _QUANTISED, _exchanged_matrices, ""),
            (
                "the block size is stated wrongly",
                _QUANTISED,
                _claim("quantization", lambda q: {**q, "block_size": 64}),
                "",
            ),
            ("the last token has the first one's embedding", _QUANTISED, _embedding_row, ""),
            ("weights that are not there", ("llama web int8",), _section({"dtype": "q4"}), ""),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
