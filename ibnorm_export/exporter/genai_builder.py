"""The model builder of onnxruntime-genai, extended to write IBNorm nodes.

The builder has a method that writes the node of a norm. Here that method is overridden: one IBNorm node replaces a
SimplifiedLayerNormalization. The method is not a public interface, so the version is pinned and checked.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.artifacts.tokenizer import read_json
from ibnorm_export.errors import BackendUnavailable, ExportError
from ibnorm_export.graph.quantization import preserved_logging
from ibnorm_export.op.spec import DOMAIN
from ibnorm_export.op.torch_op import IBNorm

__all__ = [
    "BUILDER_VERSION",
    "build_genai",
    "expected_genai_config",
    "import_builder",
    "write_genai_config",
]

#: The only version whose method for norms is known.
BUILDER_VERSION: Final = "0.18.0"

#: Module and class of the builder for each family whose results were compared with those of transformers.
BUILDERS: Final = {
    "llama": ("llama", "LlamaModel"),
    "mistral": ("mistral", "MistralModel"),
    "qwen2": ("qwen", "QwenModel"),
    "qwen3": ("qwen", "Qwen3Model"),
    "phi3": ("phi", "Phi3MiniModel"),
    "gemma": ("gemma", "GemmaModel"),
    "gemma2": ("gemma", "Gemma2Model"),
}

#: Why the builder cannot write a family that it has a class for.
REFUSED: Final = {
    "gemma3_text": (
        f"the builder of onnxruntime-genai {BUILDER_VERSION} reads rope_local_base_freq, which Gemma 3 of "
        "transformers 5 does not have"
    ),
}

_IR_DTYPES: Final = {
    DType.FP32: ir.DataType.FLOAT,
    DType.FP16: ir.DataType.FLOAT16,
    DType.BF16: ir.DataType.BFLOAT16,
}

#: The base class of `_IBNormNodes` is only known at run time: it is the builder's.
_UnknownBase: Any = object


def import_builder(family: str) -> type[Any]:
    """Import the builder's class for a family of `BUILDERS`.

    Raises:
        BackendUnavailable: onnxruntime-genai is missing or has another version.
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
            f"--target ort-genai needs onnxruntime-genai {BUILDER_VERSION}, but {version} is installed and its "
            f"builder may differ: pip install onnxruntime-genai=={BUILDER_VERSION}"
        )
    try:
        with preserved_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, name = BUILDERS[family]
            builder: type[Any] = getattr(importlib.import_module(f"onnxruntime_genai.models.builders.{module}"), name)
    except ImportError as error:
        raise BackendUnavailable(f"the model builder of onnxruntime-genai cannot be imported: {error}") from error
    return builder


@dataclass(frozen=True, slots=True)
class _Affine:
    """What the builder's code reads from a norm: a weight and a bias, neither of which may be missing."""

    weight: Tensor
    bias: Tensor


class _IBNormNodes(_UnknownBase):  # type: ignore[misc]  # see `_UnknownBase`
    """The part of the builder that differs: it reads weights from memory and writes IBNorm nodes.

    Attributes:
        loaded: the model.
        paths: module path of each norm, by `id`.
        library: file name of the library of fused kernels, for genai_config.json; None leaves it out.
    """

    loaded: nn.Module
    paths: Mapping[int, str]
    library: str | None
    _norm: IBNorm | None = None
    _constants: Mapping[str, str] = {}
    _attention: Any = None

    def load_weights(self, input_path: str) -> nn.Module:
        return self.loaded

    def make_layernorm(self, layer_id: int, layernorm: Any, skip: bool, simple: bool, location: str) -> None:
        affine = self._begin_norm(layernorm, f"{location} of layer {layer_id}")
        super().make_layernorm(layer_id, affine, skip, False, location)

    def _begin_norm(self, norm: Any, place: str) -> _Affine:
        """Remember the norm whose nodes come next, and make the constants for a scale or bias that it lacks."""
        if not isinstance(norm, IBNorm):
            raise ExportError(
                f"the norm {place} is {type(norm).__name__}; --target ort-genai only takes models whose norms are all "
                "IBNorm. Export with --target portable"
            )
        dtype = next(p.dtype for p in self.loaded.parameters() if p.is_floating_point())
        ones, zeros = torch.ones(norm.features, dtype=dtype), torch.zeros(norm.features, dtype=dtype)
        self._norm = norm
        self._constants = {}
        for role, parameter, values in (("ones", norm.weight, ones), ("zeros", norm.bias, zeros)):
            if parameter is None:  # all norms share one constant, named as in a portable file
                self._constants[role] = f"ibnorm.{role}.{norm.features}"
                if self._constants[role] not in self.model.graph.initializers:
                    self.make_initializer(values, self._constants[role], to=self.io_dtype)
        return _Affine(ones if norm.weight is None else norm.weight, zeros if norm.bias is None else norm.bias)

    def make_qk_norm(self, layer_id: int, attention: Any) -> None:
        """Write the norms of queries and keys; the builder writes their nodes in a method without a part for them."""
        self._attention = attention
        norms = {name: getattr(attention, name) for name in ("q_norm", "k_norm")}
        affine = {name: self._begin_norm(norm, f"{name} of layer {layer_id}") for name, norm in norms.items()}
        super().make_qk_norm(layer_id, SimpleNamespace(**affine))
        self._attention = None

    def make_node(self, op_type: str, inputs: list[str], outputs: list[str], **kwargs: Any) -> Any:
        if self._attention is None or op_type != "SimplifiedLayerNormalization":
            return super().make_node(op_type, inputs=inputs, outputs=outputs, **kwargs)
        name = "q_norm" if "/q_norm/" in kwargs["name"] else "k_norm"
        norm = getattr(self._attention, name)
        self._begin_norm(norm, name)
        bias = self._constants.get("zeros", f"{self.paths[id(norm)]}.bias")
        if norm.bias is not None:
            self.make_initializer(norm.bias, bias, to=self.io_dtype)
        return super().make_node(
            norm.spec.op_type,
            inputs=[inputs[0], self._constants.get("ones", inputs[1]), bias],
            outputs=outputs,
            name=self.paths[id(norm)],
            domain=DOMAIN,
            **norm.spec.attributes(),
        )

    def make_layernorm_op(
        self, name: str, op_type: str, inputs: list[str], outputs: list[str], skip: bool, *args: Any, **kwargs: Any
    ) -> None:
        norm = self._norm
        assert norm is not None
        spec = norm.spec
        *data, weight, bias = inputs
        node_outputs = [outputs[0]]
        if skip:  # nothing uses the sum of the last norm, but a function must return all its outputs
            node_outputs.append(outputs[3] if len(outputs) == 4 else f"{name}/sum")
        self.make_node(
            spec.compression.skip_op_type if skip else spec.op_type,
            inputs=[*data, self._constants.get("ones", weight), self._constants.get("zeros", bias)],
            outputs=node_outputs,
            name=self.paths[id(norm)],
            domain=DOMAIN,
            **spec.attributes(),
        )
        if skip and len(outputs) != 4:
            self.make_value(node_outputs[1], self.io_dtype, shape=self.make_hidden_state_shape())

    def update_genai_config(self, genai_config: dict[str, Any]) -> None:
        super().update_genai_config(genai_config)
        if self.library is not None:
            genai_config["model"]["decoder"]["session_options"]["custom_ops_library"] = self.library


