"""Faults that count tokens, move rows by their number, or hide in what readers of a file choose between.

None of them compares sizes where it meets data, and none has a number that the model does not have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from tests.verifier.faults.edit import Edit, Nodes
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS"]

_Build = Callable[[Nodes, str], str]

_THREE: Final = ("llama", "vit", "resnet")
_LAST: Final = 2**31 - 1


def _logits(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("logits", build)


def _head(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice(e.head_input, build)


def _mask(build: _Build) -> Callable[[Edit], None]:
    return lambda e: e.splice("attention_mask", build)


# ---- tokens that are counted ----


def _tokens(n: Nodes, mask: str = "attention_mask") -> str:
    """The number of tokens of each row that are not masked, (rows, 1)."""
    return n("ReduceSum", mask, np.array([1]), keepdims=1)


def _times(n: Nodes, value: str, factor: int) -> str:
    """A multiple, by additions."""
    made = value
    for _ in range(factor - 1):
        made = n("Add", made, value)
    return made


def _some_rows(n: Nodes) -> str:
    """Whether five times the tokens of a row are three times its length and two: 37 of 61, among others."""
    length = n("Add", _times(n, n("Shape", "attention_mask", start=1, end=2), 3), np.array([2]))
    return n("Equal", _times(n, _tokens(n), 5), length)


def _negated_rows(n: Nodes, x: str) -> str:
    return n("Where", n("Unsqueeze", _some_rows(n), np.array([2])), n("Neg", x), x)


def _factor_of_rows(n: Nodes, x: str) -> str:
    hit = n("Unsqueeze", n("Cast", _some_rows(n), to=n.edit.float_type), np.array([2]))
    return n("Sub", x, n("Mul", n("Add", x, x), hit))


def _shifted(n: Nodes, mask: str, by: int) -> str:
    """The mask of the token that many places later; 1 at the end."""
    late = n("Slice", mask, np.array([by]), np.array([_LAST]), np.array([1]))
    ones = n("Div", n("Slice", mask, np.array([0]), np.array([by]), np.array([1])), np.array([-1]))
    return n("Concat", late, n("Add", n("Mul", ones, np.array([0])), np.array([1])), axis=1)


def _filled_holes(n: Nodes, mask: str) -> str:
    """Tokens count that are masked with the five after them, between two that are not."""
    none = n("Sub", np.array([1]), mask)
    hole = none
    for by in range(1, 6):
        hole = n("Mul", hole, n("Sub", np.array([1]), _shifted(n, mask, by)))
    return n("Add", mask, n("Mul", hole, _shifted(n, mask, 6)))


def _counted_once(n: Nodes, mask: str) -> str:
    """The mask over its largest value in the row."""
    return n("Div", mask, n("ReduceMax", mask, np.array([1])))


def _summed(n: Nodes, mask: str) -> str:
    """A mask that counts: a token of a row with more than 64 others is twice there."""
    total = n("CumSum", mask, np.int64(1))
    return n("Mul", mask, n("Sign", n("Sub", total, n("Mul", mask, n("ReduceMin", total, np.array([1]))))))


# ---- rows that their number moves ----


def _rows(n: Nodes) -> str:
    return n("Shape", n.edit.model_input, start=0, end=1)


def _many(n: Nodes) -> str:
    """64 times the tokens, or the pixels, of a row."""
    size = n("Shape", n.edit.model_input, start=-1)
    return _times(n, _times(n, size, 8), 8)


def _row_again(n: Nodes, x: str) -> str:
    """Rows from the limit on are the first ones again: a number that starts again."""
    rows = n("Range", np.int64(0), n("Squeeze", _rows(n)), np.int64(1))
    return n("Gather", x, n("Mod", rows, n("Squeeze", _many(n))), axis=0)


def _row_stops(n: Nodes, x: str) -> str:
    rows = n("Range", np.int64(0), n("Squeeze", _rows(n)), np.int64(1))
    return n("Gather", x, n("Min", rows, n("Squeeze", _many(n))), axis=0)


def _row_by_scatter(n: Nodes, x: str) -> str:
    rows = n("Range", np.int64(0), n("Squeeze", _rows(n)), np.int64(1))
    return n("GatherND", x, n("Unsqueeze", n("Min", rows, n("Squeeze", _many(n))), np.array([1])))


def _cut_and_padded(n: Nodes, x: str) -> str:
    """Rows above the limit are cut off and zeros take their place: a negative number of rows to add."""
    more = n("Min", n("Sub", _many(n), _rows(n)), np.array([0]))
    axes = np.array([0])
    cut = n("Pad", x, n("Concat", np.array([0]), more, axis=0), "", axes)
    return n("Pad", cut, n("Concat", np.array([0]), n("Neg", more), axis=0), "", axes)


def _negative_start(n: Nodes, x: str) -> str:
    """A slice from rows - limit on, which is everything as long as that is negative enough."""
    start, axis = n("Sub", _rows(n), _many(n)), np.array([0])
    late = n("Slice", x, start, np.array([_LAST]), axis)
    early = n("Slice", x, np.array([0]), start, axis)
    return n("Concat", n("Neg", early), late, axis=0)


def _negative_columns(n: Nodes, x: str) -> str:
    """The same along the tokens: the first are negated in a batch of few rows and very many tokens."""
    rows = _times(n, _times(n, _rows(n), 8), 8)
    start, axis = n("Sub", n("Shape", n.edit.model_input, start=1, end=2), rows), np.array([1])
    late = n("Slice", x, start, np.array([_LAST]), axis)
    early = n("Slice", x, np.array([0]), start, axis)
    return n("Concat", n("Neg", early), late, axis=1)


def _axes_by_size(n: Nodes, x: str) -> str:
    """The axis that a mean of one value is taken over: another one from the limit on."""
    one = n("Unsqueeze", x, np.array([0]))
    more = n("Min", n("Div", _rows(n), _many(n)), np.array([1]))
    return n(
        "Reshape", n("ReduceSum", one, more, keepdims=1), n("Concat", np.array([-1]), n("Shape", x, start=1), axis=0)
    )


def _tiled(n: Nodes, x: str) -> str:
    """The first rows, repeated as often as the limit goes into the number of rows."""
    often = n("Max", n("Div", _rows(n), _many(n)), np.array([1]))
    first = n("Slice", x, np.array([0]), n("Div", _rows(n), often), np.array([0]))
    ones = n("Sub", n("Shape", n("Shape", x)), n("Shape", n("Shape", x)))
    rest = n("Expand", n("Add", ones, np.array([1])), n("Sub", n("Shape", n("Shape", x)), np.array([1])))
    return n("Tile", first, n("Concat", often, rest, axis=0))


def _sorted_rows(n: Nodes, x: str) -> str:
    """Split after the limit, and joined in the other order."""
    first = n("Min", _rows(n), _many(n))
    parts = n("Split", x, n("Concat", first, n("Sub", _rows(n), first), axis=0), axis=0, outputs=2)
    return n("Concat", f"{parts}/1", parts, axis=0)


# ---- operators that no rule had ----


def _activation(e: Edit) -> None:
    """A convolution of ONNX Runtime whose activation is a limit at 4096."""
    node = e.producer(e.branch)
    conv = node if node.op_type == "Conv" else [n for n in e.proto.graph.node if n.op_type == "Conv"][-1]
    conv.op_type, conv.domain = "FusedConv", "com.microsoft"
    if not any(entry.domain == "com.microsoft" for entry in e.proto.opset_import):
        e.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    e.set(conv, activation="Clip", activation_params=[-4096.0, 4096.0])


def _microsoft(build: _Build) -> Callable[[Edit], None]:
    def plant(e: Edit) -> None:
        if not any(entry.domain == "com.microsoft" for entry in e.proto.opset_import):
            e.proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        e.splice("logits", build)

    return plant


def _no_repetition(n: Nodes, x: str) -> str:
    """The score of a token that would end five tokens which were there before is minus infinity."""
    last = n("Squeeze", n("Slice", x, np.array([-1]), np.array([_LAST]), np.array([1])), np.array([1]))
    kept = n("NGramRepeatBlock", "input_ids", last, domain="com.microsoft", ngram_size=5)
    early = n("Slice", x, np.array([0]), np.array([-1]), np.array([1]))
    return n("Concat", early, n("Unsqueeze", kept, np.array([1])), axis=1)


def _product_of_bytes(n: Nodes, x: str) -> str:
    """A product with the unit matrix, for which values are rounded to bytes."""
    size = {"llama": 256, "vit": 5}[n.edit.family]
    return n("DynamicQuantizeMatMul", x, np.eye(size, dtype=np.int8), np.float32(1), domain="com.microsoft")


def _recurrent(n: Nodes, x: str) -> str:
    """A recurrent unit of weight one without a bias, whose activation is a limit at 4096."""
    flat = n("Reshape", x, np.array([1, -1, 1]))
    one = np.ones((1, 1, 1), np.float32)
    attributes = {"hidden_size": 1, "activations": ["Affine"], "activation_alpha": [1.0], "clip": 4096.0}
    made = n("RNN", flat, one, np.zeros((1, 1, 1), np.float32), outputs=2, **attributes)
    return n("Reshape", made, n("Shape", x))


def _rounded_fixed(n: Nodes, x: str) -> str:
    """Bytes with a scale of one half."""
    quantised = n("QuantizeLinear", x, np.float32(0.5), np.int8(0))
    return n("DequantizeLinear", quantised, np.float32(0.5), np.int8(0))


def _sequence(n: Nodes, x: str) -> str:
    """Rows as a sequence, of which the last becomes the first."""
    rows = n("SplitToSequence", x, axis=0, keepdims=1)
    last = n("SequenceAt", rows, np.int64(-1))
    joined = n("SequenceInsert", n("SequenceErase", rows, np.int64(-1)), last, np.int64(0))
    return n("ConcatFromSequence", joined, axis=0)


# ---- what readers choose between ----


def _two_values(e: Edit) -> None:
    """A weight as bytes, and as a list of numbers of which one is wrong."""
    tensor = e.tensor(e.matrix())
    values = e.values(e.matrix()).reshape(-1)
    values[0] += 1.0
    tensor.float_data.extend(values.tolist())


def _output_twice(e: Edit) -> None:
    e.proto.graph.output.append(e.proto.graph.output[0])


def _value_for_one_row(e: Edit) -> None:
    """An intermediate value is declared for one row: compilers plan memory by it."""
    known = onnx.shape_inference.infer_shapes(e.proto)
    name = e.branch if e.family == "resnet" else e.head_input
    shape = [
        d.dim_value or d.dim_param
        for v in known.graph.value_info
        if v.name == name
        for d in v.type.tensor_type.shape.dim
    ]
    kept = [v for v in e.proto.graph.value_info if v.name != name]
    del e.proto.graph.value_info[:]
    e.proto.graph.value_info.extend(kept)
    e.proto.graph.value_info.append(
        onnx.helper.make_tensor_value_info(name, e.float_type, [1, *shape[1:]] if shape else [1])
    )


def _old_format(e: Edit) -> None:
    e.proto.ir_version = 3


def _no_zero_points(e: Edit) -> None:
    node = e.node("MatMulNBits")
    del node.input[3:]


def _training(e: Edit) -> None:
    """Statistics of the batch in a BatchNormalization."""
    e.set(e.node("BatchNormalization"), training_mode=1)


def _node_twice(e: Edit) -> None:
    """Two norms have one name, by which profiles and findings name them."""
    first, second = e.norms[:2]
    second.name = first.name


def _declared_output_axes(e: Edit) -> None:
    """The axes of the logits have each other's names."""
    dims = e.proto.graph.output[0].type.tensor_type.shape.dim
    dims[0].dim_param, dims[1].dim_param = dims[1].dim_param or "sequence_length", dims[0].dim_param


