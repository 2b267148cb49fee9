"""LoadedModel -> ONNX file: one node per norm, its meaning beside it as a function.

torch.export records the registered operator of `module`, a translation turns each record into one
node, and small passes over the graph do the rest: weights keep the names of the state dict (a
transposed one is called NAME.T), inputs that a model lacks are connected to ones and zeros, nodes
say which module they came from, and nothing in the file depends on when or where it was made.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx.defs import OpSchema
from onnxscript.rewriter import onnx_fusions
from onnxscript.values import Op, Opset

import ibnorm_export.module  # noqa: F401 - registers the operators that are translated here
from ibnorm_export import onnx_op
from ibnorm_export.artifact import METADATA_FORMAT, ExportedModel, metadata_props, new_file
from ibnorm_export.early_select import select_before_norm
from ibnorm_export.errors import ExportError
from ibnorm_export.loaded import DType, LoadedModel, cast_parameters
from ibnorm_export.progress import Progress, silent
from ibnorm_export.quantize import Quantization, quantize
from ibnorm_export.spec import DOMAIN, OP_TYPES, OP_VERSION, Compression
from ibnorm_export.static_cache import STATIC_OPSET, keep_cache_in_place

__all__ = ["CACHES", "ExportOptions", "attach_functions", "check_quantization", "describe", "export"]

#: Protocol Buffers stop at 2 GiB; above this many bytes of weights they go into one file beside.
EXTERNAL_ABOVE_BYTES: Final = 2_000_000_000

#: The first opset whose Conv, Reshape and others take bfloat16.
_FIRST_BF16: Final = 22

#: What `ExportOptions.cache` may be.
CACHES: Final = ("dynamic", "static")

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
        cache: of a language model: "dynamic" (a new, longer tensor at every step) or "static" (a buffer that is
            written in place; opset 24).
    """

    dtype: DType = DType.FP32
    opset: int | None = None
    inline: bool = False
    fuse_skip: bool = False
    quantization: Quantization | None = None
    cache: str = "dynamic"


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
                model.entry(),
                model.example(),
                dynamo=True,
                optimize=False,
                opset_version=opset,
                custom_translation_table=table,
                dynamic_shapes={"tensors": axes},
                input_names=[s.name for s in model.inputs],
                output_names=list(model.outputs),
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ExportError(
            f"torch.export cannot trace {model.source}: {first[0]}. The model must run without Python branches on "
            f"tensor values, for inputs {[s.name for s in model.inputs]}"
        ) from error
    assert program is not None
    return program.model


def _plain_names(graph: ir.Graph) -> None:
    """Initializers are called as in the state dict."""
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith(_ENTRY):
            del graph.initializers[value.name]
            value.name = value.name.removeprefix(_ENTRY)
            assert value.const_value is not None
            value.const_value.name = value.name
            graph.initializers[value.name] = value


def _transposed(matrix: ir.TensorProtocol, name: str) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(np.ascontiguousarray(matrix.numpy().T), name=name)


def _transpose_weights(graph: ir.Graph) -> None:
    """A matrix that is only used transposed is stored so, as NAME.T, and computed when written.

    Runtimes would do it at every load; doing it before constant folding keeps the name.
    """
    transposed: dict[str, ir.Value] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        if source is None or source.name not in graph.initializers or source.const_value is None:
            continue
        perm = node.attributes.get("perm")
        if perm is None or list(perm.as_ints()) != [1, 0]:
            continue
        assert source.name is not None and source.shape is not None and source.dtype is not None
        if source.name not in transposed:
            name, matrix = f"{source.name}.T", source.const_value
            shape = ir.Shape(reversed(source.shape.numpy()))
            # the transposed copy lives only while it is being written
            lazy = ir.LazyTensor(_transposed(matrix, name), dtype=source.dtype, shape=shape, name=name)
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(source.dtype), const_value=lazy)
            graph.register_initializer(value)
            transposed[source.name] = value
        node.outputs[0].replace_all_uses_with(transposed[source.name], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _connect_affine(graph: ir.Graph) -> None:
    """Connect the scale and bias that a model lacks to shared ones and zeros."""
    for node in graph:
        if node.domain != DOMAIN:
            continue
        x = node.inputs[0]
        assert x is not None and x.shape is not None and x.dtype is not None
        size = x.shape[-1]
        if not isinstance(size, int):
            raise ExportError(f"{node.name}: the size of the normalised axis is dynamic; it must be fixed")
        arity = 4 if node.op_type.startswith("Skip") else 3
        node.resize_inputs(arity)  # an absent last input leaves a shorter list
        for position, kind, number in ((arity - 2, "ones", 1.0), (arity - 1, "zeros", 0.0)):
            if node.inputs[position] is not None:
                continue
            name = f"ibnorm.{kind}.{size}"
            if name not in graph.initializers:
                tensor = ir.Tensor(np.full(size, number, dtype=x.dtype.numpy()), name=name)
                graph.register_initializer(
                    ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(x.dtype), const_value=tensor)
                )
            node.replace_input_with(position, graph.initializers[name])