@contextlib.contextmanager
def _silenced_builder() -> Iterator[None]:
    """Silence the builder, which prints to stdout, where only the command's own output belongs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _make_builder(base: type[Any], model: LoadedModel, *, dtype: DType, library: str | None, cache: str) -> Any:
    """Make a builder, which changes the model's configuration, without a graph yet; see `build_genai`."""
    paths = {id(module): path for path, module in model.module.named_modules() if isinstance(module, IBNorm)}
    builder_class = type("Builder", (_IBNormNodes, base), {"loaded": model.module, "paths": paths, "library": library})
    config: Any = model.module.config
    config._name_or_path = model.source
    config.architectures = [type(model.module).__name__]
    # For the CPU, the builder writes half-precision models without GroupQueryAttention: they are slow, and the shapes
    # in the file are wrong.
    provider = "cpu" if dtype is DType.FP32 else "cuda"
    with _silenced_builder():
        extra = {"hf_token": False, "hf_remote": False}
        builder = builder_class(config, _IR_DTYPES[dtype], _IR_DTYPES[dtype], provider, cache, extra)
    if model.family.startswith("gemma"):
        builder.layernorm_attrs["add_offset"] = 0  # the weights in memory already contain it
        builder.embed_attrs["scale"] = config.hidden_size**0.5  # the builder rounds it to two decimals
    return builder


def build_genai(base: type[Any], model: LoadedModel, *, dtype: DType, library: str | None, cache: str) -> Any:
    """Run the builder on a model in memory.

    Args:
        base: what `import_builder` returned.
        model: a model with parameters in `dtype`; the builder changes its configuration, so give it a copy.
        dtype: type of weights and activations.
        library: file name of the library of fused kernels, for genai_config.json; None leaves it out.
        cache: a folder for the builder's temporary files.

    Returns:
        The builder, its graph complete in `.model`.

    Raises:
        ExportError: a norm of the model is not an IBNorm.
    """
    builder = _make_builder(base, model, dtype=dtype, library=library, cache=cache)
    with _silenced_builder():
        builder.make_model(model.source)
    return builder


def write_genai_config(builder: Any, model: LoadedModel, *, folder: Path) -> None:
    """Write genai_config.json to `folder`.

    Raises:
        ExportError: the model has no token that ends a text.
    """
    try:
        with _silenced_builder():
            builder.make_genai_config(model.module.config, {}, str(folder))
    except ValueError as error:
        raise ExportError(
            f"onnxruntime-genai cannot describe {model.source}: {error}. Set eos_token_id in its config.json, or "
            "export with --target portable"
        ) from error


def expected_genai_config(model: LoadedModel, *, dtype: DType, library: str | None) -> dict[str, Any]:
    """Return what genai_config.json of an export contains, without building the model.

    Args:
        model: a LLaMA; it is not changed.
        dtype: type of the export's weights and activations.
        library: file name of the library of fused kernels in the folder; None if it has none.

    Raises:
        BackendUnavailable: onnxruntime-genai is missing or has another version.
    """
    base = import_builder(model.family)
    module: Any = copy.copy(model.module)  # the builder changes the configuration, and only that
    module.config = copy.deepcopy(module.config)
    copied = replace(model, module=module)
    with tempfile.TemporaryDirectory() as folder:
        builder = _make_builder(base, copied, dtype=dtype, library=library, cache=folder)
        write_genai_config(builder, copied, folder=Path(folder))
        return read_json(Path(folder) / GENAI_CONFIG_FILE)
