"""Run a model once and keep the values that reach its norms."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.graph.stored_graph import follow_links, read_graph
from ibnorm_export.op.norm_variants import AxesIBNorm, BatchIBNorm, ChannelIBNorm
from ibnorm_export.op.spec import DOMAIN, Compression, IBNormSpec
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.runtimes.torch import TorchRunner

__all__ = ["Capture", "NormInput", "capture_checkpoint", "capture_file", "used_rows"]

#: Prefix of the outputs that are added to a file.
_PREFIX: Final = "norm input:"


@dataclass(frozen=True, slots=True)
class NormInput:
    """What reached one norm.

    Args:
        spec: the norm, over the last axis.
        x: values (..., n), the normalised axis last.
        scale, bias: parameters (n,), if the norm applies them.
    """

    spec: IBNormSpec
    x: NDArray[Any]
    scale: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Capture:
    """One pass of a model.

    Args:
        norms: input of each norm by its path, in the order of the pass.
        outputs: outputs of the model.
        skipped: paths of norms with running statistics, which have no rows to describe.
    """

    norms: Mapping[str, NormInput]
    outputs: Arrays
    skipped: tuple[str, ...] = ()


def _rows_last(norm: IBNorm, x: torch.Tensor) -> torch.Tensor:
    """`x` with the values that are normalised together in its last axis."""
    if isinstance(norm, ChannelIBNorm):
        return x.movedim(1, -1)
    return x.flatten(norm.spec.axis) if isinstance(norm, AxesIBNorm) else x


def _norm_input(norm: IBNorm, x: torch.Tensor) -> NormInput:
    scale, bias = (
        None if parameter is None or not norm.node_has_affine else parameter.detach().double().numpy()
        for parameter in (norm.weight, norm.bias)
    )
    spec = IBNormSpec(norm.spec.compression, norm.spec.lambd, epsilon=norm.spec.epsilon)
    return NormInput(spec, _rows_last(norm, x).detach().float().numpy().copy(), scale, bias)


def used_rows(model: LoadedModel, inputs: Arrays) -> dict[str, NDArray[np.bool_]]:
    """Find which rows of each sample reach an output, by norm: a mask (rows of a sample,).

    An exporter leaves the others out: of a classifier's last block, only the class token is computed. A row reaches no
    output when the derivative of every output with respect to it is zero, in every sample.

    Args:
        model: the checkpoint; a copy of it runs in float32.
        inputs: one batch.
    """
    module = model.in_dtype(torch.float32)
    leaves: dict[str, tuple[IBNorm, torch.Tensor]] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        def add_zero(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            assert isinstance(norm, IBNorm)
            zero = torch.zeros_like(args[0], requires_grad=True)  # its derivative is that with respect to the input
            leaves.setdefault(path, (norm, zero))
            return (args[0] + zero, *args[1:])

        return add_zero

    for path, norm in module.named_modules():
        if isinstance(norm, IBNorm):
            norm.register_forward_pre_hook(hook(path))
    tensors = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in model.inputs]
    outputs = model.entry(module)(*(t.float() if t.is_floating_point() else t for t in tensors))
    # random weights, because the sum of what a norm returns does not depend on its input
    draws = torch.Generator().manual_seed(0)
    total = sum((o * torch.randn(o.shape, generator=draws)).sum() for o in outputs if o.is_floating_point())
    assert isinstance(total, torch.Tensor)
    zeros = [zero for _, zero in leaves.values()]
    derivatives = torch.autograd.grad(total, zeros, allow_unused=True)
    found = {}
    for (path, (norm, zero)), derivative in zip(leaves.items(), derivatives, strict=True):
        rows = _rows_last(norm, zero if derivative is None else derivative)
        found[path] = (rows.reshape(len(rows), -1, rows.shape[-1]) != 0.0).any(-1).any(0).numpy()
    return found


def capture_checkpoint(model: LoadedModel, module: nn.Module, *, inputs: Arrays) -> Capture:
    """Run `module`, a copy of `model` in some type, in PyTorch. A norm that runs twice keeps its first input."""
    norms: dict[str, NormInput] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], object], None]:
        def keep(norm: nn.Module, args: tuple[torch.Tensor, ...], _: object) -> None:
            assert isinstance(norm, IBNorm)
            if path not in norms:
                norms[path] = _norm_input(norm, args[0])

        return keep

    hooks = [m.register_forward_hook(hook(path)) for path, m in module.named_modules() if isinstance(m, IBNorm)]
    try:
        outputs = TorchRunner(model, module).run(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    skipped = tuple(path for path, m in module.named_modules() if isinstance(m, BatchIBNorm))
    return Capture(norms, outputs, skipped)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a norm's input, scale and bias are found in a file."""

    spec: IBNormSpec
    x: str
    scale: str
    bias: str


def _write_with_norm_inputs(exported: ExportedModel, file: Path) -> dict[str, _Place]:
    """Write a copy of the file that also outputs the input of each norm."""
    model = follow_links(read_graph(exported))
    places: dict[str, _Place] = {}
    for node in list(model.graph):
        if node.domain != DOMAIN or not node.name:
            continue
        x = node.outputs[1] if node.op_type.startswith("Skip") else node.inputs[0]
        scale, bias = node.inputs[-2:]
        assert x is not None and scale is not None and bias is not None
        name = f"{_PREFIX}{node.name}"
        copy = ir.node("Identity", [x], name=name)
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, x.type, x.shape
        model.graph.append(copy)
        model.graph.outputs.append(copy.outputs[0])
        kind = Compression(node.op_type[-1])
        spec = IBNormSpec(kind, node.attributes["lambd"].as_float(), epsilon=node.attributes["epsilon"].as_float())
        places[node.name] = _Place(spec, name, str(scale.name), str(bias.name))
    ir.save(model, file, external_data=f"{file.name}.data")
    return places


def capture_file(exported: ExportedModel, inputs: Arrays) -> Capture:
    """Run an exported file in ONNX Runtime, in its own type.

    Raises:
        BackendUnavailable: ONNX Runtime is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "norm-inputs.onnx"
        places = _write_with_norm_inputs(exported, file)
        outputs = open_runner(Backend.ORT_CPU, ExportedModel(file)).run(inputs)
    norms = {
        module: NormInput(
            place.spec,
            np.asarray(outputs[place.x], np.float32),
            exported.array(place.scale),
            exported.array(place.bias),
        )
        for module, place in places.items()
    }
    own = {name: np.asarray(v, np.float32) for name, v in outputs.items() if not name.startswith(_PREFIX)}
    return Capture(norms, own)
