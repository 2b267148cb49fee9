"""LoadedModel -> one ONNX file: one node per norm, which the file also defines as a function.

`trace` records the model, and small passes over the graph do the rest. Weights keep the names of the state dict (a
transposed weight is called NAME.T). Norms without a scale or bias are connected to ones and zeros. Nodes record the
module that they came from. Nothing in the file depends on when or where it was written.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common as passes

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import CacheKind, ModelMetadata, Target, Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE, is_onnx, read_model
from ibnorm_export.artifacts.runtime_versions import oldest_versions, requirements
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.block_series import trace_series
from ibnorm_export.exporter.fixed_shapes import fixed_sizes, with_fixed_sizes
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.runtime_settings import check_model
from ibnorm_export.exporter.trace import ENTRY_PREFIX, trace
from ibnorm_export.exporter.weights import read_when_written, without_conversion
from ibnorm_export.files import Kind, named_file, new_file
from ibnorm_export.graph.attention import keep_heads_joined, transpose_keys_directly
from ibnorm_export.graph.attention_cache import grow_cache_in_attention
from ibnorm_export.graph.attention_mask import use_mask_directly
from ibnorm_export.graph.cleanup import (
    attach_functions,
    connect_affine,
    forget_initializer_info,
    name_nodes,
    restore_weight_names,
    simplify,
    transpose_weights,
)
from ibnorm_export.graph.early_gather import gather_early
from ibnorm_export.graph.inlining import inline_norms
from ibnorm_export.graph.model_writer import without_weights, write_model
from ibnorm_export.graph.nan_guards import remove_nan_guards
from ibnorm_export.graph.skip_fusion import fuse_skip
from ibnorm_export.graph.static_cache import STATIC_OPSET, keep_cache_in_place
from ibnorm_export.graph.streamed_quantization import quantize_when_written
from ibnorm_export.op.onnx_functions import OPSETS
from ibnorm_export.progress import Progress, silent

__all__ = [
    "SharedBuild",
    "build",
    "check_quantization",
    "check_written",
    "describe",
    "export_file",
    "quantized",
    "write_metadata",
]

#: A Protocol Buffers message is at most 2 GiB. Above this many bytes, weights go into a second file.
EXTERNAL_ABOVE_BYTES: Final = 2_000_000_000

#: The first opset whose Conv, Reshape and others take bfloat16.
_FIRST_BF16_OPSET: Final = 22

#: Families whose files store a tied matrix in both layouts, as the first version did; their bytes stay the same.
_TIED_TWICE: Final = ("llama", "gpt2")

#: The packages whose versions a file records.
_RECORDED_PACKAGES: Final = ("ibnorm-export", "torch", "onnx", "onnxscript", "onnx-ir", "transformers")


def describe(
    model: LoadedModel, options: ExportOptions, *, opset: int, shape: Mapping[str, int] = MappingProxyType({})
) -> ModelMetadata:
    """What an exported file records about itself, but for the oldest runtimes; `write_metadata` adds them."""
    return ModelMetadata(
        family=model.family,
        task=model.task,
        max_positions=model.max_positions,
        dtype=options.dtype,
        opset=opset,
        inlined=bool(options.inline),
        fuse_skip=options.fuse_skip,
        cache=options.cache if model.task is Task.TEXT_GENERATION else None,
        quantization=None if options.quantization is None else options.quantization.entry(),
        config=model.section,
        norms={path: spec.to_config() for path, spec in model.norms.items()},
        source_sha256=model.source_sha256,
        arguments=model.arguments,
        shape=shape,
        versions={name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
    )


def check_quantization(model: LoadedModel, options: ExportOptions) -> None:
    """Raise ExportError if quantised weights are requested for a model that was not loaded for text generation."""
    if options.quantization is not None and model.task is not Task.TEXT_GENERATION:
        if not any(spec.name == "input_ids" for spec in model.inputs):
            raise ExportError(
                f"only language models can have int8 or int4 weights, and {model.source} is not one: --dtype fp16 "
                "makes its file half as large"
            )
        raise ExportError(
            f"only language models can have quantised weights, but {model.source} was loaded for the task "
            f"{model.task}: export it with --task text-generation"
        )


def _choose_opset(model: LoadedModel, options: ExportOptions) -> int:
    static = options.cache is CacheKind.STATIC
    if static and model.task is not Task.TEXT_GENERATION:
        raise ExportError(
            f"only language models have a cache, but {model.source} was loaded for the task {model.task}: export it "
            "with --task text-generation, or leave out --cache"
        )
    lowest_default = max(_FIRST_BF16_OPSET if options.dtype is DType.BF16 else 0, STATIC_OPSET if static else 0)
    newest, wanted = OPSETS.stop - 1, model.opset
    if options.runtime is not None:
        newest = options.runtime.opset
        fastest = options.runtime.fastest.get(model.family, wanted)
        wanted = fastest if fastest <= newest else wanted
    default = max(min(wanted, newest), lowest_default)
    if default > newest:
        raise ExportError(
            f"a file in {options.dtype} needs opset {default}, but --for {options.runtime} takes at most {newest}: "
            "choose another --dtype or runtime"
        )
    opset = default if options.opset is None else options.opset
    lowest = STATIC_OPSET if static else OPSETS.start
    if not lowest <= opset < OPSETS.stop:
        kind = " for a static cache" if static else ""
        raise ExportError(
            f"opset is {opset}; it must be {lowest} to {OPSETS.stop - 1}{kind} "
            f"(default for {model.family} in {options.dtype}: {default})"
        )
    return opset


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Put off the collection of garbage, which would look through all objects of all imported libraries."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collections()
def build(model: LoadedModel, options: ExportOptions, *, progress: Progress = silent) -> ir.Model:
    """Build the ONNX model in memory; its weights are not quantised yet. See `export_file`."""
    if options.runtime is not None:
        check_model(options.runtime, family=model.family, task=model.task, source=str(model.source))
    opset = _choose_opset(model, options)
    check_quantization(model, options)
    sizes = fixed_sizes(model, options)
    traced, sources = without_conversion(model, torch_dtype(options.dtype))
    model = with_fixed_sizes(traced, sizes)
    progress("tracing", 0, 4)
    built = trace_series(model, opset) or trace(model, opset)
    read_when_written(built.graph, sources)
    progress("simplifying", 1, 4)
    _simplify(built, model, options=options)
    _check_names(built.graph, model)
    attach_functions(built, opset)
    if options.inline:
        inline_norms(built)
    built.graph.name = model.family
    built.graph.metadata_props.clear()
    write_metadata(built, describe(model, options, opset=opset, shape=sizes))
    return built


def _tied_once(model: LoadedModel, options: ExportOptions) -> bool:
    """Whether a tied matrix is stored once.

    The quantizer packs the transpose, so there a tied matrix is stored twice: as an embedding, and quantised.
    """
    return model.family not in _TIED_TWICE and options.quantization is None


class SharedBuild:
    """Builds one model for several types of weights, and traces it once where they need the same graph.

    Types that are quantised need the same graph, which takes most of the time of an export. For the families that
    store tied matrices twice, fp32 needs it too. That graph stays in memory with its weights in fp32. The graph of a
    half-precision type serves one file, so it is not kept.

    Args:
        model: the model, of which all files are made.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._key: object = None
        self._graph: onnx.ModelProto | None = None

    def build(self, options: ExportOptions, *, progress: Progress = silent) -> ir.Model:
        """What `build` returns for these options; errors are the same."""
        key = replace(options, quantization=None), _tied_once(self._model, options)
        if self._graph is None or key != self._key:
            built = build(self._model, options, progress=progress)
            if options.dtype is not DType.FP32:
                return built
            self._graph, self._key = ir.serde.serialize_model(built), key
        built = ir.serde.deserialize_model(self._graph)
        sizes = fixed_sizes(self._model, options)
        opset = built.opset_imports[""]
        write_metadata(built, describe(self._model, options, opset=opset, shape=sizes))
        return built


