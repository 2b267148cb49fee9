"""Faults in weights, tables and quantised blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from tests.verifier.faults.edit import Array, Edit
from tests.verifier.faults.kind import BATCHED, EVERY, GENAI, HALF, QUANTISED, Kind

__all__ = ["KINDS"]

_Change = Callable[[Array], Array]

_MANY: Final = ("llama", "gpt2", "vit", "resnet", "resnet batch fp16", "vit bf16", "llama genai", "vit inlined")


def _changed(change: _Change) -> Callable[[Edit], None]:
    return lambda e: e.rewrite(e.matrix(), change)


def _at(part: str, change: _Change) -> Callable[[Edit], None]:
    return lambda e: e.rewrite(part, change)


def _set(index: Any, value: Any) -> _Change:
    def change(array: Array) -> Array:
        array[index] = value(array) if callable(value) else value
        return array

    return change


def _flat(change: Callable[[Array], None]) -> _Change:
    def apply(array: Array) -> Array:
        change(array.reshape(-1))
        return array

    return apply


def _flip_smallest(flat: Array) -> None:
    flat[np.abs(flat).argmin()] *= -1


def _next_number(flat: Array) -> None:
    flat[0] = np.nextafter(flat[0], flat.dtype.type(np.inf))


def _truncate(array: Array) -> Array:
    result: Array = (np.ascontiguousarray(array).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return result


def _swap_rows(array: Array) -> Array:
    array[[1, 2]] = array[[2, 1]]
    return array


def _use_copy(part: str, change: _Change) -> Callable[[Edit], None]:
    """The weight stays, and a changed copy without its name is used."""

    def plant(e: Edit) -> None:
        tensor = e.tensor(part)
        made = onnx.TensorProto()
        made.CopyFrom(tensor)
        made.name = e.new_name("copy")
        e.store(made, change(e.values(part)))
        node = e.reader(tensor.name)
        e.proto.graph.initializer.append(made)
        node.input[list(node.input).index(tensor.name)] = made.name

    return plant


def _through(op_type: str, *numbers: float) -> Callable[[Edit], None]:
    """A weight goes through one more node."""

    def plant(e: Edit) -> None:
        node = e.reader(e.matrix())
        position = next(i for i, name in enumerate(node.input) if e.matrix() in name)
        e.splice_input(node, position, lambda n, x: n(op_type, x, *(np.float32(v) for v in numbers)))

    return plant


def _through_half(e: Edit) -> None:
    node = e.reader(e.matrix())
    position = next(i for i, name in enumerate(node.input) if e.matrix() in name)
    e.splice_input(
        node,
        position,
        lambda n, x: n("Cast", n("Cast", x, to=onnx.TensorProto.FLOAT16), to=onnx.TensorProto.FLOAT),
    )


def _from_branch(e: Edit) -> None:
    """A weight is the result of a branch that doubles it for long inputs."""
    node = e.reader(e.matrix())
    position = next(i for i, name in enumerate(node.input) if e.matrix() in name)
    weight = node.input[position]
    info = onnx.helper.make_empty_tensor_value_info

    def build(n: Any, _: str) -> str:
        right = onnx.helper.make_node("Identity", [weight], ["right.out"])
        twice = onnx.helper.make_node("Add", [weight, weight], ["twice.out"])
        size = n("Shape", e.model_input, start=0, end=1)
        many = n("Greater", size, np.array([40]))
        return str(
            n(
                "If",
                many,
                then_branch=onnx.helper.make_graph([twice], "twice", [], [info("twice.out")]),
                else_branch=onnx.helper.make_graph([right], "right", [], [info("right.out")]),
            )
        )

    e.splice_input(node, position, build)


def _sparse(e: Edit) -> None:
    values = onnx.numpy_helper.from_array(np.float32([1e-3]), "planted.sparse")
    width = e.values("norm" if e.family != "gpt2" else "ln_f.weight").shape[-1]
    indices = onnx.numpy_helper.from_array(np.int64([5]))
    e.proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [width]))
    e.splice(e.head_input, lambda n, x: n("Add", x, "planted.sparse"))


def _swap_inputs(first: str, second: str) -> Callable[[Edit], None]:
    """Two nodes read each other's weight."""

    def plant(e: Edit) -> None:
        nodes = [e.reader(part) for part in (first, second)]
        places = [next(i for i, x in enumerate(n.input) if p in x) for n, p in zip(nodes, (first, second), strict=True)]
        names = [n.input[i] for n, i in zip(nodes, places, strict=True)]
        nodes[0].input[places[0]], nodes[1].input[places[1]] = names[1], names[0]

    return plant