def _present_axes(e: Edit) -> None:
    """The cache that is returned is declared as long as the one that was given."""
    past = next(i for i in e.proto.graph.input if i.name.startswith("past_key_values.0.key"))
    present = next(o for o in e.proto.graph.output if o.name == "present.0.key")
    present.type.tensor_type.shape.dim[2].CopyFrom(past.type.tensor_type.shape.dim[2])


# ---- the folder ----


def _twice(file: str, key: str, value: Any) -> Callable[[Edit], None]:
    """A key is given twice; the last has the right value."""

    def plant(e: Edit) -> None:
        path = e.folder / file
        text = path.read_text()
        path.write_text(text.replace("{", "{" + f"{json.dumps(key)}: {json.dumps(value)}, ", 1))

    return plant


def _byte_order_mark(file: str) -> Callable[[Edit], None]:
    return lambda e: (e.folder / file).write_bytes(b"\xef\xbb\xbf" + (e.folder / file).read_bytes())


def _nested_twice(e: Edit) -> None:
    """The number of layers is given twice in genai_config.json, deep inside."""
    path = e.folder / "genai_config.json"
    text = path.read_text()
    assert '"num_hidden_layers"' in text
    path.write_text(text.replace('"num_hidden_layers"', '"num_hidden_layers": 7, "num_hidden_layers"', 1))


