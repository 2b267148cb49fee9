"""LoadedModel -> a folder that onnxruntime-genai runs as it is, built by that package's own model builder.

The builder lays out the graph (GroupQueryAttention, a shared buffer of keys and values); here its hook for norms
is overridden, so that one IBNorm node stands where a SimplifiedLayerNormalization would, with its function in the
file. The hook is no public interface: the version is pinned and checked.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.manifest import write_manifest
from ibnorm_export.artifacts.metadata import CacheKind, Target, Task
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import BackendUnavailable, ExportError
from ibnorm_export.exporter.export import ExportOptions, check_quantization, describe
from ibnorm_export.exporter.text_folder import copy_companions, earlier_export
from ibnorm_export.files import new_folder
from ibnorm_export.graph.cleanup import attach_functions
from ibnorm_export.graph.quantization import preserved_logging, quantize
from ibnorm_export.op import native
from ibnorm_export.op.spec import DOMAIN, OP_VERSION
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.progress import Progress, silent
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["BUILDER_VERSION", "export_genai"]

#: The only version whose hook for norms is known.
BUILDER_VERSION: Final = "0.18.0"

#: Of ONNX Runtime 1.31's GroupQueryAttention where it rotates.
_HEAD_MULTIPLE: Final = 16

_FAMILIES: Final = ("llama",)

#: Name that its builder gives the size of a head.
_HEAD_AXIS: Final = "kv_cache_dim"

#: Kinds of rotary embedding that its builder writes as transformers computes them: each was compared.
_ROTARY: Final = ("default", "llama3")

_IR_DTYPES: Final = {
    DType.FP32: ir.DataType.FLOAT,
    DType.FP16: ir.DataType.FLOAT16,
    DType.BF16: ir.DataType.BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class _Norm:
    """What the builder's code asks of a norm: a weight and a bias, both there."""

    weight: Tensor
    bias: Tensor


def _builder() -> type[Any]:
    """The builder's class for LLaMA.

    Raises:
        BackendUnavailable: the package is missing or of another version.
    """
    try:
        version = importlib.metadata.version("onnxruntime-genai")
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendUnavailable(
            "--target ort-genai needs the package onnxruntime-genai, which is not installed: "
            "pip install 'ibnorm-export[genai]'"
        ) from error
    if version != BUILDER_VERSION:
        raise BackendUnavailable(
            f"--target ort-genai builds with onnxruntime-genai {BUILDER_VERSION}; {version} is installed, whose "
            f"builder may differ: pip install onnxruntime-genai=={BUILDER_VERSION}"
        )
    try:
        with preserved_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from onnxruntime_genai.models.builders.llama import LlamaModel
    except ImportError as error:
        raise BackendUnavailable(f"the model builder of onnxruntime-genai cannot be imported: {error}") from error
    made: type[Any] = LlamaModel
    return made