def _without_bias(e: Edit) -> None:
    part = {"gpt2": "mlp.c_fc.bias", "vit": "fc1.bias"}[e.family]
    node = e.reader(part)
    if node.op_type == "Gemm":
        del node.input[2]
        return
    kept = next(name for name in node.input if part not in name)
    node.op_type = "Identity"
    del node.input[:]
    node.input.append(kept)


def _bias_twice(e: Edit) -> None:
    part = {"gpt2": "mlp.c_fc.bias", "vit": "fc1.bias"}[e.family]
    node = e.reader(part)
    bias = next(name for name in node.input if part in name)
    e.splice(node.output[0], lambda n, x: n("Add", x, bias))


def _duplicate(e: Edit) -> None:
    tensor = e.tensor(e.matrix())
    again = e.proto.graph.initializer.add()
    again.CopyFrom(tensor)
    e.store(again, e.values(e.matrix()) * 2)


def _untie(e: Edit) -> None:
    """The head of a tied model has other values than the embedding."""
    e.rewrite("lm_head.weight.T", _set((5, 7), lambda a: a[5, 7] + 1e-2))


def _short_weight(e: Edit) -> None:
    e.rewrite("embed_tokens.weight" if e.family == "llama" else "wpe.weight", lambda a: a[:-1])


_STATISTICS: Final = "stages.1.layers.0.layer.0.normalization."