def _simplify(built: ir.Model, model: LoadedModel, *, options: ExportOptions) -> None:
    """Run the passes that turn PyTorch's graph into one for inference; the order matters."""
    graph = built.graph
    restore_weight_names(graph, ENTRY_PREFIX)
    transpose_weights(graph, tied_once=_tied_once(model, options))
    connect_affine(graph)
    kept = {name for key in model.module.state_dict() for name in (key, f"{key}.T")}
    simplify(built, kept)
    transpose_keys_directly(graph)
    use_mask_directly(graph)
    if options.cache is CacheKind.STATIC:
        keep_cache_in_place(graph)
    else:
        grow_cache_in_attention(graph)
    keep_heads_joined(graph)
    remove_nan_guards(graph)
    passes.RemoveUnusedNodesPass()(built)
    name_nodes(graph, ENTRY_PREFIX)
    gather_early(graph)
    if options.fuse_skip:
        fuse_skip(graph)


def write_metadata(built: ir.Model, metadata: ModelMetadata) -> None:
    """Replace the metadata of other tools in the model with this package's name and `metadata`.

    The metadata also states the oldest runtimes that run the model.
    """
    operators = {node.op_type for node in built.graph if node.domain == ""}
    quantization = metadata.quantization
    bits = () if quantization is None else {quantization.bits, quantization.head_bits or quantization.bits}
    genai = metadata.target is Target.ORT_GENAI
    needed = tuple(requirements(built.opset_imports[""], operators, bits=bits, genai=genai))
    metadata = replace(metadata, requires=oldest_versions(needed))
    built.producer_name = "ibnorm-export"
    built.producer_version = importlib.metadata.version("ibnorm-export")
    built.doc_string = None
    built.metadata_props.clear()
    built.metadata_props.update(metadata.to_props())