def _share_constants(graph: ir.Graph) -> None:
    """One initializer for each small constant."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size > 1024 or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        if first.setdefault(key, value) is not value:
            value.replace_all_uses_with(first[key])
            assert value.name is not None
            del graph.initializers[value.name]


@contextlib.contextmanager
def _weights_unknown(graph: ir.Graph, weights: set[str]) -> Iterator[None]:
    """Make inputs of the weights, so that no pass folds, merges or drops one for the value that it has."""
    hidden = [(value, value.const_value) for name, value in graph.initializers.items() if name in weights]
    inputs = len(graph.inputs)
    for value, _ in hidden:
        assert value.name is not None
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        del graph.inputs[inputs:]
        for value, tensor in hidden:
            if value.uses():
                value.const_value = tensor
                graph.register_initializer(value)


def _fuse_standard(model: ir.Model) -> None:
    """RotaryEmbedding and the other operators of opset 23, in later opsets too: onnxscript 0.7 looks at 23 alone."""
    opset = model.opset_imports[""]
    model.opset_imports[""] = min(opset, 23)
    onnx_fusions.fuse(model)
    model.opset_imports[""] = opset


def _simplify(model: ir.Model, weights: set[str]) -> None:
    """Fold constants and apply the standard rewrites, leaving every named weight as it is."""
    with _weights_unknown(model.graph, weights):
        for _ in range(2):
            onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
            onnxscript.rewriter.rewrite(model)
            _fuse_standard(model)
            passes.RemoveUnusedNodesPass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _share_constants(model.graph)
        ir.passes.Sequential(
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.OutputFixPass(),
            passes.NameFixPass(),
            passes.ShapeInferencePass(),
        )(model)


def _name_nodes(graph: ir.Graph) -> None:
    """Nodes say which module they came from; norm nodes are called like it. Traces of the exporter go."""
    seen: dict[str, int] = {}
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is None:
            continue
        path = (ast.literal_eval(scopes)[:-1] or [""])[-1]
        module = path.removeprefix(_ENTRY)
        if module and module != _ENTRY.rstrip("."):
            node.metadata_props["module"] = module
            if node.domain == DOMAIN:
                seen[module] = seen.get(module, 0) + 1
                node.name = module if seen[module] == 1 else f"{module}#{seen[module]}"
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    for node in graph:
        for output in node.outputs:
            output.metadata_props.clear()


def _fuse_skip(graph: ir.Graph) -> None:
    """Add + IBNorm becomes SkipIBNorm where the sum is used elsewhere too (a pre-norm transformer's residual).

    Only an Add without broadcasting, in the norm's own type: then the result is the same to the bit.
    """
    for norm in list(graph):
        if norm.domain != DOMAIN or norm.op_type not in OP_TYPES:
            continue
        x = norm.inputs[0]
        add = None if x is None else x.producer()
        if x is None or add is None or add.domain != "" or add.op_type != "Add" or x.is_graph_output():
            continue
        a, b = add.inputs
        if a is None or b is None or a.shape is None or a.shape != b.shape or len(x.uses()) < 2:
            continue
        skip = ir.node(
            f"Skip{norm.op_type}",
            [a, b, *norm.inputs[1:]],
            attributes=norm.attributes,
            domain=DOMAIN,
            name=norm.name,
            num_outputs=2,
            metadata_props=dict(norm.metadata_props),
        )
        for new, old in zip(skip.outputs, (norm.outputs[0], x), strict=True):
            new.shape, new.type, name = old.shape, old.type, old.name
            old.name = f"{name}/unfused"
            new.name = name
        graph.insert_before(add, skip)
        norm.outputs[0].replace_all_uses_with(skip.outputs[0], replace_graph_outputs=True)
        graph.remove(norm, safe=True)
        x.replace_all_uses_with(skip.outputs[1])
        graph.remove(add, safe=True)


def attach_functions(model: ir.Model, opset: int) -> None:
    """Put the functions of the norms that `model` uses into it."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for op_type, body in onnx_op.functions(opset).items():
        if op_type in used:
            function = ir.serde.deserialize_function(body)
            model.functions[function.identifier()] = function


def describe(model: LoadedModel, options: ExportOptions, opset: int) -> dict[str, Any]:
    """What an exported file says of itself."""
    packages = ("ibnorm-export", "torch", "onnx", "onnxscript", "onnx-ir", "transformers")
    return {
        "format": METADATA_FORMAT,
        "family": model.family,
        "task": model.task,
        "max_positions": model.max_positions,
        "dtype": options.dtype.value,
        "opset": opset,
        "inlined": options.inline,
        "fuse_skip": options.fuse_skip,
        "cache": options.cache if model.task == "text-generation" else None,
        "quantization": None if options.quantization is None else options.quantization.to_dict(),
        "config": model.section,
        "norms": {path: spec.to_config() for path, spec in model.norms.items()},
        "source_sha256": model.source_sha256,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def check_quantization(model: LoadedModel, options: ExportOptions) -> None:
    """Raise ExportError where the quantisation that is asked for has no meaning."""
    if options.quantization is not None and (model.task != "text-generation" or options.dtype is not DType.FP32):
        raise ExportError(
            f"quantised weights are for the task text-generation over fp32; this is {model.task} in "
            f"{options.dtype.value}"
        )


def _choose_opset(model: LoadedModel, options: ExportOptions) -> int:
    if options.cache not in CACHES or (options.cache != "dynamic" and model.task != "text-generation"):
        raise ExportError(
            f"cache is {options.cache!r} for the task {model.task}; it must be one of {', '.join(CACHES)}, for "
            "text-generation"
        )
    static = options.cache == "static"
    first = max(_FIRST_BF16 if options.dtype is DType.BF16 else 0, STATIC_OPSET if static else 0)
    default = max(model.opset, first)
    opset = default if options.opset is None else options.opset
    if opset not in onnx_op.OPSETS or (static and opset < STATIC_OPSET):
        raise ExportError(
            f"opset is {opset}; it must be {STATIC_OPSET if static else onnx_op.OPSETS.start} to "
            f"{onnx_op.OPSETS.stop - 1} (default for {model.family} in {options.dtype.value}: {default})"
        )
    return opset


def build(model: LoadedModel, options: ExportOptions, progress: Progress = silent) -> ir.Model:
    """The ONNX model in memory; see `export`."""
    opset = _choose_opset(model, options)
    check_quantization(model, options)
    cast_parameters(model.module, options.dtype.torch)
    progress("tracing", 0, 4)
    graph_model = _trace(model, opset)
    progress("simplifying", 1, 4)
    graph = graph_model.graph
    _plain_names(graph)
    _transpose_weights(graph)
    _connect_affine(graph)
    kept = {name for key in model.module.state_dict() for name in (key, f"{key}.T")}
    _simplify(graph_model, kept)
    select_before_norm(graph)
    if options.cache == "static":
        keep_cache_in_place(graph)
        passes.RemoveUnusedNodesPass()(graph_model)
    _name_nodes(graph)
    if options.fuse_skip:
        _fuse_skip(graph)
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
    graph_model.metadata_props.update(metadata_props(describe(model, options, opset)))
    return graph_model


def export(
    model: LoadedModel,
    path: str | Path,
    options: ExportOptions | None = None,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model` as one ONNX file that serves everywhere.

    Each IBNorm becomes one node of domain `ai.ibnorm`; the file carries the function of every op
    type that it uses. Weights above 2 GB go into one file beside, PATH.data. The same model gives
    the same bytes. The file appears whole or not at all.

    Args:
        model: from `ibnorm_export.models.load`; its parameters are converted to the dtype in place.
        path: the .onnx file to write; an existing one is replaced.
        options: see `ExportOptions`.
        progress: called as the work goes on.

    Raises:
        ExportError: torch cannot trace the model, an option is outside its legal set, or the file
            cannot be written.
    """
    options = ExportOptions() if options is None else options
    path = Path(path)
    with new_file(path) as folder:
        built = build(model, options, progress)
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
