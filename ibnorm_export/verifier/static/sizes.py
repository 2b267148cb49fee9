"""Check that a file makes no data of sizes: PyTorch computes the same for every row, whatever the size of the batch.

A factor that is 1 for each of the first rows and 0 for later ones shows in no number of the file, nor in a batch that
is run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from typing import Final

import numpy as np
import torch

from ibnorm_export.findings.code import FindingCode
from ibnorm_export.verifier.checkpoint.operator_names import is_among, operator_words
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static.constants import SHAPE_INPUTS
from ibnorm_export.verifier.static.dataflow import FLOAT_TYPES, WHOLE_TYPES, DataFlow, FlowNode

__all__ = ["COMPARING", "check_sizes"]

#: Operators that compare.
COMPARING: Final = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"})

#: Operators that limit a size or divide it. What follows may depend on it in steps.
_STEPPING: Final = frozenset(
    {"Mod", "Max", "Min", "Clip", "Relu", "Sign", "Abs", "Pow", "BitShift", "Floor", "Ceil", "Round"}
)

#: Operators that make many values of sizes.
_SPREADING: Final = frozenset({"Range", "ConstantOfShape", "Expand", "EyeLike", "OneHot", "NonZero", "CumSum", "Tile"})

#: Operators that take data and a shape, which exporters write with comparisons, for a size of -1.
_SHAPED: Final = frozenset({"Reshape", "Expand", "ConstantOfShape"})

#: Operators that take data and a size, and a word in the names of PyTorch's operators that become them.
_BY_SHAPE: Final = {"Pad": "pad", "Split": "split*", "TopK": "topk", "Resize": "upsample*"}

#: What selects rows by computed numbers and limits such numbers, by words in the names of PyTorch's operators that
#: become it: relative positions are clamped, and gathered by.
_BECOMES: Final = {
    **dict.fromkeys(("GatherElements", "GatherND"), ("gather", "take*")),
    **dict.fromkeys(("ScatterElements", "ScatterND", "Scatter"), ("scatter*",)),
    **dict.fromkeys(("Clip", "Min", "Max"), ("clamp", "clip", "minimum", "maximum")),
    "Mod": ("remainder", "fmod"),
    "Abs": ("abs",),
    "Sign": ("sign",),
}

#: Operators that select values by their number, which is their second input.
_SELECTING: Final = frozenset({"Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "Scatter"})

#: More numbers than a shape has.
_MOST_AXES: Final = 64

#: A smaller row is in the batches that are run.
_FEW_ROWS: Final = 8

#: Operators that compute with what they are given, position by position or as products.
_ARITHMETIC: Final = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mod", "Sum", "Mean", "MatMul", "Gemm", "PRelu", "Clip", "Einsum"}
)

#: Operators that leave values as they are.
_MOVING: Final = frozenset(
    {"Identity", "Cast", "CastLike", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Concat"}
)

#: The smallest numbers of the types of floating-point data, which masks have where a token is not seen.
_MASKED: Final = (-np.inf, *(float(torch.finfo(kind).min) for kind in (torch.float16, torch.bfloat16, torch.float32)))


def check_sizes(flow: DataFlow, floating: set[str], *, operators: Collection[str]) -> Iterator[Finding]:
    """Find what depends on the sizes of a batch or a sequence and meets data.

    Args:
        flow: the data flow of the file.
        floating: names of the values that are floating-point data.
        operators: names of PyTorch's operators that ran.
    """
    words = {word for name in operators for word in operator_words(name)}
    rows = _RowCounts(flow, floating)
    yield from _cut_rows(flow, floating, rows=rows)
    yield from _looked_up_sizes(flow, rows)
    yield from _compared_sizes(flow, words)
    yield from _moved_rows(flow, floating, words=words)
    yield from _sizes_as_data(flow, floating)


def _cut_rows(flow: DataFlow, floating: set[str], *, rows: _RowCounts) -> Iterator[Finding]:
    """Slices of data that end, or begin, at a row that few batches have, or where the number of rows decides."""
    for node in flow.nodes:
        if node.proto.op_type != "Slice" or node.inputs[0] not in floating:
            continue
        starts, ends, given = (*node.inputs, "", "")[1:4]
        axes = flow.value(given) if given and flow.is_constant(given) else None
        rank = rows.rank(node.inputs[0])
        known = [] if axes is None else [int(axis) % rank if rank else int(axis) for axis in axes.reshape(-1)]
        for name in (starts, ends):
            if flow.is_constant(name):
                array = flow.value(name)
                places = () if array is None else array.reshape(-1)[: len(known) or 1]
                cut = [abs(int(p)) for p, axis in zip(places, known or [0], strict=False) if axis == 0]
                if any(_FEW_ROWS < row < 2**31 - 1 for row in cut):
                    what = f"the {node} cuts a batch at row {cut[0]}, which PyTorch does not"
                    yield Finding("operators", what, code=FindingCode.SIZES_DECIDE)
            elif (0 in (known or [0]) and not rows.is_count(name)) or rows.follows(name):
                what = f"the {node} cuts data at a place that is computed from sizes, the number of rows among them"
                yield Finding("operators", f"{what}; PyTorch does not", code=FindingCode.SIZES_DECIDE)


def _looked_up_sizes(flow: DataFlow, rows: _RowCounts) -> Iterator[Finding]:
    """Tables of numbers that end at some size, and floating-point numbers that lose digits in a large batch."""
    for node in flow.nodes:
        if flow.renumbers(node) and rows.is_size(node.inputs[1]):
            what = f"the {node} looks up a size in a table of numbers, which larger inputs exceed"
            yield Finding("operators", f"{what}; PyTorch does not", code=FindingCode.SIZES_DECIDE)
        elif flow.converts_to(node) in FLOAT_TYPES and (rows.is_count(node.inputs[0]) or rows.follows(node.inputs[0])):
            what = f"the {node} makes a floating-point number of the number of rows, which PyTorch does not"
            yield Finding("operators", what, code=FindingCode.SIZES_DECIDE)


class _RowCounts:
    """Which values are the number of rows of a batch, or are computed from it.

    Args:
        flow: the data flow of the file.
        floating: names of the values that are floating-point data.
    """

    def __init__(self, flow: DataFlow, floating: set[str]) -> None:
        self._ranks = {name: len(shape) for name, shape in flow.shapes.items()}
        #: For each value that is made of sizes, whether each of its numbers is the number of rows.
        self._counts: dict[str, tuple[bool, ...]] = {}
        self._computed: set[str] = set()
        for node in flow.nodes:
            kind = node.proto.op_type
            given = [name for name in node.inputs if name and not flow.is_constant(name)]
            if kind == "Shape" and (node.inputs[0] in floating or flow.producer(node.inputs[0]) is None):
                self._counts[node.outputs[0]] = self._of_shape(node)
            elif given and all(name in self._counts for name in given) and kind not in _SPREADING:
                moved = self._moved(flow, node)
                self._counts[node.outputs[0]] = (any(any(self._counts[n]) for n in given),) if moved is None else moved
                mixed = moved is None and self._counts[node.outputs[0]][0]
                if mixed or any(name in self._computed for name in given):
                    self._computed.add(node.outputs[0])

    def rank(self, name: str) -> int | None:
        """The number of axes of a value; None if it is not known."""
        return self._ranks.get(name)

    def is_count(self, name: str) -> bool:
        """Whether a value is the number of rows itself."""
        return self._counts.get(name) == (True,) and name not in self._computed

    def is_size(self, name: str) -> bool:
        """Whether a value is made of sizes only, and is not a range of them."""
        return name in self._counts

    def follows(self, name: str) -> bool:
        """Whether a value is computed from the number of rows."""
        return name in self._computed

    def _of_shape(self, node: FlowNode) -> tuple[bool, ...]:
        rank = self._ranks.get(node.inputs[0], 8)
        start, end = (
            next((a.i for a in node.proto.attribute if a.name == n), d) for n, d in (("start", 0), ("end", rank))
        )
        return ((True,) + (False,) * (rank - 1))[start:end]

    def _moved(self, flow: DataFlow, node: FlowNode) -> tuple[bool, ...] | None:
        """The numbers of a node that only moves or selects sizes; None if it computes with them."""
        kind = node.proto.op_type
        if kind == "Concat":
            stored = {name: (flow.size(name) if flow.is_stored(name) else 1) or 0 for name in node.inputs}
            if max(stored.values(), default=0) > _MOST_AXES:
                return None
            parts = [self._counts.get(name, (False,) * stored[name]) for name in node.inputs]
            return tuple(count for part in parts for count in part)
        counts = self._counts.get(node.inputs[0])
        if kind in _MOVING or counts is None:
            return counts
        if kind in ("Gather", "Slice") and all(flow.is_constant(name) for name in node.inputs[1:] if name):
            chosen = [flow.value(name) for name in node.inputs[1:] if name]
            if any(value is None for value in chosen):
                return None
            places = [np.atleast_1d(value) for value in chosen if value is not None]
            if kind == "Gather":
                return tuple(counts[int(i)] for i in places[0].reshape(-1) if -len(counts) <= i < len(counts))
            plain = len(places) in (2, 3) and not (len(node.inputs) > 4 and node.inputs[4])
            return counts[int(places[0][0]) : int(places[1][0])] if plain and places[0].size == 1 else None
        return None


def _compared_sizes(flow: DataFlow, words: AbstractSet[str]) -> Iterator[Finding]:
    """Comparisons of sizes that decide about data. PyTorch's code may pad or cut data to a multiple of a size."""
    sizes: set[str] = set()
    decided: dict[str, FlowNode] = {}
    for node in flow.nodes:
        given = [name for name in node.inputs if name and not flow.is_constant(name)]
        if not given:
            continue
        kind = node.proto.op_type
        by_size = all(name in sizes or name in decided for name in given)
        cause = next((decided[name] for name in given if name in decided), None)
        if kind in ("Shape", "Size"):
            sizes.update(node.outputs)
        elif by_size and kind not in _SPREADING:
            if cause is None and _steps(flow, node):
                cause = node
            if cause is None:
                sizes.update(node.outputs)
            else:
                decided.update(dict.fromkeys(node.outputs, cause))
        elif cause is not None:
            shaped = kind in _SHAPED or (kind in _BY_SHAPE and is_among(_BY_SHAPE[kind], words))
            shapes = SHAPE_INPUTS[kind] if shaped and kind in SHAPE_INPUTS else ()
            if any(name in decided and position not in shapes for position, name in enumerate(node.inputs)):
                what = f"the {cause} compares or divides sizes, and the {node} takes the result with data"
                yield Finding("operators", f"{what}; PyTorch does not", code=FindingCode.SIZES_DECIDE)


