"""Where the norms of an optimised graph stand: which of them a runtime has put a copy between host and device beside.

ONNX Runtime inserts `MemcpyFromHost` and `MemcpyToHost` where neighbours run on different devices. Such a
copy costs more than the norm itself, so a fused kernel beside one has not proved anything.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays

if TYPE_CHECKING:  # it needs torch
    from ibnorm_export.runtimes.ort_cuda import OrtCudaRunner

__all__ = ["COPY_OPS", "NormExecution", "copies_beside", "norm_executions"]

#: Op types of the nodes that ONNX Runtime copies tensors between host and device with.
COPY_OPS = frozenset({"MemcpyFromHost", "MemcpyToHost"})


def copies_beside(graph: onnx.GraphProto, nodes: frozenset[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
    """How many copies touch each of `nodes`, directly at an input or an output.

    Args:
        graph: as the runtime optimised it.
        nodes: (name, op type) of those to look at; one that the graph lacks counts 0.

    Returns:
        The number of copy nodes by (name, op type): each counts once for a node, however many edges join them.
    """
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    consumers: dict[str, set[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            if name:
                consumers.setdefault(name, set()).add(index)
    found: Counter[tuple[str, str]] = Counter()
    for node in graph.node:
        key = (node.name, node.op_type)
        if key not in nodes:
            continue
        neighbours = {producers[name] for name in node.input if name in producers}
        neighbours.update(*(consumers.get(name, set()) for name in node.output))
        found[key] += sum(graph.node[index].op_type in COPY_OPS for index in neighbours)
    return found


@dataclass(frozen=True, slots=True)
class NormExecution:
    """What ran for one norm.

    Args:
        module: path of the norm in the checkpoint.
        op_type: of its node.
        implementation: "fused" or "function".
        provider: the execution provider that ran it; empty for a function.
        expected: the provider that the backend is named for; empty accepts any.
        copies: between host and device, directly at its inputs and outputs.
    """

    module: str
    op_type: str
    _: KW_ONLY
    implementation: str
    provider: str
    expected: str = ""
    copies: int = 0

    @property
    def problem(self) -> str:
        """Why this does not count as fused; empty where it does."""
        if self.implementation != "fused":
            return "ran as a function, not as a fused kernel"
        if self.expected and self.provider != self.expected:
            return f"ran on {self.provider}, not on {self.expected}"
        if self.copies:
            return f"ran fused, with {self.copies} memory copies between host and device beside it"
        return ""


def norm_executions(
    model: ExportedModel, inputs: Arrays, *, library: Path | None, backend: str = "ort-cpu"
) -> tuple[NormExecution, ...]:
    """Which implementation ran for every norm of `model`, from the session's own profile of one pass.

    A fused kernel appears under the node's name and op type; a function has been expanded into other
    nodes, so neither does. On a GPU the graph that the session ran is read for copies beside the norms.
    """
    from ibnorm_export.runtimes.ort import OrtRunner  # needs onnxruntime

    if not model.norms:
        return ()
    wanted = frozenset((n.name, n.op_type) for n in model.norms)
    expected: str = ""
    copies: Mapping[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        runner: OrtRunner | OrtCudaRunner
        if backend == "ort-cuda":
            from ibnorm_export.runtimes.ort_cuda import CUDA_PROVIDER, OrtCudaRunner

            expected, optimised = CUDA_PROVIDER, Path(folder) / "optimised.onnx"
            runner = OrtCudaRunner(model.path, library=library, profile=Path(folder) / "norms", optimised=optimised)
            copies = copies_beside(onnx.load(optimised, load_external_data=False).graph, wanted)
        else:
            runner = OrtRunner(model.path, library=library, profile=Path(folder) / "norms")
        runner.run(inputs)
        events = runner.end_profile()
    return _executions(model, events, expected=expected, copies=copies)


def _executions(
    model: ExportedModel, events: Sequence[dict[str, Any]], *, expected: str, copies: Mapping[tuple[str, str], int]
) -> tuple[NormExecution, ...]:
    """Every norm of `model` by the events of a profile and the copies beside it."""
    ran = {
        (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]): event["args"].get("provider", "")
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return tuple(
        NormExecution(
            n.module, n.op_type, implementation="fused", provider=ran[key], expected=expected, copies=copies.get(key, 0)
        )
        if (key := (n.name, n.op_type)) in ran
        else NormExecution(n.module, n.op_type, implementation="function", provider="", expected=expected)
        for n in model.norms
    )
