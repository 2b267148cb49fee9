"""Faults in values: limits, factors, activations, branches, batches, images, pooling and data types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import BATCHED, EVERY, IMAGES, TEXTS, VITS, Kind

__all__ = ["KINDS"]

_Build = Callable[[Nodes, str], str]

_IDS: Final = ("llama", "gpt2", "llama genai", "llama int8")
_ALL: Final = ("llama", "gpt2", "vit", "resnet", "llama genai", "llama int8")
_END: Final = np.array([2**31])


def _head(build: _Build) -> Callable[[Edit], None]:
    """Between the last norm and the head."""
    return lambda e: e.splice(e.head_input, build)


def _branch(build: _Build) -> Callable[[Edit], None]:
    """At the end of the last residual branch."""
    return lambda e: e.splice(e.branch, build)


def _input(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.model_input, build)


def _logits(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("logits", build)


def _clip(low: Any, high: Any) -> _Build:
    return lambda n, x: n("Clip", x, low, high)


def _mul(factor: float) -> _Build:
    return lambda n, x: n("Mul", x, np.float32(factor))


def _soft_clip(limit: float) -> _Build:
    return lambda n, x: n("Mul", n("Tanh", n("Div", x, np.float32(limit))), np.float32(limit))


def _min_with_range(n: Nodes, x: str) -> str:
    """Every feature has its own limit, and the limits have equal distances."""
    width = n.edit.values("lm_head" if n.edit.family == "llama" else "classifier").shape
    size = width[0] if n.edit.family == "llama" else width[-1]
    return n("Min", x, np.arange(100, 100 + size, dtype=np.float32))


def _image_limit_by_range(n: Nodes, x: str) -> str:
    size = 8 if n.edit.family == "vit" else 16
    return n("Min", x, np.arange(30, 30 + size, dtype=np.float32))


def _where_large(limit: float) -> _Build:
    def build(n: Nodes, x: str) -> str:
        return n("Where", n("Greater", n("Abs", x), np.float32(limit)), n("Mul", x, np.float32(0.5)), x)

    return build


def _through(kind: int) -> _Build:
    def build(n: Nodes, x: str) -> str:
        back = n.edit.float_type
        return n("Cast", n("Cast", x, to=kind), to=back)

    return build


def _steps(n: Nodes, x: str) -> str:
    return n("Div", n("Round", n("Mul", x, np.float32(4096))), np.float32(4096))


# ---- token ids ----


def _table(n: Nodes, ids: str) -> str:
    table = np.arange(256)
    table[[250, 251]] = table[[251, 250]]
    return n("Gather", table, ids)


def _pair_of_tokens(e: Edit) -> None:
    """A token is another one where the token before it is one of two: tables of booleans say which."""

    def build(n: Nodes, ids: str) -> str:
        first, second = np.zeros(256, bool), np.zeros(256, bool)
        first[[33, 77]], second[[45]] = True, True
        size = n("Shape", ids)
        before = n(
            "Slice",
            n("Concat", ids, ids, axis=1),
            np.array([0]),
            n("Slice", size, np.array([1]), np.array([2])),
            np.array([1]),
        )
        both = n("And", n("Gather", first, before), n("Gather", second, ids))
        return n("Where", both, before, ids)

    e.splice("input_ids", build)


def _token_at_its_position(e: Edit) -> None:
    """A token whose id is its position is another one. No number shows it."""

    def build(n: Nodes, ids: str) -> str:
        size = n("Squeeze", n("Slice", n("Shape", ids), np.array([1]), np.array([2])), np.array([0]))
        place = n("Range", np.int64(0), size, np.int64(1))
        zeros = n("Sub", ids, ids)
        return n("Where", n("Equal", ids, place), zeros, ids)

    e.splice("input_ids", build)


def _equal_neighbours(e: Edit) -> None:
    """A row whose tokens are all equal is changed."""

    def build(n: Nodes, ids: str) -> str:
        most, least = (n(op_type, ids, np.array([1]), keepdims=1) for op_type in ("ReduceMax", "ReduceMin"))
        return n("Where", n("Equal", most, least), n("Sub", ids, ids), ids)

    e.splice("input_ids", build)


# ---- branches ----


def _if(limit: int, axis: int, then: str, output: str = "logits") -> Callable[[Edit], None]:
    """From a size on, an output goes through another operator."""

    def plant(e: Edit) -> None:
        def build(n: Nodes, x: str) -> str:
            info = onnx.helper.make_empty_tensor_value_info
            above = n("Greater", n("Shape", e.model_input, start=axis, end=axis + 1), np.array([limit]))
            graphs = {
                name: onnx.helper.make_graph(
                    [onnx.helper.make_node(op_type, [x], [f"{name}.out"])], name, [], [info(f"{name}.out")]
                )
                for name, op_type in (("then_branch", then), ("else_branch", "Identity"))
            }
            return n("If", n("Squeeze", above), **graphs)

        e.splice(output, build)

    return plant


def _loop(e: Edit) -> None:
    """A loop that runs once for every 16 rows halves the output each time."""

    def build(n: Nodes, x: str) -> str:
        make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
        many = n("Div", n("Squeeze", n("Shape", e.model_input, start=0, end=1)), np.int64(16))
        body = onnx.helper.make_graph(
            [make("Identity", ["go"], ["on"]), make("Add", ["carried", "carried"], ["twice"])],
            "body",
            [
                info("step", onnx.TensorProto.INT64, []),
                info("go", onnx.TensorProto.BOOL, []),
                onnx.helper.make_tensor_value_info("carried", e.float_type, None),
            ],
            [info("on", onnx.TensorProto.BOOL, []), onnx.helper.make_tensor_value_info("twice", e.float_type, None)],
        )
        return n("Loop", many, "", x, body=body)

    e.splice("logits", build)


def _where_size(limit: int, axis: int, other: _Build) -> _Build:
    """From a size on, a value is another one, without a branch."""

    def build(n: Nodes, x: str) -> str:
        above = n("Greater", n("Shape", n.edit.model_input, start=axis, end=axis + 1), np.array([limit]))
        return n("Where", above, other(n, x), x)

    return build


def _nan(n: Nodes, x: str) -> str:
    return n.edit.constant(np.float32(np.nan))


def _rows_mixed(n: Nodes, x: str) -> str:
    """The mean over the batch is added, a little."""
    return n("Add", x, n("Mul", n("ReduceMean", x, np.array([0]), keepdims=1), np.float32(0.01)))


def _first_row_above(rows: int) -> _Build:
    def build(n: Nodes, x: str) -> str:
        first = n("Expand", n("Slice", x, np.array([0]), np.array([1]), np.array([0])), n("Shape", x))
        above = n("Greater", n("Shape", n.edit.model_input, start=0, end=1), np.array([rows]))
        return n("Where", above, first, x)

    return build


def _rows_reversed(n: Nodes, x: str) -> str:
    return n("Slice", x, np.array([-1]), np.array([-(2**31)]), np.array([0]), np.array([-1]))


def _more_rows_than_tokens(n: Nodes, x: str) -> str:
    """A comparison of two sizes: no number shows it."""
    rows, tokens = (n("Shape", n.edit.model_input, start=axis, end=axis + 1) for axis in (0, 1))
    return n("Where", n("Greater", rows, tokens), n("Neg", x), x)


# ---- activations and residuals ----


def _approximate_gelu(e: Edit) -> None:
    node = e.node("Gelu")
    e.set(node, approximate="tanh")


def _without_residual(e: Edit) -> None:
    name = e.branch
    node = e.producer(name)
    if node.op_type != "Add":  # otherwise it is the sum
        node = e.reader(name)
    while node.op_type in ("Reshape", "Cast", "Identity"):
        name = node.output[0]
        node = e.reader(name)
    if node.domain:  # a norm that adds it
        e.splice_input(node, list(node.input).index(name), lambda n, x: n("Sub", x, x))
        return
    assert node.op_type == "Add"
    # A sum has the branch first.
    kept = next((value for value in node.input if value != name), "") if name in node.input else node.input[1]
    node.op_type = "Identity"
    del node.input[:]
    node.input.append(kept)


def _activation(old: str, new: str, **attributes: Any) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        node = e.node(old)
        node.op_type = new
        del node.attribute[:]
        e.set(node, **attributes)

    return plant


def _random(n: Nodes, x: str) -> str:
    noise = n("RandomNormalLike", x, scale=1e-9)
    return n("Add", x, noise)


def _dropout(n: Nodes, x: str) -> str:
    return n("Dropout", x, np.float32(1e-7), np.array(True))


# ---- images ----


def _flip(axis: int) -> _Build:
    return lambda n, x: n("Slice", x, np.array([-1]), np.array([-(2**31)]), np.array([axis]), np.array([-1]))


def _transposed(n: Nodes, x: str) -> str:
    return n("Transpose", x, perm=[0, 1, 3, 2])


def _convolution(**attributes: Any) -> Callable[[Edit], None]:
    return lambda e: e.set(e.node("Conv"), **attributes)


def _other_token(e: Edit) -> None:
    """The head reads the token after the class token."""
    node = next(n for n in e.proto.graph.node if n.op_type == "Gather" and n.output[0].endswith("/rows"))
    name = node.input[1]
    array = e.values(name)
    e.store(e.tensor(name), array + 1)


def _class_token_last(e: Edit) -> None:
    node = next(n for n in e.proto.graph.node if n.op_type == "Concat" and n.output[0] == "cat")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _pool(e: Edit) -> None:
    node = e.node("ReduceMean", "relu")
    node.op_type = "ReduceMax"


def _pool_rows(e: Edit) -> None:
    """The mean leaves out the last column."""
    node = e.node("ReduceMean", "relu")
    e.splice_input(node, 0, lambda n, x: n("Slice", x, np.array([0]), np.array([-1]), np.array([3])))


def _max_pool(**attributes: Any) -> Callable[[Edit], None]:
    return lambda e: e.set(e.node("MaxPool"), **attributes)


def _no_max_pool(e: Edit) -> None:
    node = e.node("MaxPool")
    node.op_type = "AveragePool"
    kept = [a for a in node.attribute if a.name in ("kernel_shape", "strides", "pads")]
    del node.attribute[:]
    node.attribute.extend(kept)


def _batch_norm_epsilon(e: Edit) -> None:
    for node in (n for n in e.proto.graph.node if n.op_type in ("BatchNormalization",)):
        e.set(node, epsilon=1e-2)
        return
    names = [t.name for t in e.proto.graph.initializer if t.name.startswith("val_") and not t.dims]
    small = next(name for name in names if 0 < abs(float(e.values(name))) < 1e-3)
    e.rewrite(small, lambda a: a * np.asarray(100, a.dtype))


_CAST_FLOAT: Final = onnx.TensorProto.FLOAT16
_CAST_BF16: Final = onnx.TensorProto.BFLOAT16
_DOUBLE: Final = onnx.TensorProto.DOUBLE

KINDS: Final = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "limits": (
            ("images clipped at 6", IMAGES, _input(_clip(np.float32(-6), np.float32(6))), ""),
            ("images clipped at 40", IMAGES, _input(_clip(np.float32(-40), np.float32(40))), ""),
            (
                "images clipped at 200",
                ("vit", "resnet", "vit bf16"),
                _input(_clip(np.float32(-200), np.float32(200))),
                "",
            ),
            ("images clipped at 65504", ("vit", "resnet"), _input(_clip(np.float32(-65504), np.float32(65504))), ""),
            ("images squashed by a tangent at 4096", ("vit", "resnet"), _input(_soft_clip(4096.0)), ""),
            ("images with a limit for each column", ("vit", "resnet"), _input(_image_limit_by_range), ""),
            ("large values of images are halved", ("vit", "resnet"), _input(_where_large(500.0)), ""),
            (
                "the input of the head clipped at 40",
                ("llama", "gpt2", "vit", "resnet", "llama genai", "llama bf16"),
                _head(_clip(np.float32(-40), np.float32(40))),
                "",
            ),
            ("the input of the head with a limit for each feature", ("llama", "vit"), _head(_min_with_range), ""),
            ("large values before the head are halved", ("llama", "vit", "llama int8"), _head(_where_large(60.0)), ""),
            (
                "a residual branch clipped at 64",
                ("llama", "gpt2", "vit", "resnet", "llama genai"),
                _branch(_clip(np.float32(-64), np.float32(64))),
                "",
            ),
            ("logits capped by a tangent at 30", ("llama", "gpt2", "vit", "llama int8"), _logits(_soft_clip(30.0)), ""),
            ("logits capped by a tangent at 4096", ("llama", "llama genai"), _logits(_soft_clip(4096.0)), ""),
            (
                "logits capped by a tangent at 4096, beside tangents of the model",
                ("vit",),
                _logits(_soft_clip(4096.0)),
                "",
            ),
            ("the last ids clipped", _IDS, _input(_clip(np.int64(0), np.int64(254))), ""),
            ("ids modulo 250", _IDS, _input(lambda n, x: n("Mod", x, np.int64(250))), ""),
            ("ids of 7 bits", _IDS, _input(lambda n, x: n("BitwiseAnd", x, np.int64(127))), ""),
            (
                "ids of 8 bits",
                ("llama", "gpt2"),
                _input(lambda n, x: n("BitwiseAnd", x, np.int64(255))),
                "",
            ),
            ("ids remapped by a table", _IDS, _input(_table), ""),
            ("a token depends on the one before it", _IDS, _pair_of_tokens, ""),
            ("a token that is at its own position", _IDS, _token_at_its_position, ""),
            ("a row of equal tokens", _IDS, _equal_neighbours, ""),
        ),
        "branches": (
            ("logits negated beyond 100 tokens", TEXTS, _if(100, 1, "Neg"), ""),
            ("logits negated beyond 600 tokens", TEXTS, _if(600, 1, "Neg"), ""),
            ("logits negated beyond 50 rows", ("llama", "vit", "resnet"), _if(50, 0, "Neg"), ""),
            ("a loop for every 16 rows", ("llama", "vit", "resnet"), _loop, ""),
            ("NaN above 8 rows", ("llama", "gpt2", "vit", "resnet"), _logits(_where_size(8, 0, _nan)), ""),
            (
                "NaN above 64 rows",
                ("llama", "vit", "resnet", "llama decoder", "llama genai"),
                _logits(_where_size(64, 0, _nan)),
                "",
            ),
            ("zeros beyond 140 tokens", TEXTS, _logits(_where_size(140, 1, lambda n, x: n("Sub", x, x))), ""),
            (
                "rows have the result of the first above 20 rows",
                ("llama", "vit", "llama decoder"),
                _logits(_first_row_above(20)),
                "",
            ),
            ("negated where there are more rows than tokens", TEXTS, _logits(_more_rows_than_tokens), ""),
        ),
        "batches": (
            ("rows take part in each other", _ALL, _head(_rows_mixed), ""),
            ("rows are reversed", _ALL, _logits(_rows_reversed), ""),
        ),
        "arithmetic": (
            ("a residual branch x 1.02", EVERY, _branch(_mul(1.02)), ""),
            ("a residual branch x 1.002", ("llama", "gpt2", "vit", "resnet", "vit fp16"), _branch(_mul(1.002)), ""),
            ("a residual branch is left out", EVERY, _without_residual, ""),
            ("a residual branch with the other sign", EVERY, _branch(lambda n, x: n("Neg", x)), ""),
            ("the input of the head x 1.001", ("llama", "gpt2", "vit", "resnet", "llama fp16"), _head(_mul(1.001)), ""),
            ("logits x 1.0001", ("llama", "gpt2", "vit", "resnet"), _logits(_mul(1.0001)), ""),
            (
                "log-softmax of the logits",
                ("llama", "gpt2", "vit"),
                _logits(lambda n, x: n("LogSoftmax", x, axis=-1)),
                "",
            ),
            ("tanh GELU for erf", ("vit", "vit fp16", "vit bf16", "vit inlined"), _approximate_gelu, ""),
            (
                "another slope of SiLU",
                ("llama", "llama bf16", "llama int8"),
                lambda e: e.splice_input(e.node("Sigmoid"), 0, _mul(1.702)),
                "",
            ),
            ("HardSigmoid for Sigmoid", ("llama", "llama fp16"), _activation("Sigmoid", "HardSigmoid"), ""),
            ("a leak of 1e-3 in Relu", ("resnet", "resnet batch"), _activation("Relu", "LeakyRelu", alpha=1e-3), ""),
            (
                "Relu that stops at 6",
                ("resnet", "resnet axes", "resnet batch"),
                lambda e: e.splice(e.node("Relu").output[0], _clip(np.float32(0), np.float32(6))),
                "",
            ),
            ("softmax over another axis", VITS, lambda e: e.set(e.node("Softmax"), axis=-2), ""),
            ("softmax in fp16", ("vit",), lambda e: e.splice(e.node("Softmax").output[0], _through(_CAST_FLOAT)), ""),
            ("noise of 1e-9", ("llama", "vit", "resnet"), _branch(_random), ""),
            ("dropout of 1e-7", ("llama", "vit", "resnet"), _branch(_dropout), ""),
            ("epsilon of BatchNormalization", BATCHED, _batch_norm_epsilon, ""),
        ),
        "data types": (
            (
                "hidden values through fp16",
                ("llama", "gpt2", "vit", "resnet", "llama genai"),
                _head(_through(_CAST_FLOAT)),
                "",
            ),
            ("hidden values through bf16", ("llama", "vit", "resnet", "vit fp16"), _head(_through(_CAST_BF16)), ""),
            (
                "hidden values through double",
                ("llama", "vit", "resnet"),
                _head(_through(_DOUBLE)),
                "the result is the same",
            ),
            ("hidden values in steps of 1/4096", ("llama", "vit", "resnet", "vit bf16"), _head(_steps), ""),
            ("images through fp16", ("vit", "resnet"), _input(_through(_CAST_FLOAT)), ""),
            ("images through bytes", ("vit", "resnet"), _input(_through(onnx.TensorProto.INT8)), ""),
            (
                "ids in 8 bits with a sign",
                _IDS,
                _input(lambda n, x: n("Cast", n("Cast", x, to=onnx.TensorProto.INT8), to=onnx.TensorProto.INT64)),
                "",
            ),
            (
                "ids in 32 bits",
                ("llama", "gpt2"),
                _input(lambda n, x: n("Cast", n("Cast", x, to=onnx.TensorProto.INT32), to=onnx.TensorProto.INT64)),
                "every legal id has 32 bits",
            ),
            (
                "logits declared double",
                ("llama", "vit"),
                lambda e: (
                    _logits(lambda n, x: n("Cast", x, to=_DOUBLE))(e),
                    setattr(e.proto.graph.output[0].type.tensor_type, "elem_type", _DOUBLE),
                ),
                "",
            ),
            (
                "logits declared float, computed half",
                ("llama fp16", "vit fp16"),
                lambda e: setattr(e.proto.graph.output[0].type.tensor_type, "elem_type", onnx.TensorProto.FLOAT),
                "",
            ),
        ),
        "images": (
            ("columns reversed", IMAGES, _input(_flip(3)), ""),
            ("colours reversed", IMAGES, _input(_flip(1)), ""),
            ("rows and columns exchanged", IMAGES, _input(_transposed), ""),
            ("padding of the first convolution", ("resnet", "resnet batch"), _convolution(pads=[2, 2, 4, 4]), ""),
            ("another token than the class token", ("vit", "vit bf16"), _other_token, ""),
            ("the class token at the end", ("vit",), _class_token_last, ""),
            ("the largest value for the mean", ("resnet", "resnet axes", "resnet batch"), _pool, ""),
            ("a mean without the last column", ("resnet", "resnet batch"), _pool_rows, ""),
            ("the mean for the largest value", ("resnet", "resnet batch"), _no_max_pool, ""),
            ("padding of a pool", ("resnet", "resnet batch"), _max_pool(pads=[0, 0, 2, 2]), ""),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
