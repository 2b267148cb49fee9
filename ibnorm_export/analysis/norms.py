"""What every IBNorm of a model does to the values that reach it: kurtosis, variance and information, by depth.

The values are those of the model as it is, run in each asked type. Another lambda is applied to the same
values, so its rows say what that norm alone would do to them, not what a model trained with it would.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from ibnorm_export.analysis.information import BETA, excess_kurtosis, information_bottleneck
from ibnorm_export.analysis.options import AnalysisOptions
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError
from ibnorm_export.op import reference
from ibnorm_export.op.norm_variants import AxesIBNorm, BatchIBNorm, ChannelIBNorm
from ibnorm_export.op.spec import DOMAIN, Compression, IBNormSpec
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.registry import open_runner
from ibnorm_export.runtimes.torch import TorchRunner

__all__ = ["AnalysisReport", "LayerAnalysis", "analyze_checkpoint", "analyze_file", "contraction"]

Rows = NDArray[np.float64]

#: Below it the entropies, at most log2 of the number of samples, say little.
_FEW: Final = 32


@dataclass(frozen=True, slots=True)
class LayerAnalysis:
    """One norm, in one type and with one lambda.

    Args:
        module: its path.
        compression: "S", "L" or "T".
        dtype: that the model ran in.
        lambd: canonical; `own` says whether it is the norm's.
        kurtosis_before, kurtosis_after: mean excess kurtosis of a row of x, and of g((x - mean) / lambda).
        deviation: root mean square over rows of the standard deviation of x.
        contraction: variance after compression over that before, both in units of lambda squared; at most 1.
        about_target, about_input: I(T; Y) and I(T; X) in bits; T is the norm's output.
        bottleneck: I(T; Y) - BETA * I(T; X) in bits.
    """

    module: str
    compression: str
    _: KW_ONLY
    dtype: str
    lambd: float
    own: bool
    kurtosis_before: float
    kurtosis_after: float
    deviation: float
    contraction: float
    about_target: float
    about_input: float
    bottleneck: float


@dataclass(frozen=True, slots=True)
class AnalysisReport:
    """All rows, norms in the order of the model, and what the numbers rest on."""

    source: str
    rows: tuple[LayerAnalysis, ...]
    _: KW_ONLY
    samples: int
    target: str
    alpha: float
    beta: float
    width: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What reached one norm: x (..., n), normalised rows last; scale and bias (n,) where the norm applies them."""

    spec: IBNormSpec
    x: NDArray[Any]
    scale: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None


def _compressed(rows: Rows, spec: IBNormSpec) -> tuple[Rows, Rows]:
    """(t, c) of rows (m, n): t = (x - mean) / lambda, c = g(t)."""
    t = (rows - rows.mean(-1, keepdims=True)) / spec.lambd
    match spec.compression:
        case Compression.LINEAR:
            return t, t
        case Compression.LOGARITHMIC:
            return t, np.copysign(np.log1p(np.abs(t)), t)
        case Compression.TANH:
            return t, np.tanh(t)


def contraction(rows: NDArray[Any], spec: IBNormSpec) -> float:
    """Variance of g(t) over that of t = (x - mean) / lambda, summed over rows (m, n); 1 for S and for no spread."""
    t, c = _compressed(np.asarray(rows, np.float64), spec)
    before, after = float(t.var(-1).sum()), float(c.var(-1).sum())
    return after / before if before else 1.0


