"""Faults where one check stopped looking: equal values by another way, steps without a division, nodes without readers.

Each does with other operators what a fault of another module does, so that no operator, number or comparison shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import Kind
from tests.verifier.faults.kinds_rare import seen_for

__all__ = ["KINDS"]

_Build = Callable[[Nodes, str], str]

_BOOL: Final = onnx.TensorProto.BOOL
_FLOAT: Final = onnx.TensorProto.FLOAT
_INT64: Final = onnx.TensorProto.INT64
_LAST: Final = np.array([2**31 - 1])

#: The mask of a row that has one fault: longer than the patterns that are run.
_PATTERN: Final = (0, 1, 0, 1, 1, 0, 1, 0)


def _logits(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("logits", build)


def _head(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.head_input, build)


def _branch(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.branch, build)


def _mask(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("attention_mask", build)


def _first(build: _Build) -> Callable[[Edit], None]:
    """After the first convolution of an image."""
    return lambda e: e.splice(e.node("Conv").output[0], build)


def _last(op_type: str, build: _Build) -> Callable[[Edit], None]:
    """After the last node of a type."""
    return lambda e: e.splice([n for n in e.proto.graph.node if n.op_type == op_type][-1].output[0], build)


def _rows(n: Nodes) -> str:
    return n("Shape", n.edit.model_input, start=0, end=1)


def _numbers(n: Nodes) -> str:
    return n("Range", np.int64(0), n("Squeeze", _rows(n)), np.int64(1))


# ---- integers and masks by other operators ----


def _own_number(n: Nodes, ids: str) -> str:
    """Ids from a table of all ids, after which a token at its own position is another one."""
    own = n("Gather", np.arange(256), ids)
    place = n("Range", np.int64(0), n("Squeeze", n("Shape", own, start=1, end=2)), np.int64(1))
    return n("Where", n("Equal", own, place), n("Sub", own, own), own)


def _tokens_of_pattern(n: Nodes, mask: str) -> list[str]:
    """Whether each of the first tokens is masked as in the pattern, as 0 or 1; it starts again in a short row."""
    seen = n("Tile", mask, np.array([1, 8]))
    tokens = [n("Gather", seen, np.array([place]), axis=1) for place in range(len(_PATTERN))]
    return [
        n("Cast", n("Equal", token, np.int64(wanted)), to=_INT64)
        for token, wanted in zip(tokens, _PATTERN, strict=True)
    ]


def _by_product(n: Nodes, mask: str) -> str:
    """Padding is ignored in rows of the pattern, by products and a sum."""
    first, *others = _tokens_of_pattern(n, mask)
    for token in others:
        first = n("Mul", first, token)
    return n("Add", mask, n("Mul", first, n("Cast", n("Equal", mask, np.int64(0)), to=_INT64)))


def _by_comparison(n: Nodes, mask: str) -> str:
    """The same by comparisons: 1 > 1 - token."""
    first, *others = _tokens_of_pattern(n, mask)
    for token in others:
        none = n("Cast", n("Equal", token, np.int64(0)), to=_INT64)
        first = n("Cast", n("Greater", first, none), to=_INT64)
    return n("Where", n("Cast", first, to=_BOOL), n("Expand", np.array([1]), n("Shape", mask)), mask)


def _counted_by_indices(n: Nodes, x: str) -> str:
    """Late tokens are negated where a batch has fewer than a quarter of the tokens of a row: NonZero counts them."""
    count = n("Shape", n("NonZero", "attention_mask"), start=1, end=2)
    for _ in range(2):
        count = n("Add", count, count)
    early = n("Slice", x, np.array([0]), count, np.array([1]))
    late = n("Slice", x, count, _LAST, np.array([1]))
    return n("Concat", early, n("Neg", late), axis=1)


def _few_tokens(n: Nodes, x: str) -> str:
    """A row is negated whose length is the square of four times its tokens."""
    seen = n("Cast", "attention_mask", to=_FLOAT)
    root = n("ReduceLogSumExp", n("ReduceL2", seen, np.array([1]), keepdims=1), np.array([1]), keepdims=1)
    root = n("Add", n("Add", root, root), n("Add", root, root))
    length = n("Sqrt", n("Cast", n("Shape", "attention_mask", start=1, end=2), to=_FLOAT))
    hit = n("Cast", n("Equal", root, length), to=n.edit.float_type)
    return n("Sub", x, n("Mul", n("Add", x, x), n("Unsqueeze", hit, np.array([2]))))


# ---- zeros ----


def _one_for_zero(n: Nodes, x: str) -> str:
    """A value of exactly zero, as in a black image, is one."""
    return n("Add", x, n("Cast", n("Not", n("Cast", x, to=_BOOL)), to=n.edit.float_type))


def _counted_values(n: Nodes, x: str) -> str:
    """As many channels stay as an image has values that are not zero; one is added to the others."""
    count = n("Shape", n("NonZero", x), start=1, end=2)
    early = n("Slice", x, np.array([0]), count, np.array([1]))
    late = n("Slice", x, count, _LAST, np.array([1]))
    return n("Concat", early, n("Add", late, np.float32(1)), axis=1)


# ---- overflow ----


def _factors(op_type: str, *numbers: np.float32, size: int = 1) -> _Build:
    """36 factors of 6 and their inverses, with a node after each that changes nothing."""

    def build(n: Nodes, x: str) -> str:
        six = np.full((size, 1, 1) if size > 1 else (), 6, np.float32)
        for kind in ("Mul", "Div"):
            for _ in range(36):
                x = n(op_type, n(kind, x, six), *numbers, **({"axis": 0} if op_type == "Concat" else {}))
        return x

    return build


def _doubled(build: _Build) -> _Build:
    """Doubled 110 times and halved as often, with a copy of the value."""

    def doubled(n: Nodes, x: str) -> str:
        for _ in range(110):
            x = n("Add", x, build(n, x))
        for _ in range(110):
            x = build(n, n("Mul", x, np.float32(0.5)))
        return x

    return doubled


def _turned(n: Nodes, x: str) -> str:
    return n("Transpose", n("Transpose", x, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])


def _minus_negative(n: Nodes, x: str) -> str:
    """x - (0 - x), and halves."""
    for _ in range(110):
        x = n("Sub", x, n("Sub", np.float32(0), x))
    for _ in range(110):
        x = n("Sub", n("Mul", x, np.float32(0.5)), np.float32(0))
    return x


def _equal_powers(n: Nodes, x: str) -> str:
    """A high power less the same power, each computed by itself: NaN where it overflows."""
    one, other = (n("Mul", x, n("Add", x, np.float32(1))) for _ in range(2))
    for _ in range(5):
        one, other = n("Mul", one, other), n("Mul", other, one)
    return n("Add", x, n("Sub", one, other))


def _around_convolution(e: Edit) -> None:
    """Times 4 before the second convolution, and over 4 after it."""
    node = [n for n in e.proto.graph.node if n.op_type == "Conv"][1]
    e.splice_input(node, 0, lambda n, x: n("Mul", x, np.float32(4)))
    e.splice(node.output[0], lambda n, x: n("Mul", x, np.float32(0.25)))


def _pool_by_power(op_type: str) -> _Build:
    """A pool of one value, by its eighth power: zero for small values, infinite for large ones."""

    def build(n: Nodes, x: str) -> str:
        if op_type == "LpPool":
            return n("LpPool", x, kernel_shape=[1, 1], p=8)
        return n("Reshape", n("GlobalLpPool", n("Reshape", x, np.array([1, -1, 1])), p=8), n("Shape", x))

    return build


def _power_times_zeros(product: Callable[[Nodes, str, int], str]) -> _Build:
    """A power and a product with zeros, which is NaN where the power is infinite."""

    def build(n: Nodes, x: str) -> str:
        width = n.edit.values("ln_f.weight").shape[0]
        power = n("Pow", n("Pow", x, np.float32(3)), np.float32(3))
        return n("Add", x, product(n, power, width))

    return build


def _zero_matrix(n: Nodes, x: str, width: int) -> str:
    return n("MatMul", x, np.zeros((width, width), np.float32))


def _zero_sum(n: Nodes, x: str, width: int) -> str:
    return n("Einsum", x, np.float32(0), equation="...,->...")


# ---- written-out norms ----


def _tangent(n: Nodes, x: str) -> str:
    share = np.float32(2.0**-10)
    return n("Div", n("Tanh", n("Mul", x, share)), share)


def _parts(n: Nodes, x: str) -> str:
    """The positive part less the negative one."""
    return n("Sub", n("Max", x, np.float32(0)), n("Max", n("Neg", x), np.float32(0)))


# ---- sizes ----


def _start_again(op_type: str, size: int) -> _Build:
    """Row numbers that start again, by a factor and a conversion that cuts off digits."""

    def build(n: Nodes, x: str) -> str:
        numbers = _numbers(n)
        share = n("Mul", n("Cast", numbers, to=_FLOAT), n.edit.constant(np.float32(1 / size)))
        whole = n("Cast", n("Floor", share) if op_type else share, to=_INT64)
        return n("Gather", x, n("Sub", numbers, n("Mul", whole, np.int64(size))), axis=0)

    return build


def _more_rows(n: Nodes, x: str) -> str:
    """Twice as many rows from 64 on."""
    share = n("Mul", n("Cast", _rows(n), to=_FLOAT), n.edit.constant(np.float32(1 / 64)))
    often = n("Add", n("Cast", share, to=_INT64), np.array([1]))
    return n("Tile", x, n("Concat", often, np.array([1, 1]), axis=0))


def _lost_digits(e: Edit) -> None:
    """Positions lose digits in a large batch: a multiple of the number of rows is added and taken off."""
    rotary = e.node("RotaryEmbedding")
    cast = e.producer(e.producer(e.producer(rotary.input[1]).input[0]).input[0])

    def build(n: Nodes, positions: str) -> str:
        rows = n("Squeeze", _rows(n))
        for _ in range(6):
            rows = n("Mul", rows, np.int64(8))
        return n("Sub", n("Cast", n("Add", positions, rows), to=_FLOAT), n("Cast", rows, to=_FLOAT))

    e.splice_input(cast, 0, build)


def _table_of_64(n: Nodes, x: str) -> str:
    """A shape that is looked up in a table of 64 zeros, so that 65 rows fail."""
    nothing = n("Gather", np.zeros(64, np.int64), n("Sub", _rows(n), np.array([1])))
    return n("Reshape", x, n("Add", n("Shape", x), nothing))


# ---- nodes that nothing reads ----


def _idle(build: Callable[[Nodes], object]) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        nodes = Nodes(e)
        build(nodes)
        e.insert(nodes.made, e.proto.graph.node[0])

    return plant


def _idle_table(n: Nodes) -> None:
    n("Gather", np.arange(64), n("Sub", _rows(n), np.array([1])))


def _idle_loop(n: Nodes) -> None:
    """A loop that runs as often as the square of the rows of a batch."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    rows = n("Squeeze", _rows(n))
    many = n("Mul", rows, rows)
    body = onnx.helper.make_graph(
        [make("Identity", ["go"], ["on"]), make("Add", ["carried", "carried"], ["twice"])],
        "body",
        [info("step", _INT64, []), info("go", _BOOL, []), info("carried", _FLOAT, [])],
        [info("on", _BOOL, []), info("twice", _FLOAT, [])],
    )
    n("Loop", many, "", np.float32(1), body=body)


