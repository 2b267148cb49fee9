"""How each norm of a model ran in ONNX Runtime: fused or as a function, on which provider, and with which copies.

ONNX Runtime inserts `MemcpyFromHost` and `MemcpyToHost` between neighbours that run on different devices. Such a copy
costs more than the norm itself, so a fused kernel next to one does not count as fused.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import onnx

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.optional_packages import import_package
from ibnorm_export.runtimes.runner import Backend, NormImplementation, Runner

__all__ = ["COPY_OPS", "NormExecution", "copies_next_to", "norm_executions", "norms_summary"]

#: Op types of the nodes with which ONNX Runtime copies tensors between host and device.
COPY_OPS = frozenset({"MemcpyFromHost", "MemcpyToHost"})


def copies_next_to(graph: onnx.GraphProto, nodes: frozenset[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
    """Count the copies that touch each of `nodes` directly, at an input or an output.

    Args:
        graph: the graph after the runtime has optimised it.
        nodes: (name, op type) of the nodes to look at; a node that is not in the graph has no copies.

    Returns:
        The number of copy nodes by (name, op type). A copy counts once for a node, even if several edges join the two.
    """
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    consumers: dict[str, set[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            if name:
                consumers.setdefault(name, set()).add(index)
    executions: Counter[tuple[str, str]] = Counter()
    for node in graph.node:
        key = (node.name, node.op_type)
        if key not in nodes:
            continue
        neighbours = {producers[name] for name in node.input if name in producers}
        neighbours.update(*(consumers.get(name, set()) for name in node.output))
        executions[key] += sum(graph.node[index].op_type in COPY_OPS for index in neighbours)
    return executions


@dataclass(frozen=True, slots=True)
class NormExecution:
    """What ran for one norm.

    Args:
        module: path of the norm in the checkpoint.
        op_type: op type of its node, e.g. "IBNormL".
        implementation: how it ran.
        provider: the execution provider that ran it; empty for a function.
        expected: the provider that should have run it; empty accepts any.
        copies: number of copies between host and device directly at its inputs and outputs.
    """

    module: str
    op_type: str
    _: KW_ONLY
    implementation: NormImplementation
    provider: str
    expected: str = ""
    copies: int = 0

    @property
    def problem(self) -> str:
        """Why this norm does not count as fused; empty if it does."""
        if self.implementation != NormImplementation.FUSED:
            return "ran as a function, not as a fused kernel"
        if self.expected and self.provider != self.expected:
            return f"ran on {self.provider}, not on {self.expected}"
        if self.copies:
            return f"ran fused, but with {_memory_copies(self.copies)} between host and device at its inputs or outputs"
        return ""


def norms_summary(norms: Sequence[NormExecution]) -> str:
    """Summarise in one line how the norms ran."""
    fused = sum(norm.implementation == NormImplementation.FUSED for norm in norms)
    copies = sum(norm.copies for norm in norms)
    suffix = f", with {_memory_copies(copies)} next to them" if copies else ""
    return f"norms: {fused} of {len(norms)} ran as fused kernels{suffix}"


def _memory_copies(count: int) -> str:
    return "1 memory copy" if count == 1 else f"{count} memory copies"


def norm_executions(
    model: ExportedModel,
    inputs: Arrays,
    *,
    library: Path | None,
    backend: str = Backend.ORT_CPU,
    maps_weights: bool = False,
    keep: Callable[[Runner], None] | None = None,
) -> tuple[NormExecution, ...]:
    """Find out how every norm of `model` ran, from the session's own profile of one pass.

    A fused kernel appears in the profile under the node's name and op type. A function does not, since ONNX Runtime
    has expanded it into other nodes. On a GPU the optimised graph is searched for copies next to the norms.

    Args:
        model: the model to run.
        inputs: inputs of the pass, by name.
        library: fused kernels to register; None runs the norms as functions.
        backend: "ort-cpu" or "ort-cuda".
        maps_weights: as in `RunnerRequest`.
        keep: on the CPU, receives the runner when its profile has ended, to go on with; its threads do not spin.

    Returns:
        One entry for each norm, in the order of the file.

    Raises:
        ModelFileError: the runtime cannot load or run the model.
        BackendUnavailable: onnxruntime is not installed, or there is no GPU for "ort-cuda".
    """
    if not model.norms:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        if backend == Backend.ORT_CUDA:
            return _on_cuda(model, inputs, library=library, folder=Path(folder))
        return _on_cpu(model, inputs, library=library, folder=Path(folder), maps_weights=maps_weights, keep=keep)


def _on_cpu(
    model: ExportedModel,
    inputs: Arrays,
    *,
    library: Path | None,
    folder: Path,
    maps_weights: bool,
    keep: Callable[[Runner], None] | None,
) -> tuple[NormExecution, ...]:
    import_package("onnxruntime", extra="cpu", purpose="backend ort-cpu")
    from ibnorm_export.runtimes.ort import OrtRunner

    runner = OrtRunner(
        model.path,
        library=library,
        data_folder=model.data_folder,
        profile=folder / "norms",
        spins=False,
        maps_weights=maps_weights,
    )
    runner.run(inputs)
    executions = _executions(model, runner.end_profile(), expected="", copies={})
    if keep is not None:
        keep(runner)
    return executions


def _on_cuda(model: ExportedModel, inputs: Arrays, *, library: Path | None, folder: Path) -> tuple[NormExecution, ...]:
    from ibnorm_export.runtimes.ort_cuda import CUDA_PROVIDER, OrtCudaRunner  # needs onnxruntime and torch

    optimised = folder / "optimised.onnx"
    runner = OrtCudaRunner(model.path, library=library, profile=folder / "norms", optimised=optimised)
    nodes = frozenset((norm.name, norm.op_type) for norm in model.norms)
    copies = copies_next_to(onnx.load(optimised, load_external_data=False).graph, nodes)
    runner.run(inputs)
    return _executions(model, runner.end_profile(), expected=CUDA_PROVIDER, copies=copies)


def _executions(
    model: ExportedModel, events: Sequence[dict[str, Any]], *, expected: str, copies: Mapping[tuple[str, str], int]
) -> tuple[NormExecution, ...]:
    """Combine the norms of `model` with the events of a profile and the copies next to the norms."""
    providers = {
        (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]): event["args"].get("provider", "")
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    executions = []
    for norm in model.norms:
        key = (norm.name, norm.op_type)
        executions.append(
            NormExecution(
                norm.module,
                norm.op_type,
                implementation=NormImplementation.FUSED if key in providers else NormImplementation.FUNCTION,
                provider=providers.get(key, ""),
                expected=expected,
                copies=copies.get(key, 0) if key in providers else 0,
            )
        )
    return tuple(executions)