def _pooled(values: NDArray[Any], count: int) -> NDArray[Any]:
    """One row a sample: (count, n) as they are; where there are more positions than samples, their mean per sample."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if len(rows) == count else values.reshape(count, -1, values.shape[-1]).mean(1)


def _layer(
    module: str,
    seen: _Seen,
    *,
    lambd: float,
    dtype: str,
    first: NDArray[Any],
    target: NDArray[Any],
    chosen: NDArray[Any],
    options: AnalysisOptions,
) -> LayerAnalysis:
    spec = dataclasses.replace(seen.spec, lambd=lambd)
    rows = np.asarray(seen.x, np.float64).reshape(-1, seen.x.shape[-1])
    output = reference.ibnorm(seen.x, seen.scale, bias=seen.bias, spec=spec)
    x, t = (_pooled(v, len(target))[chosen] for v in (first, output))
    information = information_bottleneck(x, t, target=target[chosen], alpha=options.alpha, width=options.width)
    return LayerAnalysis(
        module,
        spec.compression.value,
        dtype=dtype,
        lambd=lambd,
        own=lambd == seen.spec.lambd,
        kurtosis_before=excess_kurtosis(rows),
        kurtosis_after=excess_kurtosis(_compressed(rows, spec)[1]),
        deviation=float(np.sqrt(rows.var(-1).mean())),
        contraction=contraction(rows, spec),
        about_target=information.about_target,
        about_input=information.about_input,
        bottleneck=information.value(),
    )


def _analysed(
    seen: Mapping[str, _Seen], dtype: str, *, target: NDArray[Any], options: AnalysisOptions
) -> Iterable[LayerAnalysis]:
    if not seen:
        return
    count = min(options.samples, len(target))
    chosen = np.random.default_rng(options.seed).choice(len(target), count, replace=False)
    first = next(iter(seen.values())).x
    for module, norm in seen.items():
        for lambd in dict.fromkeys((norm.spec.lambd, *options.lambdas)):
            yield _layer(
                module, norm, lambd=lambd, dtype=dtype, first=first, target=target, chosen=chosen, options=options
            )


def _see(module: nn.Module, model: LoadedModel, *, inputs: Arrays) -> tuple[dict[str, _Seen], list[str], Arrays]:
    """What reached the norms of `module` in one pass, in the order of the pass; who was left out; the outputs."""
    seen: dict[str, _Seen] = {}

    def keep(path: str, norm: IBNorm) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], __: object) -> None:
            x = args[0]
            if isinstance(norm, ChannelIBNorm):
                x = x.movedim(1, -1)
            elif isinstance(norm, AxesIBNorm):
                x = x.flatten(norm.spec.axis)
            scale, bias = (
                None if p is None or not norm.node_has_affine else p.detach().double().numpy()
                for p in (norm.weight, norm.bias)
            )
            rows = IBNormSpec(norm.spec.compression, norm.spec.lambd, epsilon=norm.spec.epsilon)
            seen.setdefault(path, _Seen(rows, x.detach().float().numpy().copy(), scale, bias))

        return hook

    norms = [(path, m) for path, m in module.named_modules() if isinstance(m, IBNorm)]
    hooks = [norm.register_forward_hook(keep(path, norm)) for path, norm in norms]
    try:
        outputs = TorchRunner(model, module).run(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    left = [path for path, m in module.named_modules() if isinstance(m, BatchIBNorm)]
    return seen, left, outputs


def _targets(inputs: Arrays, outputs: Arrays, *, labels: NDArray[Any] | None) -> tuple[NDArray[Any], str]:
    """What the representation should tell, one a sample, and in words."""
    logits = next(iter(outputs.values()))
    if labels is not None:
        if labels.shape != logits.shape[:-1]:
            raise ModelFileError(f"labels have shape {labels.shape}; the model gives {logits.shape[:-1]} predictions")
        return labels.reshape(-1), "the labels given"
    if "input_ids" in inputs:
        ids = np.roll(inputs["input_ids"], -1, axis=1)
        ids[:, -1] = logits[:, -1].argmax(-1)
        return ids.reshape(-1), "the next token (of the last position, the model's own prediction)"
    return logits.argmax(-1).reshape(-1), "the model's own prediction"


def _report(
    source: str,
    rows: Iterable[LayerAnalysis],
    *,
    count: int,
    target: str,
    options: AnalysisOptions,
    left: Sequence[str],
) -> AnalysisReport:
    rows = tuple(rows)
    if not rows:
        raise ModelFileError(f"{source}: no IBNorm with statistics of its own values ran: nothing to analyse")
    width = "median distance between samples" if options.width is None else f"{options.width:g}"
    notes = []
    if left:
        notes.append(f"running statistics have no rows to describe, so these are left out: {', '.join(left[:5])}")
    used = min(options.samples, count)
    if used < _FEW:
        notes.append(f"{used} samples are too few for the information in bits; give a larger batch")
    return AnalysisReport(
        source, rows, samples=used, target=target, alpha=options.alpha, beta=BETA, width=width, notes=tuple(notes)
    )


def analyze_checkpoint(
    model: LoadedModel,
    inputs: Arrays,
    *,
    labels: NDArray[Any] | None = None,
    options: AnalysisOptions | None = None,
    progress: Progress = silent,
) -> AnalysisReport:
    """Every IBNorm of a checkpoint, run in PyTorch.

    Args:
        model: the checkpoint.
        inputs: one batch.
        labels: classes (batch,), or of every token (batch, sequence); None takes the next token, or the
            model's own prediction.
        options: see `AnalysisOptions`.
        progress: called as the work goes on.

    Raises:
        ModelFileError: labels do not fit, or there is no such norm.
    """
    options = AnalysisOptions() if options is None else options
    rows: list[LayerAnalysis] = []
    count, words, left = 0, "", list[str]()
    for index, dtype in enumerate(options.dtypes):
        progress(f"analysing in {dtype.value}", index, len(options.dtypes))
        seen, left, outputs = _see(model.in_dtype(torch_dtype(dtype)), model, inputs=inputs)
        target, words = _targets(inputs, outputs, labels=labels)
        count = len(target)
        rows += _analysed(seen, dtype.value, target=target, options=options)
    return _report(model.source, rows, count=count, target=words, options=options, left=left)


def _with_norm_inputs(exported: ExportedModel, file: Path) -> dict[str, tuple[str, IBNormSpec, str, str]]:
    """Write a copy whose outputs have each norm's input too: module -> (output, spec, scale, bias)."""
    model = ir.load(exported.path)
    found: dict[str, tuple[str, IBNormSpec, str, str]] = {}
    for node in list(model.graph):
        if node.domain != DOMAIN or not node.name:
            continue
        skip = node.op_type.startswith("Skip")
        x = node.outputs[1] if skip else node.inputs[0]
        scale, bias = node.inputs[-2:]
        assert x is not None and scale is not None and bias is not None
        copy = ir.node("Identity", [x], name=f"seen:{node.name}")
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = f"seen:{node.name}", x.type, x.shape
        model.graph.append(copy)
        model.graph.outputs.append(copy.outputs[0])
        kind = Compression(node.op_type[-1])
        spec = IBNormSpec(kind, node.attributes["lambd"].as_float(), epsilon=node.attributes["epsilon"].as_float())
        found[node.name] = (f"seen:{node.name}", spec, str(scale.name), str(bias.name))
    ir.save(model, file, external_data=f"{file.name}.data")
    return found