def _moved_rows(flow: DataFlow, floating: set[str], *, words: AbstractSet[str]) -> Iterator[Finding]:
    """Data that is selected by numbers of rows which stop or start again somewhere, as PyTorch's code selects none."""
    numbers: set[str] = set()
    stepped: dict[str, FlowNode] = {}
    for node in flow.nodes:
        kind = node.proto.op_type
        given = [name for name in node.inputs if name and not flow.is_constant(name)]
        if kind in ("Shape", "Size"):
            numbers.update(node.outputs)
        elif given and all(name in numbers for name in given):
            numbers.update(node.outputs)
            cause = next((stepped[name] for name in given if name in stepped), None)
            if cause is None and (kind == "Where" or _steps(flow, node)):
                cause = node
            if cause is not None:
                stepped.update(dict.fromkeys(node.outputs, cause))
        elif kind in _SELECTING and len(node.inputs) > 1 and node.inputs[1] in stepped and node.inputs[0] in floating:
            cause = stepped[node.inputs[1]]
            same = all(any(is_among(w, words) for w in _BECOMES.get(n.proto.op_type, ())) for n in (node, cause))
            if not same:
                what = f"the {node} selects data by numbers that the {cause} limits by sizes"
                yield Finding("operators", f"{what}; PyTorch does not", code=FindingCode.SIZES_DECIDE)


