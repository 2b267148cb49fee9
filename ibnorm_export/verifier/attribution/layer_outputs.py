"""The output of every norm and block, from a copy of the file and from the PyTorch model.

The copy has more graph outputs and is otherwise the same, so fused nodes stay whole. On the PyTorch side, forward
hooks record what the same modules return.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
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
from ibnorm_export.errors import ModelFileError
from ibnorm_export.graph.early_gather import Rows, selected_rows
from ibnorm_export.graph.stored_graph import read_graph
from ibnorm_export.op.replace_norms import is_norm
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.op.torch_op import IBNorm, SkipIBNorm
from ibnorm_export.verifier.file_copies import write_copy

__all__ = [
    "LayerOutput",
    "add_layer_outputs",
    "blocks",
    "copy_with_layer_outputs",
    "layer_paths",
    "record_layer_outputs",
]

#: Prefix of the names of the added graph outputs.
_PREFIX: Final = "layer:"

_FLOATING: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """The output of one norm or block.

    Args:
        module: its path in PyTorch.
        kind: "norm" or "block".
        node: the ONNX node that computes it.
        output: name of the graph output that was added for it.
        rows: the rows of PyTorch's value that the file computes; None for all.
    """

    module: str
    kind: str
    _: KW_ONLY
    node: str
    output: str
    rows: Rows | None = None

    def select(self, value: NDArray[Any]) -> NDArray[Any]:
        """The part of PyTorch's `value` of this module that the file computes."""
        return value if self.rows is None else self.rows.of(value)


def _lists(model: nn.Module) -> list[str]:
    """Paths of the lists of blocks: ModuleLists, or, if there are none, Sequentials of modules that hold norms."""
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
    """Paths of the repeated blocks: the children of every list of blocks that is not inside another block."""
    lists = _lists(model)
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    return tuple(f"{path}.{name}" for path in outer for name, _ in model.get_submodule(path).named_children())


def _has_output_of_node(norm: nn.Module) -> bool:
    """Whether the norm's output is that of its ONNX node: not where axes are moved or flattened around the node."""
    return type(norm) in (IBNorm, SkipIBNorm)


def _module(node: ir.Node) -> str:
    return node.metadata_props.get("module", "")


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _block_output(graph: ir.Graph, block: str) -> ir.Value | None:
    """The block's last floating-point value that nodes outside the block use.

    If a SkipIBNorm outside computes the block's residual sum, that sum is the output.
    """
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


def _find_places(graph: ir.Graph, module: nn.Module) -> list[tuple[str, str, ir.Value]]:
    """Path, kind and value of every norm and block that the graph computes, in the order of the graph."""
    places = {node.name: ("norm", node.outputs[0]) for node in graph if node.domain == DOMAIN and node.name}
    others = [
        (path, "norm") for path, norm in module.named_modules() if is_norm(norm) and not _has_output_of_node(norm)
    ]
    for path, kind in (*others, *((path, "block") for path in blocks(module))):
        value = _block_output(graph, path)
        if value is not None and (path not in places or kind == "norm"):
            places[path] = (kind, value)
    # A SkipIBNorm returns the norm first, but a reader expects the block's sum before the norm of it.
    order = {id(v): (index, -output) for index, node in enumerate(graph) for output, v in enumerate(node.outputs)}
    return sorted(
        ((path, kind, value) for path, (kind, value) in places.items()), key=lambda place: order[id(place[2])]
    )


def add_layer_outputs(model: ir.Model, module: nn.Module) -> tuple[LayerOutput, ...]:
    """Add graph outputs to `model` for its norms and blocks.

    Args:
        model: the file's graph; it is changed.
        module: the checkpoint, which has the same paths.

    Returns:
        What was added, in the order of the graph.
    """
    graph = model.graph
    added = []
    for path, kind, value in _find_places(graph, module):
        source = value.producer()
        assert source is not None
        copy = ir.node("Identity", [value], name=f"{_PREFIX}{path}")
        copy.outputs[0].name = f"{_PREFIX}{path}"
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        graph.insert_after(source, copy)
        graph.outputs.append(copy.outputs[0])
        added.append(
            LayerOutput(
                path, kind, node=source.name or source.op_type, output=f"{_PREFIX}{path}", rows=selected_rows(source)
            )
        )
    return tuple(added)


def copy_with_layer_outputs(
    exported: ExportedModel, module: nn.Module, *, folder: Path, refers: bool
) -> tuple[ExportedModel, tuple[LayerOutput, ...]]:
    """Write a copy of the file with layer outputs to `folder`; see `write_copy` for `refers`.

    Raises:
        ModelFileError: the file has no norm node and no node that names its module.
    """
    copy = read_graph(exported)
    outputs = add_layer_outputs(copy, module)
    if not outputs:
        raise ModelFileError(
            f"{exported.path} has no norm node and no node that names its module, so no layer can be compared"
        )
    return write_copy(copy, exported, file=folder / "layers.onnx", refers=refers), outputs


def layer_paths(module: nn.Module) -> frozenset[str]:
    """Paths of the norms and blocks of the checkpoint's module; they are the same in the user's original."""
    return frozenset({path for path, child in module.named_modules() if is_norm(child)} | set(blocks(module)))


@contextmanager
def record_layer_outputs(
    module: nn.Module, *, paths: Collection[str], keep: Callable[[str, NDArray[Any]], None]
) -> Iterator[None]:
    """Hand out what some submodules of `module` return in the pass within this block.

    Args:
        module: the model.
        paths: the submodules; see `layer_paths`.
        keep: receives each path and value; that of a norm's second call has the path PATH#2. The value is only valid
            during the call.
    """
    calls: Counter[str] = Counter()

    def record(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if tensor is None:
                return
            calls[path] += 1
            name = path if calls[path] == 1 else f"{path}#{calls[path]}"
            keep(name, (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy())

        return hook

    hooks = [module.get_submodule(path).register_forward_hook(record(path)) for path in sorted(paths)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
