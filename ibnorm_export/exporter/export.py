"""LoadedModel -> ONNX file: one node per norm, its meaning beside it as a function.

torch.export records the registered operator of `module`, a translation turns each record into one
node, and small passes over the graph do the rest: weights keep the names of the state dict (a
transposed one is called NAME.T), inputs that a model lacks are connected to ones and zeros, nodes
say which module they came from, and nothing in the file depends on when or where it was made.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

import ibnorm_export.op.torch_op  # noqa: F401 - registers the operators that are translated here
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import CacheKind, ModelMetadata, Task
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import CheckpointError, ExportError
from ibnorm_export.files import new_file
from ibnorm_export.graph.attention import keep_heads_joined, transpose_keys_directly
from ibnorm_export.graph.attention_cache import grow_cache_in_attention
from ibnorm_export.graph.attention_mask import use_mask_directly
from ibnorm_export.graph.cleanup import (
    attach_functions,
    connect_affine,
    name_nodes,
    restore_weight_names,
    simplify,
    transpose_weights,
)
from ibnorm_export.graph.early_gather import gather_early
from ibnorm_export.graph.quantization import Quantization, quantize
from ibnorm_export.graph.skip_fusion import fuse_skip
from ibnorm_export.graph.static_cache import STATIC_OPSET, keep_cache_in_place
from ibnorm_export.op import onnx_functions as onnx_op
from ibnorm_export.op.spec import DOMAIN, OP_VERSION, Compression
from ibnorm_export.progress import Progress, silent

__all__ = ["ExportOptions", "check_quantization", "describe", "export"]

#: Protocol Buffers stop at 2 GiB; above this many bytes of weights they go into one file beside.
EXTERNAL_ABOVE_BYTES: Final = 2_000_000_000

#: The first opset whose Conv, Reshape and others take bfloat16.
_FIRST_BF16: Final = 22

_ENTRY: Final = "checkpoint."  # attribute of LoadedModel.entry() that holds the user's model


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export.

    Args:
        dtype: of weights, activations and floating inputs.
        opset: version of ONNX's default domain; None takes the family's default.
        inline: expand the norms into standard operators, for runtimes without local functions
            (OpenVINO). Such a file cannot use the fused kernels.
        quantization: of the weights of a language model; None leaves them in the dtype.
        fuse_skip: make one SkipIBNorm of a residual Add and the norm behind it: same bits, one pass less.
        cache: how a language model keeps its keys and values; `STATIC` needs opset 24.
    """

    dtype: DType = DType.FP32
    opset: int | None = None
    _: KW_ONLY
    inline: bool = False
    fuse_skip: bool = True
    quantization: Quantization | None = None
    cache: CacheKind = CacheKind.DYNAMIC


def _translation(compression: Compression, skip: bool) -> Callable[..., Any]:
    """How one registered torch operator becomes one ONNX node."""
    op_type = compression.skip_op_type if skip else compression.op_type
    inputs = ["X", "skip", "scale", "bias"] if skip else ["X", "scale", "bias"]
    outputs = ["Y", "sum"] if skip else ["Y"]
    kinds = OpSchema.AttrType
    schema = OpSchema(
        op_type,
        DOMAIN,
        OP_VERSION,
        inputs=[OpSchema.FormalParameter(name, "T") for name in inputs],
        outputs=[OpSchema.FormalParameter(name, "T") for name in outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            OpSchema.Attribute("lambd", kinds.FLOAT),
            OpSchema.Attribute("epsilon", kinds.FLOAT),
            OpSchema.Attribute("axis", kinds.INT),
            OpSchema.Attribute("plugin_namespace", kinds.STRING),
        ],
    )
    op = Op(Opset(DOMAIN, OP_VERSION), op_type, op_schema=schema)

    if skip:

        def translate_skip(x: Any, skip: Any, weight: Any, bias: Any, lambd: float, epsilon: float) -> Any:
            return op(x, skip, weight, bias, lambd=lambd, epsilon=epsilon, axis=-1, plugin_namespace="")

        return translate_skip

    def translate(x: Any, weight: Any, bias: Any, lambd: float, epsilon: float) -> Any:
        return op(x, weight, bias, lambd=lambd, epsilon=epsilon, axis=-1, plugin_namespace="")

    return translate


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's notes about optional packages and about its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _trace(model: LoadedModel, opset: int) -> ir.Model:
    table: dict[Any, Any] = {}
    for compression in Compression:
        for op_type, skip in ((compression.op_type, False), (compression.skip_op_type, True)):
            table[getattr(torch.ops.ibnorm, op_type).default] = _translation(compression, skip)
    axes = tuple({i: n for i, n in enumerate(s.shape) if isinstance(n, str)} for s in model.inputs)
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                model.entry(model.module),
                model.example(),
                dynamo=True,
                optimize=False,
                opset_version=opset,
                custom_translation_table=table,
                dynamic_shapes={"tensors": axes},
                input_names=[s.name for s in model.inputs],
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, CheckpointError):  # of `call`, in its own words
            raise cause from error
        first = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ExportError(
            f"torch.export cannot trace {model.source}: {first[0]}. The model must run without Python branches on "
            f"tensor values, for inputs {[s.name for s in model.inputs]}"
        ) from error
    assert program is not None
    _name_outputs(program.model.graph, model)
    return program.model


