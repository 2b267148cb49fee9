"""Trace a model with many equal blocks as one with three, and lay out the rest.

Some families also need a trace with two blocks, from which it follows how names outside the blocks continue.

The time of a trace grows with the number of blocks, and tracing takes most of the time of an export.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, Final

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.module_copy import copy_module
from ibnorm_export.exporter.trace import ENTRY_PREFIX, trace
from ibnorm_export.graph.model_writer import message_without_values
from ibnorm_export.graph.repeated_blocks import Growth, NotASeriesError, lay_out, without_last_block
from ibnorm_export.graph.weight_tensors import WeightTensor

__all__ = ["LEAST_BLOCKS", "trace_series"]

#: With fewer blocks, one trace of all of them is as fast.
LEAST_BLOCKS: Final = 5

#: The same, where two traces are needed.
LEAST_FOR_TWO_TRACES: Final = 10

#: Families whose graph with two blocks follows from that with three; tests compare their files with whole traces.
_ONE_TRACE: Final = ("llama", "vit")

#: Attributes that tell a block its place, which the graphs of the supported families do not depend on.
_PLACES: Final = ("layer_idx",)


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """The attributes of a module that its forward may depend on; objects are equal if they are the same."""
    found: list[tuple[str, object]] = [("", type(module))]
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and name not in _PLACES:
            simple = isinstance(value, Hashable) and not isinstance(value, nn.Module)
            found.append((name, value if simple else id(value)))
    return found


def _description(block: nn.Module) -> list[Any]:
    """All that must be equal in two blocks for their graphs to be equal."""
    tensors = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
    return [
        [(path, _settings(module)) for path, module in block.named_modules(remove_duplicate=False)],
        [(name, tensor.shape, tensor.dtype) for name, tensor in tensors],
    ]


def _needs_one_trace(model: LoadedModel) -> bool:
    """Whether the graph with two blocks follows from that with three.

    Attention with grouped queries takes numbers of names in each block and leaves no name that shows it.
    """
    config = model.module.config
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    return model.family in _ONE_TRACE and heads[1] in (None, heads[0])


def _has_series(model: LoadedModel) -> bool:
    """Whether the blocks of a model are many and equal."""
    if not model.blocks or not isinstance(blocks := model.module.get_submodule(model.blocks), nn.ModuleList):
        return False
    least = LEAST_BLOCKS if _needs_one_trace(model) else LEAST_FOR_TWO_TRACES
    if len(blocks) < least or getattr(model.module.config, "num_hidden_layers", None) != len(blocks):
        return False
    first = _description(blocks[0])
    return all(_description(block) == first for block in blocks)


def _with_blocks(model: LoadedModel, count: int) -> LoadedModel:
    """The same model with only its first blocks; parameters share their values."""
    module: Any = copy_module(model.module)
    parent, _, name = model.blocks.rpartition(".")
    blocks = module.get_submodule(model.blocks)
    setattr(module.get_submodule(parent), name, nn.ModuleList(list(blocks)[:count]))
    module.config.num_hidden_layers = count
    return replace(model, module=module, original=None)


def _weight(name: str, like: ir.TensorProtocol, *, tensors: dict[str, Tensor]) -> ir.TensorProtocol:
    """The value of an initializer: a tensor of the model, or the constant of the traced graph that it is like."""
    tensor = tensors.get(name.removeprefix(ENTRY_PREFIX))
    return like if tensor is None else WeightTensor(tensor, tensor.dtype, name=name)


def _continue_names(graph: ir.Graph, last: ir.Graph, *, growth: Growth, steps: int) -> None:
    """Let names that passes make up be those that they make up after a whole trace, so that files are the same."""
    names, after = graph._name_authority, last._name_authority
    names._value_counter = after._value_counter + steps * growth.values
    names._node_counter = after._node_counter + steps * growth.nodes


def _without_values(built: ir.Model) -> onnx.ModelProto:
    return message_without_values(built, lambda _: True)[0]


def _growth(two: ir.Graph, three: ir.Graph) -> Growth:
    before, after = two._name_authority, three._name_authority
    return Growth(after._value_counter - before._value_counter, after._node_counter - before._node_counter)


def _laid_out(
    model: LoadedModel, opset: int, *, three: ir.Model, count: int
) -> tuple[onnx.GraphProto, dict[str, str], Growth] | None:
    """The graph with `count` blocks, what its initializers are like, and how the counters of names grow."""
    last, blocks = _without_values(three).graph, f"{ENTRY_PREFIX}{model.blocks}"
    try:
        if _needs_one_trace(model):
            before, growth = without_last_block(last, blocks=blocks)
        else:
            two = trace(_with_blocks(model, 2), opset)
            before, growth = _without_values(two).graph, _growth(two.graph, three.graph)
        return *lay_out(before, last, blocks=blocks, count=count), growth
    except NotASeriesError:
        return None


def trace_series(model: LoadedModel, opset: int) -> ir.Model | None:
    """Return what `trace` returns, in a time that does not grow with the number of blocks.

    Args:
        model: its module is traced in the type of its parameters.
        opset: version of ONNX's default domain.

    Returns:
        The graph; None if the blocks are few, or not known to be equal, or their graphs do not continue regularly.

    Raises:
        ExportError: torch.export cannot trace the model.
    """
    if not _has_series(model):
        return None
    count = len(model.module.get_submodule(model.blocks))  # type: ignore[arg-type]  # `_has_series`: a ModuleList
    three = trace(_with_blocks(model, 3), opset)
    laid_out = _laid_out(model, opset, three=three, count=count)
    if laid_out is None:
        return None
    graph, likes, growth = laid_out
    message = _without_values(three)
    message.graph.CopyFrom(graph)
    built = ir.serde.deserialize_model(message)
    _continue_names(built.graph, three.graph, growth=growth, steps=count - 3)
    module = model.module
    tensors = {
        name: tensor.detach()
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }
    for name, value in built.graph.initializers.items():
        like = three.graph.initializers[likes[name]].const_value
        assert like is not None
        value.const_value = _weight(name, like, tensors=tensors)
    return built