def _steps(flow: DataFlow, node: FlowNode) -> bool:
    """Whether a result follows sizes in steps: by a limit, a comparison, a division by a number, or whole numbers.

    Exporters divide sizes by each other.
    """
    kind = node.proto.op_type
    if kind in (*COMPARING, *_STEPPING):
        return True
    if kind == "Div" and flow.is_constant(node.inputs[1]):
        divisor = flow.value(node.inputs[1])
        return divisor is None or bool((divisor != 1).any())
    return flow.converts_to(node) in WHOLE_TYPES and flow.element_type(node.inputs[0]) in FLOAT_TYPES


def _sizes_as_data(flow: DataFlow, floating: set[str]) -> Iterator[Finding]:
    """Arithmetic of data, or of weights, with values that are made only of sizes.

    Masks are added to scores, and frequencies are multiplied by positions; a position selects a row of a weight.
    """
    made: set[str] = set()
    for node in flow.nodes:
        kind = node.proto.op_type
        given = [name for name in node.inputs if name and not flow.is_constant(name)]
        if kind in ("Shape", "Size"):
            made.update(name for name in node.outputs if not flow.is_constant(name))
            continue
        sizes = [name for name in given if name in made]
        weights = any(name and flow.is_constant(name) and _is_weight(flow, name) for name in node.inputs)
        if not sizes:
            continue
        if len(sizes) == len(given) and not weights:
            made.update(node.outputs)
        elif len(sizes) == len(given) and not any(_is_parameter(flow, name) for name in node.inputs):
            continue  # slopes of positions, which PyTorch computes too
        elif kind in _ARITHMETIC and not (kind == "Add" and _is_mask(flow, sizes[0])) and not _is_angle(flow, node):
            if len(sizes) < len(given) and not any(name in floating for name in given):
                continue
            what = f"the {node} computes with values that are made of sizes ({sizes[0]}), which PyTorch does not"
            yield Finding("operators", what, code=FindingCode.SIZES_DECIDE)