def _name_outputs(graph: ir.Graph, model: LoadedModel) -> None:
    """Outputs are called as declared; one that is an input, a weight or another output is an Identity of it."""
    if len(graph.outputs) != len(model.outputs):
        raise ExportError(
            f"the tensors that {model.source} returns are {len(graph.outputs)}, the names of its outputs "
            f"{len(model.outputs)} ({', '.join(model.outputs)}); give each tensor one name"
        )
    seen: set[ir.Value] = set()
    for position, (value, name) in enumerate(zip(list(graph.outputs), model.outputs, strict=True)):
        own = value
        if value in seen or value.producer() is None:
            node = ir.node("Identity", [value], name=f"{name}/identity")
            graph.append(node)
            own = node.outputs[0]
            own.shape, own.type = value.shape, value.type
            graph.outputs[position] = own
        seen.add(own)
        own.name = name


def _check_names(graph: ir.Graph, model: LoadedModel) -> None:
    """Raise ExportError where the graph does not take and give what `model` says: a pass has renamed something."""
    ends = (
        ("takes", [v.name for v in graph.inputs], [s.name for s in model.inputs]),
        ("gives", [v.name for v in graph.outputs], list(model.outputs)),
    )
    for verb, found, wanted in ends:
        if found != wanted:
            raise ExportError(
                f"the graph of {model.source} {verb} {found} where {wanted} was declared: choose names that no weight "
                "and no other input or output has"
            )


def describe(model: LoadedModel, options: ExportOptions, *, opset: int) -> ModelMetadata:
    """What an exported file records about itself."""
    packages = ("ibnorm-export", "torch", "onnx", "onnxscript", "onnx-ir", "transformers")
    return ModelMetadata(
        family=model.family,
        task=model.task,
        max_positions=model.max_positions,
        dtype=options.dtype,
        opset=opset,
        inlined=options.inline,
        fuse_skip=options.fuse_skip,
        cache=CacheKind(options.cache) if model.task is Task.TEXT_GENERATION else None,
        quantization=None if options.quantization is None else options.quantization.entry(),
        config=model.section,
        norms={path: spec.to_config() for path, spec in model.norms.items()},
        source_sha256=model.source_sha256,
        versions={name: importlib.metadata.version(name) for name in packages},
    )


def check_quantization(model: LoadedModel, options: ExportOptions) -> None:
    """Raise ExportError where the quantisation that is asked for has no meaning."""
    if options.quantization is not None and (model.task is not Task.TEXT_GENERATION or options.dtype is not DType.FP32):
        raise ExportError(
            f"quantised weights are for the task text-generation over fp32; this is {model.task} in "
            f"{options.dtype.value}"
        )


def _choose_opset(model: LoadedModel, options: ExportOptions) -> int:
    if options.cache not in tuple(CacheKind) or (
        options.cache != CacheKind.DYNAMIC and model.task is not Task.TEXT_GENERATION
    ):
        raise ExportError(
            f"cache is {options.cache!r} for the task {model.task}; it must be one of {', '.join(CacheKind)}, for "
            "text-generation"
        )
    static = options.cache == CacheKind.STATIC
    first = max(_FIRST_BF16 if options.dtype is DType.BF16 else 0, STATIC_OPSET if static else 0)
    default = max(model.opset, first)
    opset = default if options.opset is None else options.opset
    if opset not in onnx_op.OPSETS or (static and opset < STATIC_OPSET):
        raise ExportError(
            f"opset is {opset}; it must be {STATIC_OPSET if static else onnx_op.OPSETS.start} to "
            f"{onnx_op.OPSETS.stop - 1} (default for {model.family} in {options.dtype.value}: {default})"
        )
    return opset


