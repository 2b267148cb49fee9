"""LoadedModel -> a folder for onnxruntime-genai, written with that package's own model builder.

The builder lays out the graph: GroupQueryAttention, with one buffer for past and present keys and values.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.manifest import write_manifest
from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.errors import ExportError
from ibnorm_export.exporter.companions import copy_companions
from ibnorm_export.exporter.genai_builder import (
    BUILDER_VERSION,
    BUILDERS,
    REFUSED,
    build_genai,
    import_builder,
    write_genai_config,
)
from ibnorm_export.exporter.options import ExportOptions
from ibnorm_export.exporter.single_file import check_quantization, describe, quantized, write_metadata
from ibnorm_export.exporter.text_folder import earlier_export
from ibnorm_export.files import new_folder
from ibnorm_export.graph.cleanup import attach_functions, forget_initializer_info
from ibnorm_export.op import native
from ibnorm_export.op.spec import DOMAIN, OP_VERSION
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["export_genai"]

#: With rotary positions, GroupQueryAttention of ONNX Runtime 1.31 requires head sizes that are multiples of this.
_HEAD_MULTIPLE: Final = 16

#: The builder's name for the axis of the values of a head.
_HEAD_AXIS: Final = "kv_cache_dim"

#: The kinds of rotary embedding for which the builder's results were compared with those of transformers.
_ROTARY: Final = ("default", "llama3")


def _head_size(model: LoadedModel) -> int:
    config: Any = model.module.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _has_window(config: Any) -> bool:
    """Whether the builder would write a layer that attends to the latest tokens only; of Gemma 2 it reads no kinds."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or (config.model_type == "gemma2" and window >= config.max_position_embeddings):
        return False
    return layers is None or "sliding_attention" in layers or config.model_type == "gemma2"