def analyze_file(
    exported: ExportedModel,
    inputs: Arrays,
    *,
    labels: NDArray[Any] | None = None,
    options: AnalysisOptions | None = None,
    progress: Progress = silent,
) -> AnalysisReport:
    """Every IBNorm node of an exported file, run in ONNX Runtime in the file's own type.

    Args:
        exported: the file.
        inputs, labels, options, progress: as in `analyze_checkpoint`; `options.dtypes` plays no part.

    Raises:
        ModelFileError: labels or inputs do not fit, or there is no norm node.
        BackendUnavailable: ONNX Runtime is not installed.
    """
    options = AnalysisOptions() if options is None else options
    if (taken := {tensor.name for tensor in exported.inputs}) != set(inputs):
        raise ModelFileError(
            f"{exported.path} takes {sorted(taken)}; the inputs are {sorted(inputs)}: name the checkpoint that it was "
            "exported from"
        )
    progress("analysing", 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seen.onnx"
        places = _with_norm_inputs(exported, file)
        outputs = open_runner("ort-cpu", ExportedModel(file)).run(inputs)
    seen = {
        module: _Seen(spec, np.asarray(outputs[name], np.float32), exported.array(scale), exported.array(bias))
        for module, (name, spec, scale, bias) in places.items()
    }
    outputs = {name: np.asarray(v, np.float32) for name, v in outputs.items() if not name.startswith("seen:")}
    target, words = _targets(inputs, outputs, labels=labels)
    rows = _analysed(seen, exported.dtype, target=target, options=options)
    return _report(str(exported.path), rows, count=len(target), target=words, options=options, left=())