_PLAIN: Final = (
    Kind("the sign of one weight", EVERY[:-1], _changed(_flat(_flip_smallest))),
    Kind("the last bit of one weight", ("llama", "vit", "resnet"), _changed(_flat(_next_number))),
    Kind("one value of a matrix is zero", _MANY, _changed(_flat(lambda a: a.__setitem__(slice(3, 4), 0)))),
    Kind("two rows of a matrix are exchanged", _MANY, _changed(_swap_rows)),
    Kind(
        "a matrix is scaled by 1.001",
        ("llama", "gpt2", "vit", "resnet", "llama genai"),
        _changed(lambda a: a * a.dtype.type(1.001)),
    ),
    Kind("a matrix of zeros", _MANY, _changed(np.zeros_like)),
    Kind("NaN in a matrix", ("llama", "vit", "resnet"), _changed(_flat(lambda a: a.__setitem__(slice(0, 1), np.nan)))),
    Kind(
        "infinity in the embedding of one token",
        ("llama", "llama genai", "llama int8"),
        _at("embed_tokens", _set((-1, 0), np.inf)),
    ),
    Kind("weights truncated to bf16", ("llama", "gpt2", "vit", "resnet"), _changed(_truncate)),
    Kind(
        "weights rounded to fp16",
        ("llama", "gpt2", "vit", "resnet"),
        _changed(lambda a: a.astype(np.float16).astype(np.float32)),
    ),
    Kind(
        "a transposed square matrix",
        ("llama", "gpt2", "vit"),
        lambda e: e.rewrite(
            {"llama": "q_proj.weight", "gpt2": "attn.c_proj.weight", "vit": "q_proj.weight"}[e.family], lambda a: a.T
        ),
    ),
    Kind(
        "heads are exchanged",
        ("llama", "vit", "llama fp16"),
        lambda e: e.rewrite(
            "self_attn.q_proj.weight" if e.family == "llama" else "attention.q_proj.weight",
            lambda a: np.concatenate(
                [a[:, a.shape[1] // 4 : a.shape[1] // 2], a[:, : a.shape[1] // 4], a[:, a.shape[1] // 2 :]], 1
            ),
        ),
    ),
    Kind(
        "matrices of queries and outputs exchanged",
        ("llama", "vit"),
        lambda e: e.swap("q_proj.weight", "o_proj.weight"),
    ),
    Kind(
        "gate and up are connected to each other's weight",
        ("llama", "llama int8", "llama genai"),
        _swap_inputs("gate_proj", "up_proj"),
    ),
    Kind(
        "keys and values have each other's weight",
        ("llama", "vit", "llama decoder"),
        _swap_inputs("k_proj.weight", "v_proj.weight"),
    ),
    Kind(
        "a changed copy of a weight is used",
        ("llama", "gpt2", "vit", "resnet", "llama genai"),
        lambda e: _use_copy(e.matrix(), _flat(lambda a: a.__setitem__(slice(1, 2), a[1:2] + 1e-3)))(e),
    ),
    Kind(
        "a right copy of a weight, without its name",
        ("llama", "vit"),
        lambda e: _use_copy(e.matrix(), lambda a: a)(e),
        cannot="the file is right: it computes the same with the same weights",
    ),
    Kind(
        "a changed copy of the embedding is used",
        ("llama", "llama genai", "llama int8"),
        _use_copy("embed_tokens", _set((200, 3), lambda a: a[200, 3] + 1e-3)),
    ),
    Kind("a weight goes through Mul 1.01", ("llama", "gpt2", "vit", "resnet"), _through("Mul", 1.01)),
    Kind("a weight goes through Add 1e-4", ("llama", "gpt2", "vit", "resnet"), _through("Add", 1e-4)),
    Kind("a weight goes through Clip", ("llama", "gpt2", "vit", "resnet"), _through("Clip", -0.03, 0.03)),
    Kind("a weight goes through fp16 and back", ("llama", "gpt2", "vit", "resnet"), _through_half),
    Kind("a weight is doubled in a branch", ("llama", "vit"), _from_branch),
    Kind("a sparse vector is added", ("llama", "vit"), _sparse),
    Kind("two constants have one name", ("llama", "vit"), _duplicate),
    Kind(
        "the row of the last token is another one",
        ("llama", "llama genai", "llama int8"),
        _at("embed_tokens", _set(-1, lambda a: a[-2])),
    ),
    Kind("an embedding that ends one token early", ("llama", "gpt2"), _short_weight),
    Kind(
        "the last position has the embedding of the one before",
        ("gpt2", "vit"),
        lambda e: e.rewrite(
            "wpe" if e.family == "gpt2" else "position_embeddings",
            lambda a: np.concatenate([a[..., :-1, :], a[..., -2:-1, :]], -2),
        ),
    ),
    Kind("the head of a tied model changed", ("gpt2",), _untie),
    Kind(
        "the head is the embedding",
        ("llama",),
        lambda e: e.rewrite("lm_head.weight.T", lambda _: e.values("embed_tokens").T),
    ),
    Kind(
        "labels are permuted",
        ("vit", "resnet"),
        lambda e: e.rewrite("classifier" if e.family == "vit" else "classifier.1", _swap_rows),
    ),
    Kind(
        "the bias of the classifier is zero",
        ("vit", "resnet"),
        lambda e: e.rewrite("classifier.bias" if e.family == "vit" else "classifier.1.bias", np.zeros_like),
    ),
    Kind("a bias is left out", ("gpt2", "vit", "gpt2 bf16", "vit bf16"), _without_bias),
    Kind("a bias is added twice", ("gpt2", "vit", "gpt2 bf16", "vit bf16"), _bias_twice),
    Kind(
        "colours of the first convolution in another order",
        ("vit", "resnet"),
        lambda e: e.rewrite(
            "projection.weight" if e.family == "vit" else "embedder.embedder.convolution.weight", lambda a: a[:, ::-1]
        ),
    ),
    Kind(
        "a kernel is mirrored",
        ("vit", "resnet", "resnet axes"),
        lambda e: e.rewrite(
            "projection.weight" if e.family == "vit" else "embedder.embedder.convolution.weight", lambda a: a[..., ::-1]
        ),
    ),
    Kind("the class token is zero", ("vit",), _at("cls_token", np.zeros_like)),
    Kind("frequencies of another base", ("llama", "llama decoder", "llama bf16"), _at("inv_freq", lambda a: a**1.1)),
    Kind(
        "frequencies rounded to fp16",
        ("llama", "llama decoder"),
        _at("inv_freq", lambda a: a.astype(np.float16).astype(a.dtype)),
    ),
    Kind(
        "one frequency is wrong",
        ("llama", "llama fp16"),
        _at("inv_freq", lambda a: np.concatenate([a[:-1], a[-1:] * 2])),
    ),
    Kind(
        "mean and variance exchanged",
        BATCHED,
        lambda e: e.swap(f"{_STATISTICS}compressed_mean", f"{_STATISTICS}compressed_var"),
    ),
    Kind("a running mean is zero", BATCHED, _at(f"{_STATISTICS}running_mean", np.zeros_like)),
    Kind("the mean of the compressed values is zero", BATCHED, _at(f"{_STATISTICS}compressed_mean", np.zeros_like)),
    Kind("a variance of one", BATCHED, _at(f"{_STATISTICS}compressed_var", np.ones_like)),
    Kind("an unbiased variance", BATCHED, _at(f"{_STATISTICS}compressed_var", lambda a: a * a.dtype.type(32 / 31))),
    Kind(
        "statistics of another layer",
        BATCHED,
        lambda e: e.swap(f"{_STATISTICS}running_mean", "stages.1.layers.0.layer.1.normalization.running_mean"),
    ),
    Kind(
        "one fp16 weight is stored in fp32",
        ("llama fp16", "vit fp16", "resnet batch fp16"),
        lambda e: e.tensor(e.matrix()).CopyFrom(
            onnx.numpy_helper.from_array(e.values(e.matrix()).astype(np.float32), e.tensor(e.matrix()).name)
        ),
    ),
    Kind(
        "half weights that were rounded twice",
        ("vit fp16",),
        _changed(lambda a: (a.astype(np.float32) * (1 + 2.0**-11)).astype(a.dtype)),
    ),
    Kind(
        "one half weight is the next number",
        HALF,
        lambda e: e.rewrite(e.matrix(), _flat(lambda a: a.__setitem__(slice(0, 1), a[:1] * (1 + 2.0**-7)))),
    ),
)


# ---- tables of rotary positions ----


def _from_64(array: Array) -> Array:
    array[64:] = 0
    return array


_ROTARY: Final = (
    Kind("cosines are zero from row 64", GENAI, _at("cos_cache", _from_64)),
    Kind("sines are zero from row 64", GENAI, _at("sin_cache", _from_64)),
    Kind("tables of 64 rows", GENAI, lambda e: [e.rewrite(f"{f}_cache", lambda a: a[:64]) for f in ("cos", "sin")]),
    Kind("the last row of a table is the one before", GENAI, _at("cos_cache", _set(-1, lambda a: a[-2]))),
    Kind("cosines and sines exchanged", GENAI, lambda e: e.swap("cos_cache", "sin_cache")),
    Kind(
        "tables that start at position 1",
        GENAI,
        lambda e: [e.rewrite(f"{f}_cache", lambda a: np.roll(a, -1, 0)) for f in ("cos", "sin")],
    ),
    Kind("cosines x 1.05", GENAI, _at("cos_cache", lambda a: (a.astype(np.float32) * 1.05).astype(a.dtype))),
    Kind("sines with the other sign", GENAI, _at("sin_cache", lambda a: -a)),
    Kind("one value of a table", GENAI, _at("sin_cache", _set((100, 2), lambda a: a[100, 2] + 0.03))),
    Kind(
        "tables of another base",
        GENAI,
        lambda e: [e.rewrite(f"{f}_cache", lambda a: a[np.arange(len(a)) * 15 // 16]) for f in ("cos", "sin")],
    ),
)


# ---- quantised blocks ----


def _part(e: Edit, matrix: str, part: str) -> onnx.TensorProto:
    return next(t for t in e.proto.graph.initializer if matrix in t.name and t.name.endswith(part))


def _block(part: str, change: _Change, matrix: str = "up_proj") -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        found = [t for t in e.proto.graph.initializer if matrix in t.name and part in t.name]
        e.store(found[0], change(onnx.numpy_helper.to_array(found[0]).copy()))

    return plant


def _swap_parts(part: str) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        one, other = (
            next(t for t in e.proto.graph.initializer if matrix in t.name and part in t.name)
            for matrix in ("gate_proj", "up_proj")
        )
        values = [onnx.numpy_helper.to_array(t).copy() for t in (one, other)]
        e.store(one, values[1])
        e.store(other, values[0])

    return plant


def _nibbles(array: Array) -> Array:
    return (array >> 4) | (array << 4)


def _quantised_node(**attributes: Any) -> Callable[[Edit], None]:
    return lambda e: e.set(e.node("MatMulNBits", "up_proj"), **attributes)


_QUANTISED: Final = (
    Kind("one packed byte", QUANTISED, _block("_Q", _flat(lambda a: a.__setitem__(slice(9, 10), a[9:10] ^ 0xF0)))),
    Kind("a row of packed bytes reversed", QUANTISED, _block("_Q", _set(7, lambda a: a[7, ..., ::-1]))),
    Kind("nibbles exchanged", ("llama int4",), _block("_Q", _nibbles)),
    Kind("packed bytes of another matrix", QUANTISED, _swap_parts("_Q")),
    Kind("scales of another matrix", QUANTISED, _swap_parts("_scales")),
    Kind("two scales exchanged", QUANTISED, _block("_scales", _flat(lambda a: a.__setitem__(slice(0, 2), a[1::-1])))),
    Kind("a scale x 1.2", QUANTISED, _block("_scales", _flat(lambda a: a.__setitem__(slice(0, 1), a[:1] * 1.2)))),
    Kind("a scale of zero", QUANTISED, _block("_scales", _flat(lambda a: a.__setitem__(slice(0, 1), 0)))),
    Kind(
        "a scale with the other sign", QUANTISED, _block("_scales", _flat(lambda a: a.__setitem__(slice(0, 1), -a[:1])))
    ),
    Kind(
        "every scale x 1.002",
        QUANTISED,
        _block("_scales", lambda a: a * a.dtype.type(1.002)),
        cannot="every value stays within one step of its block, so another quantiser may choose these scales",
    ),
    Kind(
        "a zero point is one more",
        QUANTISED,
        _block("_zero_points", _flat(lambda a: a.__setitem__(slice(0, 1), a[:1] + 1))),
    ),
    Kind("zero points of another matrix", QUANTISED, _swap_parts("_zero_points")),
    Kind(
        "the number of bits is stated wrongly",
        QUANTISED,
        lambda e: e.claim(
            "quantization", {**e.claimed("quantization"), "bits": 12 - e.claimed("quantization")["bits"]}
        ),
    ),
    Kind(
        "the block size is stated wrongly",
        QUANTISED,
        lambda e: e.claim("quantization", {**e.claimed("quantization"), "block_size": 64}),
    ),
    Kind("the quantisation is not stated", QUANTISED, lambda e: e.claim("quantization", None)),
    Kind("blocks of another size in a node", QUANTISED, _quantised_node(block_size=16)),
    Kind("one column fewer in a node", QUANTISED, _quantised_node(N=47)),
)

KINDS: Final = tuple(
    Kind(k.name, k.forms, k.plant, group=group, cannot=k.cannot)
    for group, kinds in (("weights", _PLAIN), ("rotary tables", _ROTARY), ("quantisation", _QUANTISED))
    for k in kinds
)
