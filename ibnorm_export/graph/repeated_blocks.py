"""Lay out the graph of a model with many equal blocks from those of the same model with two and with three blocks.

torch.export takes most of the time of an export, and for each block the same time again. Names in its graphs count what
was traced before, so from one block to the next, and from a model to one with one more block, every number in a name
grows by a constant. `lay_out` reads these constants off the two graphs and continues the series. It refuses graphs that
are not such a series; then the whole model must be traced.

`without_last_block` makes the graph with two blocks from that with three, where nothing outside the blocks depends on
their number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import onnx

__all__ = ["Growth", "NotASeriesError", "lay_out", "without_last_block"]

_SCOPES = "pkg.torch.onnx.name_scopes"


class NotASeriesError(Exception):
    """The graphs do not continue in a regular way; the message says where."""


def _numbers(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The text between the numbers of a name, and the numbers; torch.fx writes `add` for what would be `add_0`."""
    parts = re.split(r"(\d+)", name)
    texts, numbers = parts[::2], [int(number) for number in parts[1::2]]
    if texts[-1]:
        texts, numbers = [*texts[:-1], f"{texts[-1]}_", ""], [*numbers, 0]
    return tuple(texts), tuple(numbers)


def _name(texts: Sequence[str], numbers: Sequence[int]) -> str:
    """The inverse of `_numbers`."""
    whole = "".join(f"{text}{number}" for text, number in zip(texts, numbers, strict=False))
    return whole.removesuffix("_0") if whole.endswith("_0") else whole


def _continue(first: str, second: str, *, steps: int) -> str:
    """The name `steps` places after `second` in the series that begins with `first` and `second`."""
    if first == second or not steps:
        return second
    (texts, before), (others, after) = _numbers(first), _numbers(second)
    if texts != others:
        raise NotASeriesError(f"{first} is followed by {second}")
    return _name(texts, [n + steps * (n - m) for m, n in zip(before, after, strict=True)])


def _properties(node: onnx.NodeProto) -> str:
    return next((p.value for p in node.metadata_props if p.key == _SCOPES), "")


@dataclass(frozen=True, slots=True)
class _Series:
    """How names continue.

    Args:
        count: number of blocks of the model to lay out.
    """

    count: int

    def shared(self, two: str, three: str) -> str:
        """A name outside the repeated blocks: in the graphs with two and three blocks."""
        return _continue(two, three, steps=self.count - 3)

    def repeated(self, two: str, three: str, next_block: str, *, block: int) -> str:
        """A name in a block: of block 1 in the two graphs, and of block 2."""
        here, there = self.shared(two, three), self._moved(two, three, next_block)
        return _continue(here, there, steps=block - 2)

    def _moved(self, two: str, three: str, next_block: str) -> str:
        """The name of block 2, moved as that of block 1 moves when blocks are added."""
        if two == three:
            return next_block
        (texts, before), (_, after), (others, numbers) = _numbers(two), _numbers(three), _numbers(next_block)
        if texts != others:
            raise NotASeriesError(f"{three} is followed by {next_block}")
        steps = self.count - 3
        return _name(texts, [x + steps * (n - m) for m, n, x in zip(before, after, numbers, strict=True)])


def _renamed(nodes: Sequence[onnx.NodeProto], rename: Callable[..., str]) -> onnx.NodeProto:
    """The last of some nodes that must be alike but for their names, which `rename` computes from all of them."""
    last = nodes[-1]
    for node in nodes:
        same = node.op_type == last.op_type and node.domain == last.domain and node.attribute == last.attribute
        if not same or len(node.input) != len(last.input) or len(node.output) != len(last.output):
            raise NotASeriesError(f"{node.name} is not like {last.name}")
    made = onnx.NodeProto()
    made.op_type, made.domain = last.op_type, last.domain
    made.attribute.extend(last.attribute)
    made.name = rename(*(node.name for node in nodes))
    made.input.extend(rename(*names) for names in zip(*(node.input for node in nodes), strict=True))
    made.output.extend(rename(*names) for names in zip(*(node.output for node in nodes), strict=True))
    if scopes := rename(*map(_properties, nodes)):
        made.metadata_props.add(key=_SCOPES, value=scopes)
    return made