def _subclass(base: type[Any], model: LoadedModel, *, library: str | None) -> type[Any]:
    """The builder with IBNorm nodes, reading its weights from `model` in memory."""
    paths = {id(module): path for path, module in model.module.named_modules() if isinstance(module, IBNorm)}

    class Builder(base):  # type: ignore[misc]  # the base class is only known at run time
        _norm: IBNorm | None = None
        _affine: Mapping[str, str] = {}

        def load_weights(self, input_path: str) -> nn.Module:
            return model.module

        def make_layernorm(self, layer_id: int, layernorm: Any, skip: bool, simple: bool, location: str) -> None:
            if not isinstance(layernorm, IBNorm):
                raise ExportError(
                    f"the norm {location} of layer {layer_id} is {type(layernorm).__name__}; the GenAI form carries "
                    "models all of whose norms are IBNorm. Export with --target portable"
                )
            given = next(p for p in model.module.parameters() if p.is_floating_point())
            weight, bias = layernorm.weight, layernorm.bias
            stand_in = _Norm(
                torch.ones(layernorm.features, dtype=given.dtype) if weight is None else weight,
                torch.zeros(layernorm.features, dtype=given.dtype) if bias is None else bias,
            )
            self._norm = layernorm
            self._affine = {}
            for role, parameter, constant in (("ones", weight, stand_in.weight), ("zeros", bias, stand_in.bias)):
                if parameter is None:  # named as in the portable form, and shared by all norms
                    self._affine[role] = f"ibnorm.{role}.{layernorm.features}"
                    if self._affine[role] not in self.model.graph.initializers:
                        self.make_initializer(constant, self._affine[role], to=self.io_dtype)
            super().make_layernorm(layer_id, stand_in, skip, False, location)

        def make_layernorm_op(
            self, name: str, op_type: str, inputs: list[str], outputs: list[str], skip: bool, *args: Any, **kwargs: Any
        ) -> None:
            norm = self._norm
            assert norm is not None
            spec = norm.spec
            *data, weight, bias = inputs
            inputs = [*data, self._affine.get("ones", weight), self._affine.get("zeros", bias)]
            outs = [outputs[0]]
            if skip:  # the last norm's sum has no use, and yet a name: a function gives all its outputs
                outs.append(outputs[3] if len(outputs) == 4 else f"{name}/sum")
            self.make_node(
                spec.compression.skip_op_type if skip else spec.op_type,
                inputs=inputs,
                outputs=outs,
                name=paths[id(norm)],
                domain=DOMAIN,
                **spec.attributes(),
            )
            if skip and len(outputs) != 4:
                self.make_value(outs[1], self.io_dtype, shape=self.make_hidden_state_shape())

        def update_genai_config(self, genai_config: dict[str, Any]) -> None:
            super().update_genai_config(genai_config)
            if library is not None:
                genai_config["model"]["decoder"]["session_options"]["custom_ops_library"] = library

    return Builder