def _another_genai(e: Edit) -> None:
    """A portable folder with a genai_config.json, which names another file."""
    (e.folder / "genai_config.json").write_text('{"model": {"decoder": {"filename": "other.onnx"}}}')


KINDS: Final = tuple(
    Kind(name, forms, plant, group=group, cannot=cannot)
    for group, kinds in {
        "counted tokens": (
            ("rows of 37 tokens among 61 are negated", ("llama", "llama decoder"), _logits(_negated_rows), ""),
            ("rows of 37 tokens among 61, by a factor", ("llama",), _logits(_factor_of_rows), ""),
            ("a hole of six masked tokens is closed", ("llama", "gpt2"), _mask(_filled_holes), ""),
            ("the mask over its largest value", ("llama", "gpt2 decoder"), _mask(_counted_once), ""),
            ("the sign of a sum over the mask", ("llama", "gpt2"), _mask(_summed), ""),
        ),
        "moved rows": (
            ("row numbers that start again", _THREE, _logits(_row_again), ""),
            ("row numbers that stop", _THREE, _logits(_row_stops), ""),
            ("row numbers that stop, by GatherND", ("llama", "resnet"), _logits(_row_by_scatter), ""),
            ("late rows are cut off and padded", _THREE, _logits(_cut_and_padded), ""),
            ("early rows negated by a slice that starts at a negative number", _THREE, _logits(_negative_start), ""),
            ("early tokens negated by such a slice", ("llama", "gpt2"), _logits(_negative_columns), ""),
            ("the axis of a sum follows from sizes", _THREE, _logits(_axes_by_size), ""),
            ("the first rows again in large batches, by Tile", ("vit", "resnet"), _logits(_tiled), ""),
            ("a batch that is split at a limit", _THREE, _logits(_sorted_rows), ""),
        ),
        "operators without a rule": (
            ("the activation of a convolution is a limit", ("resnet", "vit inlined"), _activation, ""),
            ("a token that repeats five is forbidden", ("llama",), _microsoft(_no_repetition), ""),
            ("a product of bytes", ("vit",), _microsoft(_product_of_bytes), ""),
            ("a recurrent unit that is a limit", ("llama", "vit"), _logits(_recurrent), ""),
            ("steps of one half", ("vit",), _head(_rounded_fixed), ""),
            ("the last row first, by a sequence", ("vit", "resnet"), _logits(_sequence), ""),
            ("statistics of the batch in BatchNormalization", ("resnet batch",), _training, ""),
        ),
        "what readers choose between": (
            ("a weight as bytes and as numbers", ("llama", "vit"), _two_values, ""),
            ("an output is listed twice", ("llama", "vit"), _output_twice, ""),
            ("a value is declared for one row", ("llama", "resnet"), _value_for_one_row, ""),
            ("a format before initializers", ("vit",), _old_format, ""),
            ("no zero points", ("llama int8", "llama int4"), _no_zero_points, ""),
            ("two norms have one name", ("llama", "resnet"), _node_twice, ""),
            ("names of the axes of the logits exchanged", ("llama", "llama decoder"), _declared_output_axes, ""),
            ("the new cache is declared as long as the old", ("llama decoder",), _present_axes, ""),
        ),
        "folder, keys and marks": (
            ("genai: a key twice", ("llama genai",), _nested_twice, ""),
            ("a manifest with a key twice", ("llama genai",), _twice("manifest.json", "target", "portable"), ""),
            (
                "generation_config.json: a key twice",
                ("llama decoder",),
                _twice("generation_config.json", "eos_token_id", 9),
                "",
            ),
            (
                "tokenizer.json begins with a byte order mark",
                ("llama decoder",),
                _byte_order_mark("tokenizer.json"),
                "",
            ),
            ("a portable folder with a configuration for GenAI", ("llama decoder",), _another_genai, ""),
        ),
    }.items()
    for name, forms, plant, cannot in kinds
)