# ---- other places ----


def _smallest_of_fp16(e: Edit) -> None:
    """The score of a masked token is the smallest number of fp16, in a file of fp32."""
    single = [t for t in e.proto.graph.initializer if t.data_type == _FLOAT and len(t.dims) == 0]
    lowest = next(t for t in single if onnx.numpy_helper.to_array(t) < -1e30)
    e.store(lowest, np.full((), -65504, np.float32))


def _two_offsets(e: Edit) -> None:
    """A weight in a file of its own, with two offsets."""
    tensor = e.tensor(e.matrix())
    raw = e.values(e.matrix()).tobytes()
    (e.folder / "weights.bin").write_bytes(raw + bytes(len(raw)))
    made = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    made.data_location = onnx.TensorProto.EXTERNAL
    size = str(len(raw))
    for key, value in (("location", "weights.bin"), ("offset", size), ("length", size), ("offset", "0")):
        made.external_data.add(key=key, value=value)
    tensor.CopyFrom(made)


_DEEP: Final = ("resnet", "vit")

KINDS: Final[tuple[Kind, ...]] = tuple(
    Kind(name, forms, plant, group=group)
    for group, kinds in {
        "masks by other operators": (
            ("ids from a table of ids", ("llama", "gpt2"), lambda e: e.splice("input_ids", _own_number)),
            ("padding is ignored for a pattern, by products", ("llama", "gpt2", "llama decoder"), _mask(_by_product)),
            ("padding is ignored for a pattern, by comparisons", ("llama", "gpt2"), _mask(_by_comparison)),
            (
                "padding is ignored for a pattern of six, with a cache",
                ("llama decoder", "llama int8", "llama static", "gpt2 decoder"),
                _mask(seen_for(0, 1, 0, 1, 1, 0)),
            ),
            ("tokens that indices count", ("llama", "gpt2"), _logits(_counted_by_indices)),
            ("tokens that a norm of the mask counts", ("llama",), _logits(_few_tokens)),
        ),
        "zeros": (
            ("zero becomes one, by a conversion", ("resnet", "vit"), _first(_one_for_zero)),
            ("zero becomes one before the head", ("llama", "gpt2"), _head(_one_for_zero)),
            ("values that indices count", ("resnet",), _last("Relu", _counted_values)),
        ),
        "overflow by other operators": (
            ("factors of six, with zeros added between", _DEEP, _first(_factors("Add", np.float32(0)))),
            ("factors of six, with zeros taken off between", _DEEP, _first(_factors("Sub", np.float32(0)))),
            ("factors of six, with sums of one between", _DEEP, _first(_factors("Sum"))),
            ("factors of six, with means of one between", _DEEP, _first(_factors("Mean"))),
            ("factors of six, joined with nothing between", _DEEP, _first(_factors("Concat"))),
            ("factors of six for each channel", ("resnet",), _first(_factors("Identity", size=8))),
            ("doubled with a sum of one", _DEEP, _first(_doubled(lambda n, x: n("Sum", x)))),
            ("doubled with a copy that was turned twice", _DEEP, _first(_doubled(_turned))),
            ("doubled with the negative", ("llama decoder",), _last("Attention", _minus_negative)),
            ("a power less its equal", ("llama decoder",), _head(_equal_powers)),
            ("times 4 and over 4 around a convolution", ("resnet batch fp16", "resnet batch"), _around_convolution),
            ("a pool of one value by a power", ("resnet",), _last("Relu", _pool_by_power("LpPool"))),
            ("a global pool of one value by a power", ("resnet",), _last("Relu", _pool_by_power("GlobalLpPool"))),
            ("a power times a matrix of zeros", ("gpt2",), _head(_power_times_zeros(_zero_matrix))),
            ("a power times zero, by Einsum", ("gpt2",), _head(_power_times_zeros(_zero_sum))),
        ),
        "beside norms that are written out": (
            (
                "a branch through a tangent, beside written-out norms",
                ("vit inlined", "resnet batch"),
                _branch(_tangent),
            ),
            ("the positive part less the negative, by Max", ("vit inlined",), _branch(_parts)),
        ),
        "sizes in steps": (
            ("row numbers start again, by a conversion", ("llama",), _logits(_start_again("", 64))),
            ("row numbers start again, by Floor", ("llama",), _logits(_start_again("Floor", 64))),
            ("twice the rows, by a conversion", ("llama",), _logits(_more_rows)),
            ("positions lose digits in a large batch", ("llama",), _lost_digits),
            ("a shape from a table of 64", ("llama", "vit"), _logits(_table_of_64)),
        ),
        "nodes that nothing reads": (
            ("an idle table of 64 rows", ("llama", "vit"), _idle(_idle_table)),
            ("an idle loop", ("resnet",), _idle(_idle_loop)),
        ),
        "other places": (
            ("masked tokens have the smallest score of fp16", ("llama opset 18",), _smallest_of_fp16),
            ("a weight with two offsets", ("vit", "llama"), _two_offsets),
        ),
    }.items()
    for name, forms, plant in kinds
)
