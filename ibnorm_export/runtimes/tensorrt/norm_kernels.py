"""How an engine realises each norm, read from the engine's own description of its kernels.

TensorRT names the ONNX nodes that went into a layer: `[ONNX Layer: node | norm (IBNormL)]` stands for a
node inside the function of a norm, `[ONNX Layer: norm]` for the norm itself where a plugin runs it.
TensorRT-RTX needs a GPU for its inspector, so there the same text is read from the plan, where every
launch is listed as `function={ name=... }` (seen in 1.7.1; where it is not found, the report says
that nothing is known, and nothing is guessed). A plan has one graph for each profile, and the same graph
for all its targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel

__all__ = ["NormLayers", "kernels_in_inspection", "kernels_in_plan", "norm_layers"]

_GRAPH: Final = re.compile(r"header \{\n")  # behind a magic number and a length, so not at the start of a line
_PROFILE: Final = re.compile(r"\[profile (\d+)\]")
_KERNEL: Final = re.compile(r"function=\{ name=(\S+) (.*?) swap_ab=", re.DOTALL)
# The addition of the skip form is no part of the norm: outside that form it is a node of its own, and TensorRT puts it
# into any kernel that wants the sum.
_IN_FUNCTION: Final = re.compile(
    r"\[ONNX Layer: (?!node_of_(?:x_f|skip_f|sum_f|sum) )[^\]|]*\| ([^\]]+?) \((?:Skip)?IBNorm[SLT]\)\]"
)
_ITSELF: Final = re.compile(r"\[ONNX Layer: ([^\]|]+?)\s*\]")


@dataclass(frozen=True, slots=True)
class NormLayers:
    """What one norm became.

    Args:
        module: its path in the torch model.
        op_type: e.g. "IBNormL".
        realised: "fused" (one kernel), "split into N", "plugin", or "unknown".
        kernels: names of the kernels or layers, which hold neighbouring operators too.
    """

    module: str
    op_type: str
    realised: str
    kernels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch or layer of an engine and the names of the norms in it."""

    name: str
    norms: frozenset[str]
    plugin: bool = False


def kernels_in_plan(plan: bytes) -> list[list[Kernel]]:
    """Kernels of a TensorRT-RTX plan that have a norm in them, a list for each profile."""
    text = plan.decode("latin-1")
    graphs = []
    for section in _GRAPH.split(text):
        # One entry a launch: layers alike share a kernel, and are listed one by one.
        launches = [Kernel(name, frozenset(_IN_FUNCTION.findall(rest))) for name, rest in _KERNEL.findall(section)]
        with_norms = [kernel for kernel in launches if kernel.norms]
        if with_norms:
            graphs.append(with_norms)
    return graphs


def kernels_in_inspection(text: str) -> list[list[Kernel]]:
    """The same from what TensorRT's EngineInspector says of a whole engine in JSON, with detailed verbosity."""
    profiles: dict[str, list[Kernel]] = {}
    for layer in json.loads(text).get("Layers", []):
        if not isinstance(layer, dict):
            continue  # a layer of an engine built without detailed verbosity is its name alone
        metadata = str(layer.get("Metadata", ""))
        plugin = "plugin" in str(layer.get("LayerType", "")).lower()
        names = (_ITSELF if plugin else _IN_FUNCTION).findall(metadata)
        name = str(layer.get("Name", ""))
        which = _PROFILE.search(name)  # the first profile's layers carry no mark
        kernels = profiles.setdefault("0" if which is None else which[1], [])
        kernels.append(Kernel(name, frozenset(names), plugin))
    return list(profiles.values())


def norm_layers(model: ExportedModel, graphs: Iterable[list[Kernel]]) -> tuple[NormLayers, ...]:
    """For every norm of `model`, the kernels that it became; of several profiles, those of the one with the most."""
    candidates = list(graphs)
    made = []
    for norm in model.norms:
        each = [[kernel for kernel in kernels if norm.name in kernel.norms] for kernels in candidates]
        most = max(each, key=len, default=[])
        if not most:
            realised = "unknown"
        elif any(kernel.plugin for kernel in most):
            realised = "plugin"
        else:
            realised = "fused" if len(most) == 1 else f"split into {len(most)}"
        made.append(NormLayers(norm.module, norm.op_type, realised, tuple(kernel.name for kernel in most)))
    return tuple(made)
