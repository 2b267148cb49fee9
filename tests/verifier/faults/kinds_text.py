"""Faults of language models: positions, masks, attention and caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import DECODERS, GENAI, LLAMAS, Kind

__all__ = ["KINDS"]

_INT64: Final = onnx.TensorProto.INT64
_END: Final = np.array([2**31])


def _sizes(n: Nodes, name: str, axis: int) -> str:
    return n("Shape", name, start=axis, end=axis + 1)


# ---- masks ----


def _mask(change: Callable[[Edit, onnx.NodeProto], object]) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        change(e, e.node("LessOrEqual"))

    return plant


def _compare_with(op_type: str) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        e.node("LessOrEqual").op_type = op_type

    return plant


def _later_beyond(limit: int) -> Callable[[Edit], None]:
    """Tokens beyond the limit also see the next one."""

    def build(n: Nodes, query: str) -> str:
        late = n("Cast", n("Greater", query, np.int64(limit)), to=_INT64)
        return n("Add", query, late)

    return lambda e: e.splice_input(e.node("LessOrEqual"), 1, build)


def _window(width: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        node = e.node("LessOrEqual")
        key, query = node.input

        def build(n: Nodes, allowed: str) -> str:
            near = n("Less", n("Sub", query, key), np.int64(width))
            return n("And", allowed, near)

        e.splice(node.output[0], build)

    return plant


def _ones_mask(n: Nodes, mask: str) -> str:
    return n("Max", mask, np.int64(1))


def _ones_above(rows: int) -> Callable[[Nodes, str], str]:
    def build(n: Nodes, mask: str) -> str:
        many = n("Cast", n("Greater", _sizes(n, mask, 0), np.array([rows])), to=_INT64)
        return n("Max", mask, many)

    return build


def _first_row(name: str) -> Callable[[Edit], None]:
    """All rows have what the first one has."""

    def build(n: Nodes, value: str) -> str:
        first = n("Slice", value, np.array([0]), np.array([1]), np.array([0]))
        return n("Expand", first, n("Shape", value))

    return lambda e: e.splice(name, build)


def _reverse(name: str, axis: int) -> Callable[[Edit], None]:
    def build(n: Nodes, value: str) -> str:
        return n("Slice", value, np.array([-1]), np.array([-(2**31)]), np.array([axis]), np.array([-1]))

    return lambda e: e.splice(name, build)


def _sum_of_rows(n: Nodes, mask: str) -> str:
    """A token counts if it counts in any row."""
    most = n("ReduceMax", mask, np.array([0]), keepdims=1)
    return n("Expand", most, n("Shape", mask))


# ---- positions and rotary embedding ----


def _rotary(which: int) -> Callable[[Edit], onnx.NodeProto]:
    return lambda e: [n for n in e.proto.graph.node if n.op_type == "RotaryEmbedding"][which]


def _next_position(e: Edit) -> None:
    node = _rotary(0)(e)
    cosine = e.producer(node.input[1])
    nodes = Nodes(e)
    angle = nodes("Add", cosine.input[0], e.tensor("inv_freq").name)
    made = [nodes(op_type, angle) for op_type in ("Cos", "Sin")]
    e.insert(nodes.made, node)
    node.input[1], node.input[2] = made


def _without_rotation(which: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        node = _rotary(which)(e)
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]

    return plant


def _swap_tables(e: Edit) -> None:
    node = _rotary(1)(e)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def _tables_through(op_type: str, position: int, *numbers: Any) -> Callable[[Edit], None]:
    return lambda e: e.splice_input(_rotary(0)(e), position, lambda n, x: n(op_type, x, *numbers))


def _wpe_indices(build: Callable[[Nodes, str], str]) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        node = next(n for n in e.proto.graph.node if n.op_type == "Gather" and "wpe" in n.input[0])
        e.splice_input(node, 1, build)

    return plant


def _positions(build: Callable[[Nodes, str], str]) -> Callable[[Edit], None]:
    """The position ids go through more nodes; in a model without them, the indices of the position embedding."""

    def plant(e: Edit) -> None:
        if any(value.name == "position_ids" for value in e.proto.graph.input):
            e.splice("position_ids", build)
        elif e.family == "gpt2":
            _wpe_indices(build)(e)
        else:
            cast = e.producer(e.producer(e.producer(_rotary(0)(e).input[1]).input[0]).input[0])
            e.splice_input(cast, 0, build)

    return plant


def _int8(n: Nodes, value: str) -> str:
    return n("Cast", n("Cast", value, to=onnx.TensorProto.INT8), to=_INT64)


def _jump(n: Nodes, value: str) -> str:
    """Positions from 128 on are one more."""
    return n("Min", n("Add", value, n("Div", value, np.int64(128))), np.int64(159))


# ---- attention ----


def _attention(**attributes: Any) -> Callable[[Edit], None]:
    return lambda e: e.set(e.node("Attention"), **attributes)


def _swap_attention(first: int, second: int) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        node = e.node("Attention")
        node.input[first], node.input[second] = node.input[second], node.input[first]

    return plant


def _without_mask(e: Edit) -> None:
    e.node("Attention").input[3] = ""


def _soft_mask(weight: float) -> Callable[[Edit], None]:
    """Masked tokens have a score of -10 more, not of minus infinity."""

    def plant(e: Edit) -> None:
        e.splice_input(e.node("Attention"), 3, lambda n, x: n("Where", x, np.float32(0), np.float32(-weight)))

    return plant


# ---- caches ----


def _row_from(slot: int, factor: float, part: str = "0.value") -> Callable[[Edit], None]:
    def build(n: Nodes, cache: str) -> str:
        early = n("Slice", cache, np.array([0]), np.array([slot]), np.array([2]))
        late = n("Slice", cache, np.array([slot]), _END, np.array([2]))
        return n("Concat", early, n("Mul", late, np.float32(factor)), axis=2)

    return lambda e: e.splice(f"past_key_values.{part}", build)


def _through_cache(op_type: str, *numbers: Any, part: str = "0.value") -> Callable[[Edit], None]:
    return lambda e: e.splice(f"past_key_values.{part}", lambda n, x: n(op_type, x, *numbers))


def _through_fp16(name: str) -> Callable[[Edit], None]:
    return lambda e: e.splice(
        name, lambda n, x: n("Cast", n("Cast", x, to=onnx.TensorProto.FLOAT16), to=onnx.TensorProto.FLOAT)
    )


def _swap_presents(e: Edit) -> None:
    names = ("present.0.key", "present.0.value")
    nodes = [e.producer(name) for name in names]
    places = [list(node.output).index(name) for node, name in zip(nodes, names, strict=True)]
    nodes[0].output[places[0]], nodes[1].output[places[1]] = names[1], names[0]


def _old_cache(e: Edit) -> None:
    """What is returned is the old cache with the last row repeated."""
    node = e.producer("present.0.value")
    node.output[list(node.output).index("present.0.value")] = "planted.present"
    nodes = Nodes(e)
    kept = nodes("Slice", "planted.present", np.array([0]), np.array([-1]), np.array([2]))
    last = nodes("Slice", "planted.present", np.array([-2]), np.array([-1]), np.array([2]))
    first = nodes("Slice", "planted.present", np.array([0]), np.array([1]), np.array([2]))
    one = nodes("Concat", first, last, axis=2)
    row = nodes("Slice", one, np.array([-1]), _END, np.array([2]))
    joined = nodes("Concat", kept, row, axis=2)
    nodes.made.append(onnx.helper.make_node("Identity", [joined], ["present.0.value"], "planted.end"))
    e.proto.graph.node.extend(nodes.made)


def _scatter(build: Callable[[Nodes, str], str]) -> Callable[[Edit], None]:
    return lambda e: e.splice("cache/starts", build)


def _masked_slots(limit: int) -> Callable[[Edit], None]:
    """Attention sees no more than this number of slots."""
    return lambda e: e.splice("cache/totals", lambda n, x: n("Min", x, np.int64(limit)))


# ---- onnxruntime-genai ----


def _grouped(**attributes: Any) -> Callable[[Edit], None]:
    return lambda e: e.set(e.node("GroupQueryAttention"), **attributes)


def _lengths(build: Callable[[Nodes, str], str]) -> Callable[[Edit], None]:
    return lambda e: e.splice_input(e.node("GroupQueryAttention"), 5, build)


_WITH_MASK: Final = ("llama", "gpt2", "llama decoder", "llama int8")

KINDS: Final = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "masks": (
            ("tokens see the following ones", _WITH_MASK, _compare_with("GreaterOrEqual"), ""),
            ("tokens do not see themselves", ("llama", "gpt2"), _compare_with("Less"), ""),
            ("tokens see one more beyond 100", ("llama", "gpt2", "llama bf16"), _later_beyond(100), ""),
            ("tokens see one more beyond 150", ("llama", "gpt2"), _later_beyond(150), ""),
            ("a window of 64 tokens", _WITH_MASK, _window(64), ""),
            ("a window of 150 tokens", _WITH_MASK, _window(150), ""),
            ("padding is ignored", _WITH_MASK, lambda e: e.splice("attention_mask", _ones_mask), ""),
            ("padding is ignored above 3 rows", _WITH_MASK, lambda e: e.splice("attention_mask", _ones_above(3)), ""),
            ("padding is ignored above 20 rows", _WITH_MASK, lambda e: e.splice("attention_mask", _ones_above(20)), ""),
            ("all rows have the padding of the first", _WITH_MASK, _first_row("attention_mask"), ""),
            (
                "a token counts if it does in any row",
                _WITH_MASK,
                lambda e: e.splice("attention_mask", _sum_of_rows),
                "",
            ),
            ("the mask is reversed", _WITH_MASK, _reverse("attention_mask", 1), ""),
            (
                "the mask is inverted",
                _WITH_MASK,
                lambda e: e.splice("attention_mask", lambda n, x: n("Sub", np.int64(1), x)),
                "",
            ),
            ("attention without a mask", ("llama", "gpt2"), _without_mask, ""),
            ("masked tokens have a score of -8", ("llama", "gpt2"), _soft_mask(8.0), ""),
            (
                "masked tokens have a score of -100",
                ("llama", "gpt2"),
                _soft_mask(100.0),
                "",
            ),
        ),
        "positions": (
            ("queries are one position further", ("llama", "llama decoder", "llama static"), _next_position, ""),
            (
                "positions are one more",
                ("gpt2", "gpt2 decoder"),
                _positions(lambda n, x: n("Min", n("Add", x, np.int64(1)), np.int64(159))),
                "",
            ),
            (
                "positions stop at 100",
                ("llama decoder", "gpt2 decoder", "gpt2", "llama static"),
                _positions(lambda n, x: n("Min", x, np.int64(100))),
                "",
            ),
            (
                "positions stop at 150",
                ("llama decoder", "gpt2 decoder", "gpt2", "llama static"),
                _positions(lambda n, x: n("Min", x, np.int64(150))),
                "",
            ),
            (
                "positions start again at 128",
                ("llama decoder", "gpt2 decoder", "gpt2", "llama int8"),
                _positions(lambda n, x: n("Mod", x, np.int64(128))),
                "",
            ),
            (
                "positions from 100 on are one more",
                ("llama", "llama decoder", "llama static", "llama int8"),
                _positions(lambda n, x: n("Add", x, n("Div", x, np.int64(100)))),
                "",
            ),
            ("positions from 128 on are one more", ("llama decoder", "gpt2"), _positions(_jump), ""),
            ("positions in 8 bits", ("llama decoder", "gpt2", "gpt2 decoder"), _positions(_int8), ""),
            (
                "all rows have the positions of the first",
                ("llama decoder", "llama static", "gpt2 decoder"),
                _first_row("position_ids"),
                "",
            ),
            ("queries are not rotated", LLAMAS, _without_rotation(0), ""),
            ("keys are not rotated", LLAMAS, _without_rotation(1), ""),
            ("cosines and sines exchanged in a node", LLAMAS, _swap_tables, ""),
            ("sines with the other sign in a node", ("llama", "llama decoder"), _tables_through("Neg", 2), ""),
            ("pairs are interleaved", LLAMAS, lambda e: e.set(_rotary(0)(e), interleaved=1), ""),
            ("cosines x 1.02", ("llama", "llama decoder"), _tables_through("Mul", 1, np.float32(1.02)), ""),
        ),
        "attention": (
            ("scale of attention x 1.1", ("llama", "gpt2", "llama int8"), _attention(scale=0.275), ""),
            ("scale of another head size", ("llama", "gpt2"), _attention(scale=0.5), ""),
            ("scores are capped at 50", ("llama", "gpt2", "llama bf16"), _attention(softcap=50.0), ""),
            ("softmax computes in fp16", ("llama", "gpt2"), _attention(softmax_precision=onnx.TensorProto.FLOAT16), ""),
            ("queries and keys exchanged", ("gpt2", "llama static"), _swap_attention(0, 1), ""),
            ("keys and values exchanged", ("llama", "gpt2"), _swap_attention(1, 2), ""),
        ),
        "cache": (
            ("values from slot 60 doubled", (*DECODERS, "llama static"), _row_from(60, 2.0), ""),
            ("values from slot 150 x 1.01", (*DECODERS, "llama static"), _row_from(150, 1.01), ""),
            ("keys from slot 100 are zero", (*DECODERS, "llama static"), _row_from(100, 0.0, "0.key"), ""),
            ("cached values clipped at 6", DECODERS, _through_cache("Clip", np.float32(-6), np.float32(6)), ""),
            ("cached values clipped at 100", DECODERS, _through_cache("Clip", np.float32(-100), np.float32(100)), ""),
            (
                "cached keys clipped at 20",
                ("llama decoder",),
                _through_cache("Clip", np.float32(-20), np.float32(20), part="0.key"),
                "",
            ),
            ("all rows have the cache of the first", DECODERS, _first_row("past_key_values.0.key"), ""),
            ("heads of the cache reversed", DECODERS, _reverse("past_key_values.0.value", 1), ""),
            (
                "rows of the cache reversed",
                ("llama decoder", "gpt2 decoder"),
                _reverse("past_key_values.0.value", 2),
                "",
            ),
            ("the cache in fp16", ("llama decoder", "llama static"), _through_fp16("past_key_values.0.value"), ""),
            (
                "present keys and values exchanged",
                ("llama decoder", "gpt2 decoder", "llama static"),
                _swap_presents,
                "",
            ),
            ("the newest row is not returned", ("llama decoder", "gpt2 decoder"), _old_cache, ""),
            ("slots stop at 60", ("llama static",), _scatter(lambda n, x: n("Min", x, np.int64(60))), ""),
            ("slots start again at 128", ("llama static",), _scatter(lambda n, x: n("Mod", x, np.int64(128))), ""),
            ("slots one further", ("llama static",), _scatter(lambda n, x: n("Add", x, np.int64(1))), ""),
            ("slots in 8 bits", ("llama static",), _scatter(_int8), ""),
            ("attention sees 60 slots", ("llama static",), _masked_slots(60), ""),
            ("attention sees 150 slots", ("llama static",), _masked_slots(150), ""),
            (
                "all rows have the length of the first",
                ("llama static",),
                _first_row("cache/totals"),
                "the mask of the same node already excludes these slots",
            ),
        ),
        "onnxruntime-genai": (
            ("another scale", GENAI, _grouped(scale=0.2), ""),
            ("attention within 64 tokens", GENAI, _grouped(local_window_size=64), ""),
            ("attention within 150 tokens", GENAI, _grouped(local_window_size=150), ""),
            ("scores capped at 50", GENAI, _grouped(softcap=50.0), ""),
            ("keys are not rotated", GENAI, _grouped(do_rotary=0), ""),
            ("pairs are interleaved", GENAI, _grouped(rotary_interleaved=1), ""),
            ("softmax with one more term", GENAI, _grouped(smooth_softmax=1), ""),
            ("lengths one less", GENAI, _lengths(lambda n, x: n("Sub", x, np.int32(1))), ""),
            ("lengths stop at 60", GENAI, _lengths(lambda n, x: n("Min", x, np.int32(60))), ""),
            (
                "lengths of the first row",
                GENAI,
                _lengths(lambda n, x: n("Expand", n("Slice", x, np.array([0]), np.array([1])), n("Shape", x))),
                "rows of a batch have equal lengths: GroupQueryAttention takes no padding",
            ),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
