"""What each norm became in an engine: a fused kernel, several kernels, or a plugin.

TensorRT names the ONNX nodes that went into a layer: `[ONNX Layer: node | norm (IBNormL)]` is a node inside the
function of a norm, and `[ONNX Layer: norm]` is the norm itself, run by a plugin. The inspector of TensorRT-RTX needs a
GPU, so for TensorRT-RTX the same text is read from the plan, which lists every launch as `function={ name=... }` (as of
version 1.7.1; if the list is missing, the result is "unknown"). A plan has one graph for each profile, and the same
graph for all its targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ibnorm_export.artifacts.exported_model import ExportedModel

__all__ = ["NormLayers", "kernels_in_inspection", "kernels_in_plan", "norm_layers"]

_GRAPH: Final = re.compile(r"header \{\n")  # follows a magic number and a length, so not at the start of a line
_PROFILE: Final = re.compile(r"\[profile (\d+)\]")
_KERNEL: Final = re.compile(r"function=\{ name=(\S+) (.*?) swap_ab=", re.DOTALL)
# The addition of the skip form is not part of the norm: without that form it is a separate node, which TensorRT repeats
# in every kernel that needs the sum. In older files the nodes of functions have no names, and TensorRT makes some up.
_IN_FUNCTION: Final = re.compile(
    r"\[ONNX Layer: (?!(?:node_of_)?(?:x_f|skip_f|sum_f|sum) )[^\]|]*\| ([^\]]+?) \((?:Skip)?IBNorm[SLT]\)\]"
)
_ITSELF: Final = re.compile(r"\[ONNX Layer: ([^\]|]+?)\s*\]")


@dataclass(frozen=True, slots=True)
class NormLayers:
    """What one norm became.

    Args:
        module: path of the norm in the checkpoint.
        op_type: op type of its node, e.g. "IBNormL".
        realised: "fused" (one kernel), "split into N", "plugin", or "unknown".
        kernels: names of the kernels or layers, which may also contain neighbouring operators.
    """

    module: str
    op_type: str
    realised: str
    kernels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch or layer of an engine, with the names of the norms in it."""

    name: str
    norms: frozenset[str]
    plugin: bool = False


def kernels_in_plan(plan: bytes) -> list[list[Kernel]]:
    """Find the kernels of a TensorRT-RTX plan that contain a norm, as one list for each profile."""
    text = plan.decode("latin-1")
    graphs = []
    for section in _GRAPH.split(text):
        # One entry for each launch: similar layers share a kernel, but each is listed.
        launches = [Kernel(name, frozenset(_IN_FUNCTION.findall(rest))) for name, rest in _KERNEL.findall(section)]
        with_norms = [kernel for kernel in launches if kernel.norms]
        if with_norms:
            graphs.append(with_norms)
    return graphs


def kernels_in_inspection(text: str) -> list[list[Kernel]]:
    """Find the layers that contain a norm in the JSON text of TensorRT's EngineInspector, with detailed verbosity."""
    profiles: dict[str, list[Kernel]] = {}
    for layer in json.loads(text).get("Layers", []):
        if not isinstance(layer, dict):
            continue  # without detailed verbosity a layer is only a name
        metadata = str(layer.get("Metadata", ""))
        plugin = "plugin" in str(layer.get("LayerType", "")).lower()
        names = (_ITSELF if plugin else _IN_FUNCTION).findall(metadata)
        name = str(layer.get("Name", ""))
        which = _PROFILE.search(name)  # layers of the first profile are not marked
        kernels = profiles.setdefault("0" if which is None else which[1], [])
        kernels.append(Kernel(name, frozenset(names), plugin))
    return list(profiles.values())


def norm_layers(model: ExportedModel, graphs: Iterable[list[Kernel]]) -> tuple[NormLayers, ...]:
    """Return what every norm of `model` became, in the profile in which it takes the most kernels."""
    candidates = list(graphs)
    layers = []
    for norm in model.norms:
        each = [[kernel for kernel in kernels if norm.name in kernel.norms] for kernels in candidates]
        most = max(each, key=len, default=[])
        if not most:
            realised = "unknown"
        elif any(kernel.plugin for kernel in most):
            realised = "plugin"
        else:
            realised = "fused" if len(most) == 1 else f"split into {len(most)}"
        layers.append(NormLayers(norm.module, norm.op_type, realised, tuple(kernel.name for kernel in most)))
    return tuple(layers)