def build(model: LoadedModel, options: ExportOptions, *, progress: Progress = silent) -> ir.Model:
    """The ONNX model in memory; see `export`."""
    opset = _choose_opset(model, options)
    check_quantization(model, options)
    model = model.converted(torch_dtype(options.dtype))
    progress("tracing", 0, 4)
    graph_model = _trace(model, opset)
    progress("simplifying", 1, 4)
    graph = graph_model.graph
    restore_weight_names(graph, _ENTRY)
    transpose_weights(graph)
    connect_affine(graph)
    kept = {name for key in model.module.state_dict() for name in (key, f"{key}.T")}
    simplify(graph_model, kept)
    transpose_keys_directly(graph)
    use_mask_directly(graph)
    if options.cache == CacheKind.STATIC:
        keep_cache_in_place(graph)
    else:
        grow_cache_in_attention(graph)
    keep_heads_joined(graph)
    passes.RemoveUnusedNodesPass()(graph_model)
    name_nodes(graph, _ENTRY)
    gather_early(graph)
    if options.fuse_skip:
        fuse_skip(graph)
    _check_names(graph, model)
    attach_functions(graph_model, opset)
    if options.inline:
        passes.InlinePass()(graph_model)
        passes.ShapeInferencePass()(graph_model)
        passes.RemoveUnusedOpsetsPass()(graph_model)
    graph_model.graph.name = model.family
    graph_model.graph.metadata_props.clear()
    graph_model.producer_name = "ibnorm-export"
    graph_model.producer_version = importlib.metadata.version("ibnorm-export")
    graph_model.doc_string = None
    graph_model.metadata_props.clear()
    graph_model.metadata_props.update(describe(model, options, opset=opset).to_props())
    return graph_model


def _check_place(path: Path, source: Path) -> None:
    """Refuse to replace the checkpoint, or a file of it that is no earlier export."""
    of_it = path.exists() and path.parent.exists() and source.is_dir() and path.parent.samefile(source)
    if (of_it and path.suffix != ".onnx") or (path.is_file() and source.is_file() and path.samefile(source)):
        raise ExportError(f"{path} is part of the checkpoint {source}, and would be replaced: name another file")


def export(
    model: LoadedModel,
    path: str | Path,
    *,
    options: ExportOptions | None = None,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model` as one ONNX file that serves everywhere.

    Each IBNorm becomes one node of domain `ai.ibnorm`; the file carries the function of every op
    type that it uses. Weights above 2 GB go into one file beside, PATH.data. The same model gives
    the same bytes. The file appears whole or not at all.

    Args:
        model: from `ibnorm_export.models.load`; it stays as it is.
        path: the .onnx file to write; an existing one is replaced.
        options: see `ExportOptions`.
        progress: called as the work goes on.

    Raises:
        ExportError: torch cannot trace the model, an option is outside its legal set, or the file
            cannot be written.
    """
    options = ExportOptions() if options is None else options
    path = Path(path)
    _check_place(path, Path(model.source))
    with new_file(path) as folder:
        built = build(model, options, progress=progress)
        progress("writing", 2, 4)
        file = folder / path.name
        if options.quantization is not None:
            built = ir.serde.deserialize_model(quantize(ir.serde.serialize_model(built), options.quantization))
        size = sum(v.const_value.nbytes for v in built.graph.initializers.values() if v.const_value is not None)
        if size > EXTERNAL_ABOVE_BYTES:
            ir.save(built, file, external_data=f"{path.name}.data")
        else:
            ir.save(built, file)
        progress("checking", 3, 4)
        try:
            onnx.checker.check_model(str(file), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(
                f"opset {built.opset_imports['']} in {options.dtype.value} does not make a valid model: {error}"
            ) from error
        del built
    progress("written", 4, 4)
    return ExportedModel(path)
