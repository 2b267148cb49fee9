"""(exported file, checkpoint) -> ParityReport: does the file say, and compute, what the checkpoint means?

Two verdicts. *Static* reads the file: every norm node, function body and weight against the
checkpoint. *Numeric* runs it: PyTorch in float64 is the truth, PyTorch in the model's own dtype is
the yardstick, and a runtime fails when it is clearly further from the truth than PyTorch is.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ibnorm_export import onnx_op
from ibnorm_export.artifact import ExportedModel, NormNode
from ibnorm_export.errors import ModelFileError, ParityError
from ibnorm_export.loaded import Arrays, DType, LoadedModel
from ibnorm_export.module import IBNorm
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runners.base import Runner, open_runner
from ibnorm_export.runners.torch_runner import TorchRunner
from ibnorm_export.spec import DOMAIN

__all__ = [
    "BOUNDS",
    "Bound",
    "Finding",
    "NumericReport",
    "OutputParity",
    "ParityReport",
    "StaticReport",
    "VerifyOptions",
    "read_inputs",
    "verify",
]


@dataclass(frozen=True, slots=True)
class Bound:
    """A runtime passes with error <= factor * (PyTorch's own error) + floor; errors are norm-wise relative."""

    factor: float
    floor: float


#: The one table of tolerances.
#: fp32: another order of summation costs up to about twice PyTorch's error; the floor covers models
#: so small that PyTorch's own error is luck. Halves: rounding of storage dominates and is the same
#: on both sides, so the factor is tighter and nothing is forgiven absolutely.
BOUNDS: Final = {DType.FP32: Bound(3.0, 1e-6), DType.FP16: Bound(2.0, 0.0), DType.BF16: Bound(2.0, 0.0)}


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify.

    Args:
        backend: see `ibnorm_export.runners.BACKENDS`.
        samples: how many inputs to draw; the family walks through the shapes that matter.
        seed: of the inputs.
        static: whether to give the static verdict too.
    """

    backend: str = "ort-cpu"
    samples: int = 4
    seed: int = 0
    static: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, where, and in words."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class StaticReport:
    """What reading the file showed; true when nothing is wrong and something was read."""

    norms: int
    weights: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.findings and self.norms > 0 and self.weights > 0


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output over all samples. Errors are norm-wise relative to the float64 truth."""

    name: str
    max_abs: float
    error: float
    torch_error: float
    worst_sample: int
    worst_sample_error: float
    allowed: float
    ratio: float
    cosine: float
    top1_agreement: float | None
    elements: int
    passed: bool


@dataclass(frozen=True, slots=True)
class NumericReport:
    """What running the file showed; true when every output passed and there was one."""

    backend: str
    dtype: str
    method: str
    samples: int
    outputs: tuple[OutputParity, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.outputs) and all(o.passed for o in self.outputs) and not self.findings


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Both verdicts; true only when each that was asked for is."""

    model: str
    checkpoint: str
    static: StaticReport | None
    numeric: NumericReport | None
    notes: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        asked = [part for part in (self.static, self.numeric) if part is not None]
        return bool(asked) and all(asked)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, static first."""
        return tuple(f for part in (self.static, self.numeric) if part is not None for f in part.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with `verdict` "pass" or "fail" for the whole and for each part."""
        content = asdict(self)
        for name, part in (("static", self.static), ("numeric", self.numeric)):
            if part is not None:
                content[name]["verdict"] = "pass" if part else "fail"
        return {"verdict": "pass" if self else "fail", **content}

    def raise_if_failed(self) -> None:
        """Raise ParityError with the first findings when the report is false."""
        if not self:
            raise ParityError(f"{self.model}: " + "; ".join(str(f) for f in self.findings[:3]))


# ---- static -------------------------------------------------------------------------------------


def _float32(array: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(array, dtype=np.float32)  # exact for float16 and bfloat16


def _compare_weight(file: NDArray[Any], tensor: Tensor, dtype: torch.dtype, transposed: bool) -> str | None:
    wanted = tensor.detach().to(dtype).float() if tensor.is_floating_point() else tensor.detach()
    expected = (wanted.T if transposed else wanted).numpy()
    if file.shape != expected.shape:
        return f"shape is {file.shape}; the checkpoint has {expected.shape}"
    actual = _float32(file) if tensor.is_floating_point() else file
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    if same.all():
        return None
    wrong = int(same.size - np.count_nonzero(same))
    flips = int(np.count_nonzero((actual == -expected) & ~same))
    largest = float(np.nanmax(np.abs(actual.astype(np.float64) - expected)))
    signs = f", {flips} of them in sign alone" if flips else ""
    return f"{wrong} of {same.size} values differ from the checkpoint{signs}; largest difference {largest:.3g}"


def _check_norm(node: NormNode, module: IBNorm) -> Iterable[Finding]:
    spec = module.spec
    where = f"norm {node.module} (node {node.name})"
    plain = node.op_type.removeprefix("Skip")
    if plain != spec.op_type:
        yield Finding(where, f"op type is {node.op_type}; the checkpoint has {spec.op_type}")
    for name, expected in spec.attributes().items():
        if name not in node.attributes:
            yield Finding(where, f"attribute {name} is missing; it must be {expected!r}")
        elif node.attributes[name] != expected:
            yield Finding(where, f"attribute {name} is {node.attributes[name]!r}; the checkpoint has {expected!r}")
    for role, name, parameter in (("scale", node.scale, module.weight), ("bias", node.bias, module.bias)):
        state_name = "weight" if role == "scale" else "bias"
        constant = {"scale": "ones", "bias": "zeros"}[role]
        wanted = f"{node.module}.{state_name}" if parameter is not None else f"ibnorm.{constant}.{module.features}"
        if name != wanted:
            yield Finding(where, f"{role} is connected to {name!r}; it must be {wanted!r}")


def _check_functions(model: ExportedModel) -> Iterable[Finding]:
    canonical = onnx_op.functions(model.opset)
    carried = {f.name: f for f in model.proto.functions if f.domain == DOMAIN}
    for op_type in sorted({node.op_type for node in model.norms}):
        where = f"function {op_type}"
        if op_type not in carried:
            yield Finding(where, "is not in the file, so runtimes without the kernel cannot run it")
            continue
        want, have = canonical[op_type], carried[op_type]
        if [n.op_type for n in have.node] != [n.op_type for n in want.node]:
            different = [
                f"{a.op_type} for {b.op_type}" for a, b in zip(have.node, want.node, strict=False)
                if a.op_type != b.op_type
            ]  # fmt: skip
            detail = ", ".join(different) or f"{len(have.node)} nodes for {len(want.node)}"
            yield Finding(where, f"its body is not the operator's: {detail}")
        elif _body(have) != _body(want):
            yield Finding(where, "its body is not the operator's: wiring or attributes differ")


def _body(function: onnx.FunctionProto) -> list[Any]:
    """What a function computes, free of the names of its values."""
    numbers: dict[str, int] = {"": -1}
    for name in function.input:
        numbers.setdefault(name, len(numbers))
    body: list[Any] = [list(function.attribute)]
    for node in function.node:
        inputs = [numbers.get(name, f"undefined {name}") for name in node.input]
        for name in node.output:
            numbers.setdefault(name, len(numbers))
        attributes = sorted(
            (a.name, a.ref_attr_name or repr(onnx.helper.get_attribute_value(a))) for a in node.attribute
        )
        body.append((node.domain, node.op_type, inputs, attributes, [numbers[n] for n in node.output]))
    return [*body, [numbers.get(name) for name in function.output]]


def _check_static(exported: ExportedModel, model: LoadedModel, reach: _Reach) -> StaticReport:
    findings: list[Finding] = []
    notes: list[str] = []
    dtype = DType(exported.dtype).torch
    modules = {path: m for path, m in model.module.named_modules() if isinstance(m, IBNorm)}
    inlined = bool(exported.metadata.get("inlined"))
    if inlined:
        notes.append(
            "the norms are inlined, so their nodes cannot be told from others: weights were compared, lambda and "
            "epsilon are judged by the numeric verdict alone"
        )
    else:
        nodes = {node.module: node for node in exported.norms}
        for path in modules:
            if path in reach.norms and path not in nodes:
                findings.append(Finding(f"norm {path}", "has no node in the file: the norm was dropped"))
        for node in exported.norms:
            if node.module not in modules:
                findings.append(Finding(f"norm {node.module}", "is in the file but not in the checkpoint"))
            else:
                findings.extend(_check_norm(node, modules[node.module]))
        findings.extend(_check_functions(exported))
    for name in exported.weights:
        kind, _, _ = name.removeprefix("ibnorm.").partition(".")
        if name.startswith("ibnorm.") and kind in ("ones", "zeros"):
            constant = 1.0 if kind == "ones" else 0.0
            if not bool((_float32(exported.array(name)) == constant).all()):
                findings.append(Finding(f"constant {name}", f"must hold {constant:g} throughout"))

    state = model.module.state_dict(keep_vars=True)
    buffers = dict(model.module.named_buffers())
    compared = 0
    in_file: set[int] = set()
    for name, tensor in {**buffers, **state}.items():
        for stored, transposed in ((name, False), (f"{name}.T", True)):
            if stored not in exported.weights:
                continue
            compared += 1
            in_file.add(id(tensor))
            # a buffer that no checkpoint saves keeps its own type in the file
            problem = _compare_weight(
                exported.array(stored), tensor, dtype if name in state else tensor.dtype, transposed
            )
            if problem:
                findings.append(Finding(f"weight {stored}", problem))
    for name, tensor in state.items():
        if id(tensor) not in in_file and tensor.untyped_storage().data_ptr() in reach.storages:
            findings.append(Finding(f"weight {name}", "is used by the checkpoint but is not in the file"))
    unused = [n for n, t in state.items() if t.untyped_storage().data_ptr() not in reach.storages]
    if unused:
        notes.append(f"{len(unused)} weights of the checkpoint play no part in its output: {', '.join(unused[:5])}")
    return StaticReport(len(modules) if inlined else len(exported.norms), compared, tuple(findings), tuple(notes))


# ---- numeric ------------------------------------------------------------------------------------


class _Reach(TorchDispatchMode):
    """Watches a float64 run: which weights and norms it reaches, and what is not float64 in it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self.norms: set[str] = set()
        self.narrow: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.storages.add(value.untyped_storage().data_ptr())
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                self.narrow.add(str(func))
        return result

    def run(self, model: LoadedModel, module: nn.Module, inputs: Arrays) -> None:
        """One pass over `module`, a copy of `model.module`."""

        def note(path: str) -> Any:
            return lambda *_: self.norms.add(path)

        hooks = [m.register_forward_hook(note(path)) for path, m in module.named_modules() if isinstance(m, IBNorm)]
        tensors = [torch.from_numpy(inputs[s.name]) for s in model.inputs]
        tensors = [t.double() if t.is_floating_point() else t for t in tensors]
        try:
            with torch.inference_mode(False), torch.no_grad(), self:
                model.entry(module)(*tensors)
        finally:
            for hook in hooks:
                hook.remove()


def _relative(difference: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(np.sqrt(difference / norm))


@dataclass
class _Sums:
    """Running sums of one output over the samples."""

    per_sample: list[tuple[float, float, float]] = field(default_factory=list)  # runtime, torch, truth: squares
    max_abs: float = 0.0
    dot: float = 0.0
    actual: float = 0.0
    agree: int = 0
    rows: int = 0
    elements: int = 0

    def add(self, actual: NDArray[Any], own: NDArray[Any], truth: NDArray[Any]) -> None:
        a, o, t = (v.astype(np.float64) for v in (actual, own, truth))
        with np.errstate(invalid="ignore", over="ignore"):
            self.per_sample.append((float(((a - t) ** 2).sum()), float(((o - t) ** 2).sum()), float((t**2).sum())))
            self.max_abs = float(np.maximum(self.max_abs, np.abs(a - t).max(initial=0.0)))
            self.dot += float((a * t).sum())
            self.actual += float((a**2).sum())
        if t.ndim >= 2 and t.shape[-1] > 1 and t.size:
            self.agree += int((a.argmax(-1) == t.argmax(-1)).sum())
            self.rows += int(np.prod(t.shape[:-1]))
        self.elements += t.size

    def judge(self, name: str, bound: Bound) -> OutputParity:
        runtime, own, truth = (sum(column) for column in zip(*self.per_sample, strict=True))
        error, own_error = _relative(runtime, truth), _relative(own, truth)
        allowed = bound.factor * own_error + bound.floor
        # A short sample must not hide behind long ones: each is held to its own bound too, with
        # PyTorch's error over all samples as the least yardstick.
        worst, worst_error, each = 0, 0.0, True
        for index, (r, o, t) in enumerate(self.per_sample):
            sample_error = _relative(r, t)
            if not sample_error <= worst_error:
                worst, worst_error = index, sample_error
            each = each and sample_error <= bound.factor * max(_relative(o, t), own_error) + bound.floor
        norms = float(np.sqrt(self.actual) * np.sqrt(truth))
        return OutputParity(
            name=name,
            max_abs=self.max_abs,
            error=error,
            torch_error=own_error,
            worst_sample=worst,
            worst_sample_error=worst_error,
            allowed=allowed,
            ratio=error / own_error if own_error else (0.0 if error == 0.0 else float("inf")),
            cosine=self.dot / norms if norms else 1.0,
            top1_agreement=self.agree / self.rows if self.rows else None,
            elements=self.elements,
            passed=bool(np.isfinite(own_error) and error <= allowed and each),
        )


def _select(arrays: Arrays, name: str, valid: dict[str, NDArray[np.bool_]]) -> NDArray[Any]:
    return arrays[name][valid[name]] if name in valid else arrays[name]


def _round_inputs(inputs: Arrays, dtype: torch.dtype) -> Arrays:
    """Floating inputs as the model will see them, in float32, so that nobody is blamed for rounding them."""
    return {
        name: torch.from_numpy(a).to(dtype).float().numpy() if np.issubdtype(a.dtype, np.floating) else a
        for name, a in inputs.items()
    }


def _open(exported: ExportedModel, backend: str, dtype: DType) -> tuple[Runner, str]:
    if backend == "ort-cpu" and dtype is not DType.FP32:
        from ibnorm_export.rounding import rounding_copy
        from ibnorm_export.runners.ort_runner import OrtRunner

        return OrtRunner.from_proto(rounding_copy(exported)), (
            f"a copy that rounds every node's output to {dtype.value} by explicit Casts and does arithmetic in "
            f"float32: on a CPU, ONNX Runtime computes {dtype.value} graphs in float32 without that rounding, or not "
            "at all"
        )
    return open_runner(backend, exported), "the file as it is"


def _check_numeric(
    exported: ExportedModel, model: LoadedModel, truth: nn.Module, options: VerifyOptions, samples: Sequence[Arrays],
    narrow: set[str], progress: Progress,
) -> NumericReport:  # fmt: skip
    dtype = DType(exported.dtype)
    runner, method = _open(exported, options.backend, dtype)
    own = TorchRunner(model, model.in_dtype(dtype.torch))
    exact = TorchRunner(model, truth)
    sums = {name: _Sums() for name in model.outputs}
    findings: list[Finding] = []
    notes: list[str] = []
    if narrow:
        notes.append(
            f"the float64 truth is not float64 throughout ({', '.join(sorted(narrow)[:3])}): give CustomModel an "
            "`exact` function"
        )
    for index, inputs in enumerate(samples):
        progress("comparing", index, len(samples))
        valid = model.valid(inputs)
        true, torchs = exact.run(inputs), own.run(inputs)
        try:
            actual = runner.run(inputs)
        except ModelFileError as error:
            findings.append(Finding(f"sample {index}", str(error)))
            continue
        for name in model.outputs:
            if name not in actual or actual[name].shape != true[name].shape:
                got = actual[name].shape if name in actual else "missing"
                findings.append(Finding(f"output {name}", f"sample {index}: is {got}; it must be {true[name].shape}"))
                continue
            a, o, t = (_select(arrays, name, valid) for arrays in (actual, torchs, true))
            if not np.isfinite(t).all():
                findings.append(
                    Finding(f"output {name}", f"sample {index}: the checkpoint itself gives NaN or infinity")
                )
            elif not np.isfinite(o).all():
                findings.append(
                    Finding(
                        f"output {name}",
                        f"sample {index}: PyTorch itself overflows in {dtype.value}: the model does not fit this type",
                    )
                )
            elif not np.isfinite(a).all():
                findings.append(
                    Finding(
                        f"output {name}",
                        f"sample {index}: {int((~np.isfinite(a)).sum())} of {a.size} values are NaN or infinity where "
                        f"PyTorch's are finite: an overflow in {dtype.value}",
                    )
                )
            sums[name].add(a, o, t)
    progress("comparing", len(samples), len(samples))
    outputs = tuple(s.judge(name, BOUNDS[dtype]) for name, s in sums.items() if s.per_sample)
    for output in outputs:
        if not output.passed:
            findings.append(
                Finding(
                    f"output {output.name}",
                    f"relative error {output.error:.3g} (worst sample {output.worst_sample_error:.3g}) against float64; "
                    f"PyTorch in {dtype.value} has {output.torch_error:.3g}, allowed is {output.allowed:.3g}",
                )
            )
    return NumericReport(options.backend, dtype.value, method, len(samples), outputs, tuple(findings), tuple(notes))


def read_inputs(path: str | Path, model: LoadedModel) -> Arrays:
    """The user's own inputs from an .npz file, checked against what the model takes.

    Raises:
        ModelFileError: the file is missing or damaged, or an array is missing, or of another type or
            shape; the message names it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, MemoryError) as error:
        raise ModelFileError(f"{path} is not an .npz file of plain arrays: {error}") from error
    wanted = [spec.name for spec in model.inputs]
    if sorted(arrays) != sorted(wanted):
        raise ModelFileError(f"{path} holds {sorted(arrays)}; the model takes {wanted}")
    sizes: dict[str, int] = {}
    for spec in model.inputs:
        array = arrays[spec.name]
        kind = np.floating if spec.floating else np.integer
        if not np.issubdtype(array.dtype, kind):
            raise ModelFileError(f"{path}: {spec.name} is {array.dtype}; it must be {kind.__name__}")
        arrays[spec.name] = array.astype(np.float32 if spec.floating else np.int64)
        if array.ndim != len(spec.shape) or array.size == 0:
            raise ModelFileError(f"{path}: {spec.name} has shape {array.shape}; it must be {spec.shape}, not empty")
        for have, want in zip(array.shape, spec.shape, strict=True):
            expected = want if isinstance(want, int) else sizes.setdefault(want, have)
            if have != expected:
                raise ModelFileError(f"{path}: {spec.name} has shape {array.shape}; it must be {spec.shape}")
    return arrays


def verify(
    exported: ExportedModel,
    model: LoadedModel,
    options: VerifyOptions | None = None,
    inputs: Sequence[Arrays] | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an exported file with its checkpoint.

    Args:
        exported: the file.
        model: the checkpoint, from `ibnorm_export.models.load`.
        options: backend, number of samples, seed.
        inputs: the user's own, instead of drawn samples; see `read_inputs`.
        progress: called as the work goes on.

    Raises:
        ModelFileError: the file carries no metadata, is of another model, or cannot be loaded.
        BackendUnavailable: the backend is not installed.
    """
    options = VerifyOptions() if options is None else options
    metadata = exported.require_metadata()
    if metadata.get("family") != model.family:
        raise ModelFileError(
            f"{exported.path} is a {metadata.get('family')} model; the checkpoint {model.source} is {model.family}"
        )
    names = [tensor.name for tensor in exported.inputs]
    if names != [spec.name for spec in model.inputs]:
        raise ModelFileError(f"{exported.path} takes {names}; the checkpoint takes {[s.name for s in model.inputs]}")
    if options.samples < 1:
        raise ModelFileError(f"samples is {options.samples}; it must be at least 1")
    notes = list(model.warnings)
    if metadata.get("source_sha256") != model.source_sha256:
        notes.append(
            "the file was exported from another copy of this checkpoint (the hashes of config and weights differ)"
        )
    dtype = DType(exported.dtype).torch
    if inputs is None:
        rng = np.random.default_rng(options.seed)
        inputs = [model.sample(rng, index) for index in range(options.samples)]
    inputs = [_round_inputs(sample, dtype) for sample in inputs]

    truth = model.in_float64()
    reach = _Reach()
    # Watching needs storages of its own: weights are found again by the position in the state dict.
    reach.run(model, truth, inputs[0])
    original = model.module.state_dict(keep_vars=True)
    copied = truth.state_dict(keep_vars=True)
    reach.storages = {
        original[name].untyped_storage().data_ptr()
        for name in original
        if name in copied and copied[name].untyped_storage().data_ptr() in reach.storages
    }
    static = _check_static(exported, model, reach) if options.static else None
    numeric = _check_numeric(exported, model, truth, options, inputs, reach.narrow, progress)
    return ParityReport(str(exported.path), model.source, static, numeric, tuple(notes))