def _block_of(name: str, blocks: str) -> int | None:
    """Number of the block that a path or an input belongs to."""
    found = re.match(rf"(?:{re.escape(blocks)}|past_key_values|present)\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def _node_blocks(graph: onnx.GraphProto, blocks: str) -> list[int | None]:
    """By node, the number of its block; before the blocks, the sizes of an input belong to the block that takes it."""
    found: list[int | None] = []
    made: dict[str, int] = {}
    for node in graph.node:
        scopes = re.findall(r"'([^']*)'", _properties(node))[:-1]  # the last is the operator
        number = next((n for scope in scopes if (n := _block_of(scope, blocks)) is not None), None)
        if number is None and node.op_type in ("Shape", "Squeeze") and node.input:
            number = _block_of(node.input[0], blocks)
            number = made.get(node.input[0]) if number is None else number
            if number is not None:
                made.update(dict.fromkeys(node.output, number))
        found.append(number)
    return found


def _runs(
    items: Sequence[onnx.NodeProto], numbers: Sequence[int | None]
) -> list[tuple[int | None, list[onnx.NodeProto]]]:
    """Neighbouring nodes of one block, in order."""
    pairs = groupby(zip(numbers, items, strict=True), key=lambda pair: pair[0])
    return [(number, [item for _, item in run]) for number, run in pairs]


def _nodes(
    two: onnx.GraphProto, three: onnx.GraphProto, *, blocks: str, series: _Series
) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """The nodes in order, and the node of the graph with three blocks that each is like."""
    small = _runs(two.node, _node_blocks(two, blocks))
    large = _runs(three.node, _node_blocks(three, blocks))
    known = [run for run in large if run[0] != 2]
    if [number for number, _ in small] != [number for number, _ in known]:
        raise NotASeriesError("the blocks are in another order")
    before: dict[int, tuple[list[onnx.NodeProto], list[onnx.NodeProto]]] = {}
    rest = iter(small)
    for place, (number, nodes) in enumerate(large):
        if number != 2:
            counterparts = next(rest)[1]
            if len(nodes) != len(counterparts):
                raise NotASeriesError(f"{len(counterparts)} nodes become {len(nodes)}")
            before[place] = counterparts, nodes
            yield from ((_renamed(pair, series.shared), pair[1]) for pair in zip(counterparts, nodes, strict=True))
            continue
        first, second = before[place - 1] if place and large[place - 1][0] == 1 else ([], [])
        if len(second) != len(nodes):
            raise NotASeriesError(f"{len(second)} nodes of block 1 become {len(nodes)} of block 2")
        for block in range(2, series.count):
            for triple in zip(first, second, nodes, strict=True):
                yield _renamed(triple, functools.partial(series.repeated, block=block)), triple[2]


def _named(two: Sequence[str], three: Sequence[str], *, blocks: str, series: _Series) -> Iterator[tuple[str, str]]:
    """Names of inputs, outputs or weights in order, and of that in the graph with three blocks which each is like."""
    known = [name for name in three if _block_of(name, blocks) != 2]
    if len(known) != len(two):
        raise NotASeriesError(f"{len(two)} names become {len(known)}")
    shared = {name: series.shared(other, name) for other, name in zip(two, known, strict=True)}
    for is_last, run in groupby(three, key=lambda name: _block_of(name, blocks) == 2):
        names = list(run)
        if not is_last:
            yield from ((shared[name], name) for name in names)
            continue
        for block in range(2, series.count):
            yield from ((re.sub(r"\.2(?=\.|$)", f".{block}", name, count=1), name) for name in names)


def lay_out(
    two: onnx.GraphProto, three: onnx.GraphProto, *, blocks: str, count: int
) -> tuple[onnx.GraphProto, dict[str, str]]:
    """Return the graph of a model with `count` equal blocks.

    Args:
        two: the graph of torch.onnx of the same model with only its first two blocks; values of initializers are not
            used.
        three: that with its first three blocks.
        blocks: path of the list of blocks, as in the names of weights.
        count: number of blocks, at least 3.

    Returns:
        The graph, in which initializers have the values of `three` or none; and by name of an initializer, the
        initializer of `three` that it is like.

    Raises:
        NotASeriesError: the graphs do not continue in a regular way.
    """
    series = _Series(count)
    made = onnx.GraphProto()
    made.name = three.name
    nodes = list(_nodes(two, three, blocks=blocks, series=series))
    made.node.extend(node for node, _ in nodes)
    likes: dict[str, str] = {}
    for field in ("input", "output", "initializer"):
        stored = {value.name: value for value in getattr(three, field)}
        names = [[value.name for value in getattr(graph, field)] for graph in (two, three)]
        for name, like in _named(names[0], names[1], blocks=blocks, series=series):
            value = getattr(made, field).add()
            value.CopyFrom(stored[like])
            value.name = name
            if field == "initializer":
                likes[name] = like
    infos = {value.name: value for value in three.value_info}
    pairs = [pair for node, like in nodes for pair in zip(node.output, like.output, strict=True)]
    for name, like in (*pairs, *likes.items()):
        if like in infos:
            made.value_info.add().CopyFrom(infos[like])
            made.value_info[-1].name = name
    _check_defined(made)
    return made, likes


def _check_defined(graph: onnx.GraphProto) -> None:
    """Raise NotASeriesError if a node reads a value that the graph does not have."""
    known = {value.name for field in ("input", "initializer") for value in getattr(graph, field)} | {""}
    for node in graph.node:
        if missing := set(node.input) - known:
            raise NotASeriesError(f"{node.name} would read {missing.pop()}, which does not exist")
        known.update(node.output)


#: What is equal in the names of one series, in which the last number grows.
_Kind = tuple[str | int, ...]

#: All nodes that have a name made up by the graph's writer, and all such values, count together.
_MADE_UP_NODES: Final[_Kind] = ("node",)
_MADE_UP_VALUES: Final[_Kind] = ("val_", "")


@dataclass(frozen=True, slots=True)
class Growth:
    """By how much a block lets the counters of names grow that are made up for values and for nodes."""

    values: int
    nodes: int


def _counted(name: str) -> tuple[_Kind, int] | None:
    """The series of a name and its number there; None for a path of modules, which does not grow."""
    if not name or "." in name:
        return None
    texts, numbers = _numbers(name)
    kind: _Kind = _MADE_UP_NODES if re.match("node_[A-Z]", name) else (*texts, *numbers[:-1])
    return kind, numbers[-1]


def _all_names(node: onnx.NodeProto) -> list[str]:
    """The names of a node, of its outputs, and of the modules and the operator that it comes from."""
    return [node.name, *node.output, *re.findall(r"'([^']*)'", _properties(node))]


class _Numbering:
    """The numbers of the names of a graph with three blocks, and what they are without the last."""

    def __init__(self, nodes: Sequence[onnx.NodeProto], numbers: Sequence[int | None]) -> None:
        first, last = ([n for n, number in zip(nodes, numbers, strict=True) if number == place] for place in (1, 2))
        if len(first) != len(last):
            raise NotASeriesError(f"{len(first)} nodes of block 1 become {len(last)} of block 2")
        self._before: dict[str, str] = {}  # by name in block 2, that in block 1
        self._steps: dict[_Kind, int] = {}
        self._of_last: dict[_Kind, set[int]] = {}
        for pair in zip(first, last, strict=True):
            names = [_all_names(node) for node in pair]
            if len(names[0]) != len(names[1]):
                raise NotASeriesError(f"{pair[1].name} is not like {pair[0].name}")
            for before, after in zip(*names, strict=True):
                self._add(before, after)

    def _add(self, before: str, after: str) -> None:
        """A name in block 1 and its counterpart in block 2."""
        one, two = _counted(before), _counted(after)
        if before == after or one is None or two is None:
            return
        if one[0] != two[0] or self._steps.setdefault(two[0], two[1] - one[1]) != two[1] - one[1]:
            raise NotASeriesError(f"{before} is followed by {after}")
        self._before[after] = before
        self._of_last.setdefault(two[0], set()).add(two[1])

    def without_last(self, name: str) -> str:
        """What a name outside block 2 is without that block; of a value of block 2, that of block 1."""
        name = self._before.get(name, name)
        counted = _counted(name)
        if counted is None:
            return name
        kind, number = counted
        members = self._of_last.get(kind, set())
        if number < min(members, default=number + 1):
            return name  # a series without members in the blocks does not grow
        if number < max(members):
            raise NotASeriesError(f"{name} lies between names of a block")
        texts, numbers = _numbers(name)
        return _name(texts, [*numbers[:-1], number - self._steps[kind]])

    def growth(self) -> Growth:
        return Growth(self._steps.get(_MADE_UP_VALUES, 0), self._steps.get(_MADE_UP_NODES, 0))


def without_last_block(three: onnx.GraphProto, *, blocks: str) -> tuple[onnx.GraphProto, Growth]:
    """Return the graph with two blocks of a model from that with three, for `lay_out`.

    Args:
        three: the graph of torch.onnx; nothing outside its blocks may depend on their number but names.
        blocks: path of the list of blocks, as in the names of weights.

    Returns:
        The graph, in which values have no types, and what the removed block adds to the counters of names.

    Raises:
        NotASeriesError: it does not follow from this graph how names continue.
    """
    numbers = _node_blocks(three, blocks)
    numbering = _Numbering(three.node, numbers)
    two = onnx.GraphProto()
    for node, number in zip(three.node, numbers, strict=True):
        if number == 2:
            continue
        made = two.node.add()
        made.CopyFrom(node)
        made.name = numbering.without_last(node.name)
        for field in ("input", "output"):
            names = [numbering.without_last(name) for name in getattr(node, field)]
            del getattr(made, field)[:]
            getattr(made, field).extend(names)
        for entry in made.metadata_props:
            if entry.key == _SCOPES:
                entry.value = re.sub("'([^']*)'", lambda found: f"'{numbering.without_last(found[1])}'", entry.value)
    for field in ("input", "output", "initializer"):
        for value in getattr(three, field):
            if _block_of(value.name, blocks) != 2:
                getattr(two, field).add().name = numbering.without_last(value.name)
    return two, numbering.growth()