def _check_model(model: LoadedModel) -> None:
    """Raise ExportError for a model that the builder cannot write."""
    if model.family in REFUSED:
        raise ExportError(
            f"{model.source} is of the family {model.family}: {REFUSED[model.family]}. Export with --target portable"
        )
    if model.task is not Task.TEXT_GENERATION or model.family not in BUILDERS:
        raise ExportError(
            f"--target ort-genai takes only models of the family {', '.join(BUILDERS)}, loaded for the task "
            f"text-generation; {model.source} is of the family {model.family}, loaded for {model.task}. Export with "
            "--target portable"
        )
    rotary = getattr(model.module.config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") not in _ROTARY:
        raise ExportError(
            f"rotary scaling is {rotary['rope_type']!r}, for which the builder of onnxruntime-genai {BUILDER_VERSION} "
            f"writes a model that differs from PyTorch; it must be one of {', '.join(_ROTARY)}. Export with --target "
            "portable"
        )
    if _has_window(model.module.config):
        raise ExportError(
            f"the attention of {model.source} has a sliding window, for which onnxruntime-genai {BUILDER_VERSION} "
            "keeps a shorter cache than its builder's models return. Export with --target portable"
        )
    part = rotary.get("partial_rotary_factor") or getattr(model.module.config, "partial_rotary_factor", None) or 1.0
    size, rotated = _head_size(model), int(_head_size(model) * part)
    if size % _HEAD_MULTIPLE or rotated % _HEAD_MULTIPLE:
        raise ExportError(
            f"a head has {size} values, of which {rotated} have rotary positions; ONNX Runtime's GroupQueryAttention "
            f"needs multiples of {_HEAD_MULTIPLE}. Export with --target portable"
        )


def _check_options(model: LoadedModel, options: ExportOptions) -> None:
    """Raise ExportError for options that the builder does not take."""
    stated = options.opset is not None or options.inline or options.cache is not CacheKind.DYNAMIC
    if stated or options.shape or options.runtime is not None:
        raise ExportError(
            "--target ort-genai does not take --opset, --inline, --cache, --shape or --for: the builder of "
            "onnxruntime-genai chooses them (it always keeps the cache in place)"
        )
    check_quantization(model, options)


def _fused_library(kernels: Kernels) -> Path | None:
    """Return the library to put into the folder; see `export_genai`."""
    if kernels is Kernels.FUNCTION:
        return None
    if kernels is Kernels.FUSED:
        return native.ort_library()
    library = native.availability()
    return library.path if library else None


def _checkpoint_name(name: str, layers: int) -> str:
    """Return the state dict's name for the builder's `name`, with .T if it is transposed."""
    name = name.replace(".attn.", ".self_attn.").replace(f"model.layers.{layers}.final_norm_layernorm", "model.norm")
    name = name.replace("_norm.layernorm.", "_norm.")  # of queries and keys
    return name.replace(".MatMul.weight", ".weight.T").replace(".Add.bias", ".bias")


def _rename_weights(graph: ir.Graph, model: LoadedModel) -> None:
    """Give weights their names in the checkpoint."""
    layers = len({name.split(".")[2] for name in model.module.state_dict() if name.startswith("model.layers.")})
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = _checkpoint_name(value.name, layers)
        if name != value.name and name not in graph.initializers:
            del graph.initializers[value.name]
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
            graph.initializers[name] = value


def _join_gate_and_up(graph: ir.Graph, model: LoadedModel) -> None:
    """Store the checkpoint's `gate_up_proj` (Phi-3), which the builder splits, as the one matrix that it is."""
    for name in model.module.state_dict():
        layer, found, _ = name.rpartition(".gate_up_proj.weight")
        halves = [graph.initializers.get(f"{layer}.{part}.weight.T") for part in ("gate_proj", "up_proj")]
        if not found or any(half is None or half.const_value is None for half in halves):
            continue
        gate, up = (next(node for node, _ in half.uses()) for half in halves if half is not None)
        arrays = [half.const_value.numpy() for half in halves if half is not None and half.const_value is not None]
        whole = ir.Value(name=f"{name}.T", const_value=ir.tensor(np.concatenate(arrays, axis=1), name=f"{name}.T"))
        graph.initializers[f"{name}.T"] = whole
        product = ir.node("MatMul", [gate.inputs[0], whole], name=f"{layer}.gate_up_proj")
        split = ir.node(
            "Split", [product.outputs[0]], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{layer}.split"
        )
        product.outputs[0].name, product.outputs[0].type = f"{layer}.gate_up_proj", gate.outputs[0].type
        for output, old in zip(split.outputs, (gate.outputs[0], up.outputs[0]), strict=True):
            output.name, output.shape, output.type = old.name, old.shape, old.type
            old.replace_all_uses_with(output)
        graph.insert_before(gate, [product, split])
        graph.remove([gate, up], safe=True)
        for part in ("gate_proj", "up_proj"):
            del graph.initializers[f"{layer}.{part}.weight.T"]


def _packed(graph: ir.Graph, model: LoadedModel) -> dict[str, tuple[str, ...]]:
    """The checkpoint's matrices that the builder has joined into one, by its name."""
    parts, own = ("q_proj", "k_proj", "v_proj"), model.module.state_dict()
    return {
        name: tuple(name.removesuffix(".T").replace("qkv_proj", part) for part in parts)
        for name in graph.initializers
        if "qkv_proj" in name and name.removesuffix(".T") not in own
    }


def _fix_head_size(graph: ir.Graph, size: int) -> None:
    """Set the size of a head, which the builder leaves dynamic for quantised caches."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([size if dim == _HEAD_AXIS else dim for dim in dims])


def _complete(built: ir.Model, model: LoadedModel, *, options: ExportOptions) -> None:
    """Add what portable files also have: functions, the checkpoint's names and the metadata."""
    opset = built.opset_imports[""]
    graph = built.graph
    built.opset_imports[DOMAIN] = OP_VERSION
    attach_functions(built, opset)
    passes.RemoveUnusedNodesPass()(built)  # the affine parameters that were not connected
    _rename_weights(graph, model)
    _join_gate_and_up(graph, model)
    for node in graph:
        node.metadata_props.clear()
        if node.domain == DOMAIN and node.name is not None:
            node.metadata_props["module"] = node.name
    _fix_head_size(graph, _head_size(model))
    graph.name = model.family
    metadata = describe(model, options, opset=opset)
    versions = {**metadata.versions, "onnxruntime-genai": BUILDER_VERSION}
    write_metadata(built, replace(metadata, target=Target.ORT_GENAI, packed=_packed(graph, model), versions=versions))


def export_genai(
    model: LoadedModel,
    folder: str | Path,
    *,
    options: ExportOptions | None = None,
    kernels: Kernels = Kernels.AUTO,
    progress: Progress = silent,
) -> ExportedModel:
    """Write a language model as a folder that onnxruntime-genai runs.

    genai_config.json selects the CPU for a model in fp32, and CUDA for one in fp16 or bf16. The folder
    appears whole or not at all.

    Args:
        model: of a family of `BUILDERS`, that was loaded for the task "text-generation"; it is not changed.
        folder: the folder to write. It gets model.onnx and its data, genai_config.json, the tokenizer, the library of
            fused kernels, and a manifest of all of them. An earlier export in it is replaced.
        options: dtype and quantization; the builder chooses the rest. None is `ExportOptions()`.
        kernels: FUSED puts the library of fused kernels into the folder, FUNCTION leaves it out, and AUTO puts it there
            if it is installed.
        progress: called at the start of each stage.

    Raises:
        ExportError: the builder cannot write the model, an option does not suit it, or the folder contains other files.
        BackendUnavailable: onnxruntime-genai is missing or has another version, or FUSED is requested and the library
            is not installed.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    options = ExportOptions() if options is None else options
    _check_options(model, options)
    _check_model(model)
    base = import_builder(model.family)
    library = _fused_library(kernels)
    libraries = {} if library is None else {library.name: library}
    model = model.converted(torch_dtype(options.dtype))
    with new_folder(Path(folder), earlier_export) as new, tempfile.TemporaryDirectory() as cache:
        progress("building", 0, 3)
        builder = build_genai(base, model, dtype=options.dtype, library=next(iter(libraries), None), cache=cache)
        progress("writing", 1, 3)
        _complete(builder.model, model, options=options)
        if options.quantization is not None:
            progress("quantizing", 2, 3)
        written = quantized(builder.model, options)
        forget_initializer_info(written.graph)
        ir.save(written, new / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
        write_genai_config(builder, model, folder=new)
        copy_companions(model, new)
        for name, file in libraries.items():
            shutil.copyfile(file, new / name)
        write_manifest(new, libraries, content={"target": Target.ORT_GENAI})
    progress("written", 3, 3)
    return ExportedModel(folder)