def quantized(built: ir.Model, options: ExportOptions) -> ir.Model:
    """Return the model with its weights stored as in `options`; do not use `built` afterwards."""
    if options.quantization is None:
        return built
    return quantize_when_written(built, options.quantization)


def _check_names(graph: ir.Graph, model: LoadedModel) -> None:
    """Raise ExportError if the inputs or outputs do not have their declared names, because a pass has renamed one."""
    ends = (
        ("inputs", [v.name for v in graph.inputs], [s.name for s in model.inputs]),
        ("outputs", [v.name for v in graph.outputs], list(model.outputs)),
    )
    for what, found, declared in ends:
        if found != declared:
            raise ExportError(
                f"the {what} of {model.source} would be called {found}, but it declares {declared}: choose names that "
                "differ from each other and from those of all weights"
            )


#: What an export may replace, whatever wrote it.
ONNX: Final = Kind("an ONNX file", is_onnx)


def _check_path(path: Path, source: Path) -> None:
    """Raise ExportError if `path` is the checkpoint or a file in it; an earlier export there may be replaced."""
    inside = path.exists() and path.parent.exists() and source.is_dir() and path.parent.samefile(source)
    if (inside and path.suffix != ".onnx") or (path.is_file() and source.is_file() and path.samefile(source)):
        raise ExportError(f"{path} belongs to the checkpoint {source} and would be replaced: choose another file")


def _save(built: ir.Model, file: Path) -> onnx.ModelProto:
    """Write the model, and return it without its weights."""
    size = sum(v.const_value.nbytes for v in built.graph.initializers.values() if v.const_value is not None)
    forget_initializer_info(built.graph)
    if size <= EXTERNAL_ABOVE_BYTES:
        return write_model(built, file)
    ir.save(built, file, external_data=f"{file.name}.data")
    return read_model(file)


def check_written(message: onnx.ModelProto, dtype: DType, *, opset: int) -> None:
    """Raise ExportError unless a model is valid ONNX with types and shapes that fit each other.

    Args:
        message: the model as `write_model` returned it, or as it was read from a file with external data. It is
            changed.
        dtype: the type of its weights, for the message.
        opset: its opset, for the message.
    """
    try:
        onnx.checker.check_model(without_weights(message), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"opset {opset} in {dtype} does not make a valid model: {error}") from error


def export_file(
    model: LoadedModel,
    path: str | Path,
    *,
    options: ExportOptions | None = None,
    shared: SharedBuild | None = None,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model` as one ONNX file that any ONNX runtime can run.

    Each IBNorm becomes one node of domain `ai.ibnorm`, and the file holds the function of every op type that it uses.
    Weights above 2 GB go into a second file, PATH.data. The same model gives the same bytes. The file appears whole or
    not at all.

    Args:
        model: from `ibnorm_export.load`; it is not changed.
        path: the .onnx file to write; an existing ONNX file is replaced, and no other.
        options: how to export; None is `ExportOptions()`.
        shared: builds the model, if several files of it are written; None builds it here.
        progress: called at the start of each stage.

    Raises:
        ExportError: torch.export cannot trace the model, an option does not suit it, or the file cannot be written.
    """
    options = ExportOptions() if options is None else options
    path = named_file(path, MODEL_FILE)
    _check_path(path, Path(model.source))
    with new_file(path, kind=ONNX) as folder:
        make = functools.partial(build, model) if shared is None else shared.build
        built = make(options, progress=progress)
        progress("writing", 2, 4)
        built = quantized(built, options)
        written = _save(built, folder / path.name)
        progress("checking", 3, 4)
        check_written(written, options.dtype, opset=built.opset_imports[""])
    progress("written", 4, 4)
    return ExportedModel.written(path)
