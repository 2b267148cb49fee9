"""Taps: the output of every norm and block, from a copy of the file and from the PyTorch model alike.

The copy has more graph outputs and nothing else that is new, so fused nodes stay whole; on the
PyTorch side forward hooks keep what the same modules return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError
from ibnorm_export.graph.early_gather import Rows, selected_rows
from ibnorm_export.op.replace_norms import is_norm
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.op.torch_op import IBNorm, SkipIBNorm

__all__ = ["Tap", "blocks", "recorded", "tap", "tapped_copy"]

#: Before the name of a tapped value's own graph output.
_PREFIX: Final = "tap:"

_FLOATING: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class Tap:
    """One place: its module path in PyTorch, "norm" or "block", the ONNX node that gives it and the output's name.

    `rows` are what the file computes of it, where that is not all.
    """

    module: str
    kind: str
    _: KW_ONLY
    node: str
    output: str
    rows: Rows | None = None

    def of(self, value: NDArray[Any]) -> NDArray[Any]:
        """What the file has of PyTorch's `value` of this module."""
        return value if self.rows is None else self.rows.of(value)


def _lists(model: nn.Module) -> list[str]:
    """Paths of the lists of blocks: of ModuleLists, or where there is none of Sequentials of modules with norms."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if lists:
        return lists
    return [
        path
        for path, module in model.named_modules()
        if path
        and isinstance(module, nn.Sequential)
        and any(is_norm(inner) and inner is not child for child in module for inner in child.modules())
    ]


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks: children of a list of them that is not inside another block."""
    lists = _lists(model)
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    return tuple(f"{path}.{name}" for path in outer for name, _ in model.get_submodule(path).named_children())


def _is_node(norm: nn.Module) -> bool:
    """Whether the output of this norm is that of its ONNX node: not where axes are moved or flattened around it."""
    return type(norm) in (IBNorm, SkipIBNorm)


def _module(node: ir.Node) -> str:
    return node.metadata_props.get("module", "")


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _leaving(graph: ir.Graph, block: str) -> ir.Value | None:
    """The last floating value that a block gives to the rest; a residual sum that a SkipIBNorm took over is its own."""
    last = None
    for node in graph:
        if not _within(_module(node), block):
            continue
        for value in node.outputs:
            users = [use.node for use in value.uses()]
            outside = [user for user in users if not _within(_module(user), block)]
            if value.dtype in _FLOATING and outside:
                last = next(
                    (u.outputs[1] for u in outside if u.op_type.startswith("Skip") and u.domain == DOMAIN), value
                )
    return last


def tap(model: ir.Model, module: nn.Module) -> tuple[Tap, ...]:
    """Add graph outputs to `model` for its norms and blocks; what was added, in the order of the graph."""
    graph = model.graph
    places: dict[str, tuple[ir.Value, str]] = {}
    for node in graph:
        if node.domain == DOMAIN and node.name:
            places[node.name] = (node.outputs[0], "norm")
    others = [(path, "norm") for path, norm in module.named_modules() if is_norm(norm) and not _is_node(norm)]
    for path, kind in (*others, *((path, "block") for path in blocks(module))):
        value = _leaving(graph, path)
        if value is not None and (path not in places or kind == "norm"):
            places[path] = (value, kind)
    # a SkipIBNorm gives a block's sum and then the norm of it
    order = {id(v): (index, -output) for index, node in enumerate(graph) for output, v in enumerate(node.outputs)}
    taps = []
    for path, (value, kind) in sorted(places.items(), key=lambda item: order[id(item[1][0])]):
        source = value.producer()
        assert source is not None
        copy = ir.node("Identity", [value], name=f"{_PREFIX}{path}")
        copy.outputs[0].name = f"{_PREFIX}{path}"
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        graph.insert_after(source, copy)
        graph.outputs.append(copy.outputs[0])
        taps.append(
            Tap(path, kind, node=source.name or source.op_type, output=f"{_PREFIX}{path}", rows=selected_rows(source))
        )
    return tuple(taps)


def tapped_copy(exported: ExportedModel, module: nn.Module, *, folder: Path) -> tuple[ExportedModel, tuple[Tap, ...]]:
    """The file with taps, written to `folder`.

    Raises:
        ModelFileError: there is nothing to tap: no norm node, and no node that says its block.
    """
    copy = ir.load(exported.path)
    taps = tap(copy, module)
    if not taps:
        raise ModelFileError(f"{exported.path} has no norm node and no node that says its module: nothing to tap")
    ir.save(copy, folder / "tapped.onnx", external_data="tapped.onnx.data")
    return ExportedModel(folder / "tapped.onnx"), taps


@contextmanager
def recorded(module: nn.Module) -> Iterator[Arrays]:
    """What the norms and blocks of `module` returned in the last pass, by path; a norm's second call is PATH#2.

    Clear the mapping before another pass.
    """
    values: Arrays = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if tensor is None:
                return
            name, calls = path, 1
            while name in values:
                calls += 1
                name = f"{path}#{calls}"
            values[name] = (
                (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy().copy()
            )

        return hook

    wanted = {path for path, child in module.named_modules() if is_norm(child)} | set(blocks(module))
    hooks = [module.get_submodule(path).register_forward_hook(keep(path)) for path in sorted(wanted)]
    try:
        yield values
    finally:
        for handle in hooks:
            handle.remove()