def _is_weight(flow: DataFlow, name: str) -> bool:
    """Whether a constant is floating-point data that is not one number."""
    array = None if flow.is_large(name) else flow.value(name)
    return array is None or (array.dtype.kind in "fV" and array.size > 1 and bool((array != array.flat[0]).any()))


def _is_parameter(flow: DataFlow, name: str) -> bool:
    """Whether a constant has the name of a parameter of a module."""
    return flow.is_stored(name) and name.removesuffix(".T").endswith((".weight", ".bias"))


def _is_mask(flow: DataFlow, name: str) -> bool:
    """Whether a value is zero where a token is seen, and the smallest number where it is not."""
    node = flow.producer(name)
    while node is not None and node.proto.op_type in _MOVING:
        node = flow.producer(node.inputs[0])
    if node is None or node.proto.op_type != "Where":
        return False
    branches = [flow.value(given) if flow.is_constant(given) else None for given in node.inputs[1:]]
    return all(b is not None and bool(np.isin(np.asarray(b, np.float64), (0.0, *_MASKED)).all()) for b in branches)


def _is_angle(flow: DataFlow, node: FlowNode) -> bool:
    """Whether only sines and cosines are computed from a product."""
    if node.proto.op_type not in ("Mul", "MatMul", "Einsum"):
        return False
    moved, ends = set(node.outputs), set()
    for reader in flow.nodes:
        if any(name in moved for name in reader.inputs):
            if reader.proto.op_type in _MOVING:
                moved.update(reader.outputs)
            else:
                ends.add(reader.proto.op_type)
    return bool(ends) and ends <= {"Sin", "Cos"}