def _checkpoint_name(name: str, layers: int) -> str:
    """The builder's name of an initializer -> its name in the state dict, .T where it is transposed."""
    name = name.replace(".attn.", ".self_attn.").replace(f"model.layers.{layers}.final_norm_layernorm", "model.norm")
    return name.replace(".MatMul.weight", ".weight.T").replace(".Add.bias", ".bias")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The builder reports to stdout, which belongs to this package's own output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _finish(built: ir.Model, model: LoadedModel, *, options: ExportOptions) -> None:
    """Functions, names of the checkpoint, and what the file says of itself."""
    opset = built.opset_imports[""]
    built.opset_imports[DOMAIN] = OP_VERSION
    attach_functions(built, opset)
    state = model.module.state_dict()
    graph = built.graph
    passes.RemoveUnusedNodesPass()(built)  # the affine parameters that were not connected
    layers = len({name.split(".")[2] for name in state if name.startswith("model.layers.")})
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = _checkpoint_name(value.name, layers)
        if name != value.name and name not in graph.initializers:
            del graph.initializers[value.name]
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
            graph.initializers[name] = value
    packed = {
        name: tuple(name.removesuffix(".T").replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
        for name in graph.initializers
        if "qkv_proj" in name
    }
    for node in graph:
        node.metadata_props.clear()
        if node.domain == DOMAIN and node.name is not None:
            node.metadata_props["module"] = node.name
    _fix_head_size(graph, model)
    graph.name = model.family
    built.producer_name = "ibnorm-export"
    built.producer_version = importlib.metadata.version("ibnorm-export")
    metadata = describe(model, options, opset=opset)
    versions = {**metadata.versions, "onnxruntime-genai": BUILDER_VERSION}
    metadata = replace(metadata, target=Target.ORT_GENAI, packed=packed, versions=versions)
    built.metadata_props.clear()
    built.metadata_props.update(metadata.to_props())


def _fix_head_size(graph: ir.Graph, model: LoadedModel) -> None:
    """The builder leaves the size of a head open, for caches that are quantised; here it is the model's."""
    config: Any = model.module.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([size if dim == _HEAD_AXIS else dim for dim in dims])


def export_genai(
    model: LoadedModel,
    folder: str | Path,
    *,
    options: ExportOptions | None = None,
    kernels: Kernels = Kernels.AUTO,
    progress: Progress = silent,
) -> ExportedModel:
    """Write `model`, loaded for the task "text-generation", as a folder that onnxruntime-genai runs.

    fp32 is built for the CPU, fp16 and bf16 for CUDA, as genai_config.json says.

    Args:
        model: a LLaMA; it stays as it is.
        folder: gets model.onnx and its data, genai_config.json, tokenizer files, the op library, and a manifest of all.
        options: the dtype; opset, inline and fuse_skip do not apply, since the builder decides them.
        kernels: whether the library of fused kernels lies beside the model: FUSED demands it, FUNCTION leaves
            it out, AUTO takes it where it is installed.
        progress: called as the work goes on.

    Raises:
        ExportError: the builder cannot carry the model or an option, or the folder holds something else.
        BackendUnavailable: onnxruntime-genai is missing or of another version, or the library is demanded and
            not installed.
        ModelFileError: the tokenizer is damaged or does not fit the model.
    """
    options = ExportOptions() if options is None else options
    if model.task is not Task.TEXT_GENERATION or model.family not in _FAMILIES:
        raise ExportError(
            f"--target ort-genai takes {', '.join(_FAMILIES)} for the task text-generation; this is {model.family} for "
            f"{model.task}. Export with --target portable"
        )
    rotary = getattr(model.module.config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") not in _ROTARY:
        raise ExportError(
            f"the builder of GenAI {BUILDER_VERSION} does not carry rotary scaling {rotary['rope_type']!r} (its model "
            f"differs from PyTorch); it carries {', '.join(_ROTARY)}. Export with --target portable"
        )
    if options.opset is not None or options.inline or options.cache != CacheKind.DYNAMIC:
        raise ExportError(
            "--target ort-genai takes neither --opset nor --inline nor --cache: the builder of GenAI decides them (its "
            "cache is kept in place anyway)"
        )
    head = next(int(spec.shape[3]) for spec in model.inputs if spec.floating)
    if head % _HEAD_MULTIPLE:
        raise ExportError(
            f"heads have {head} values; ONNX Runtime's GroupQueryAttention with rotary positions takes multiples of "
            f"{_HEAD_MULTIPLE}. Export with --target portable"
        )
    check_quantization(model, options)
    base = _builder()
    library = None if kernels is Kernels.FUNCTION else native.ort_library() if kernels is Kernels.FUSED else None
    if kernels is Kernels.AUTO and (found := native.availability()):
        library = found.path
    model = model.converted(torch_dtype(options.dtype))
    config: Any = model.module.config
    config._name_or_path = model.source
    config.architectures = ["LlamaForCausalLM"]
    with new_folder(Path(folder), earlier_export) as beside, tempfile.TemporaryDirectory() as cache:
        progress("building", 0, 3)
        made_class = _subclass(base, model, library=None if library is None else library.name)
        dtype = _IR_DTYPES[options.dtype]
        # the builder lays out halves for the CPU without GroupQueryAttention, slowly and with wrong shapes in the file
        provider = "cpu" if options.dtype is DType.FP32 else "cuda"
        with _quiet():
            builder = made_class(config, dtype, dtype, provider, cache, {"hf_token": False, "hf_remote": False})
            builder.make_model(model.source)
        progress("writing", 1, 3)
        _finish(builder.model, model, options=options)
        built = builder.model
        if options.quantization is not None:
            progress("quantising", 2, 3)
            built = ir.serde.deserialize_model(quantize(ir.serde.serialize_model(built), options.quantization))
        ir.save(built, beside / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
        with _quiet():
            builder.make_genai_config(config, {}, str(beside))
        copy_companions(model, beside)
        if library is not None:
            shutil.copyfile(library, beside / library.name)
        write_manifest(beside, {} if library is None else {library.name: library}, content={"target": Target.ORT_GENAI})
    progress("written", 3, 3)
    return ExportedModel(folder)
