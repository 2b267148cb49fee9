"""Build a TensorRT or TensorRT-RTX engine from an exported file, and write its description next to it.

The norms run as their functions, which the compiler fuses, or as plugins (TensorRT only). Networks are strongly typed:
the types in the file are the types that run.

TensorRT-RTX 1.7.1, whose builder needs no GPU, builds the Attention of opset 23 in float32 only if the layer is marked
decomposable, so every one is marked. Its parser accepts an Attention with one output only, so a cache is extended by a
Concat in front of the Attention.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.environment import version_of
from ibnorm_export.errors import BackendUnavailable, EngineError
from ibnorm_export.files import Kind, check_target, named_file, new_file, sha256_of
from ibnorm_export.graph.attention_cache import grow_cache_by_concat
from ibnorm_export.graph.stored_graph import read_graph
from ibnorm_export.op import native
from ibnorm_export.runtimes.tensorrt.bindings import bindings, last_error, logger
from ibnorm_export.runtimes.tensorrt.description import EngineDescription, description_path, read_description
from ibnorm_export.runtimes.tensorrt.engine import Engine, gpu_name
from ibnorm_export.runtimes.tensorrt.norm_kernels import kernels_in_inspection, kernels_in_plan, norm_layers
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, NormRoute, Runtime
from ibnorm_export.runtimes.tensorrt.profiles import Profile, parse_ranges, profiles, shapes_of

__all__ = ["build_engine"]

_WHY_FUNCTION: Final = "TensorRT's compiler fuses the function; use the plugin if you measure that it is faster"


def build_engine(
    exported: ExportedModel | str | Path, path: str | Path, *, options: EngineOptions | None = None
) -> Engine:
    """Build a plan, and write it with its description next to it.

    Args:
        exported: an exported file, or its path; its external data is read from the same folder.
        path: path of the plan; the description is written to the same name with ".json" appended.
        options: see `EngineOptions`; None is the default.

    Returns:
        The engine, with what each norm became.

    Raises:
        ModelFileError: the file cannot be read.
        EngineError: an option does not fit the model or the runtime, or the runtime cannot read or build the model.
        BackendUnavailable: the runtime is not installed, or needs a GPU and there is none.
    """
    options = EngineOptions() if options is None else options
    model = exported if isinstance(exported, ExportedModel) else ExportedModel(exported)
    path = named_file(path, "model.plan", error=EngineError)
    check_target(path, _PLAN, error=EngineError)
    wanted = profiles(model, parse_ranges(options.ranges))
    trt = bindings(options.runtime)
    builder = _builder(trt, options.runtime)
    network, config = _network(trt, builder, model=model, options=options)
    _add_profiles(trt, builder, config=config, model=model, wanted=wanted)
    began = time.perf_counter()
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise EngineError(f"{model.path}: {options.runtime} {trt.__version__} cannot build it: {last_error(trt)}")
    plan = bytes(built)
    seconds = round(time.perf_counter() - began, 3)
    description = _describe(trt, plan, model=model, options=options, wanted=wanted, seconds=seconds)
    _write(path, plan, description=description)
    if options.timing_cache is not None:
        with new_file(options.timing_cache, EngineError) as temporary:
            (temporary / options.timing_cache.name).write_bytes(bytes(config.get_timing_cache().serialize()))
    return Engine(path, description)


def _builder(trt: Any, runtime: Runtime) -> Any:
    logger(trt).errors.clear()
    try:
        return trt.Builder(logger(trt))
    except (TypeError, RuntimeError) as error:  # the bindings raise one or the other when there is no builder
        raise BackendUnavailable(
            f"{runtime} {trt.__version__} does not start, most likely because there is no GPU or driver: "
            f"{last_error(trt)}"
        ) from error


def _network(trt: Any, builder: Any, *, model: ExportedModel, options: EngineOptions) -> tuple[Any, Any]:
    """Make the network and the configuration of a build."""
    typed = int(getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"))  # noqa: B009  # an enum of a C++ module
    network = builder.create_network(1 << typed)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.norm is NormRoute.PLUGIN:
        _load_plugin(trt, config, embed=options.embed_plugin)
    _parse(trt, network, model=model, runtime=options.runtime)
    _make_attention_decomposable(trt, network)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.compute_capabilities:
        _set_targets(trt, config, names=options.compute_capabilities)
    if options.timing_cache is not None:
        _read_timing_cache(config, options.timing_cache)
    return network, config


def _parse(trt: Any, network: Any, *, model: ExportedModel, runtime: Runtime) -> None:
    parser = trt.OnnxParser(network, logger(trt))
    read = read_graph(model)
    if grow_cache_by_concat(read.graph):
        if parser.parse(ir.serde.serialize_model(read).SerializeToString(), str(model.path)):
            return
    elif parser.parse_from_file(str(model.path)):
        return
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        if error.code() == trt.ErrorCode.UNSUPPORTED_NODE:
            raise EngineError(
                f"{model.path}: {runtime} {trt.__version__} does not support the operator {error.node_operator()} "
                f"(node {error.node_name()!r}): {error.desc()}"
            )
    reason = parser.get_error(0).desc() if parser.num_errors else last_error(trt)
    raise EngineError(f"{model.path}: {runtime} {trt.__version__} cannot read it: {reason}")


def _make_attention_decomposable(trt: Any, network: Any) -> None:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # the bindings convert a layer to its own type this way
            layer.attention.decomposable = True


def _set_targets(trt: Any, config: Any, *, names: Sequence[str]) -> None:
    legal = {f"sm_{name.removeprefix('SM')}": value for name, value in trt.ComputeCapability.__members__.items()}
    legal = {name: value for name, value in legal.items() if name[3:].isdigit()}
    for name in names:
        if name not in legal:
            raise EngineError(f"compute capability is {name!r}; it must be one of {', '.join(legal)}")
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(legal[name], index)


def _load_plugin(trt: Any, config: Any, *, embed: bool) -> None:
    if problem := native.plugin_problem(trt.__version__):
        raise EngineError(problem)
    library = native.trt_library()
    if trt.get_plugin_registry().load_library(str(library)) is None:
        raise EngineError(f"TensorRT {trt.__version__} does not load {library}: {last_error(trt)}")
    if embed:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.plugins_to_serialize = [str(library)]


def _read_timing_cache(config: Any, file: Path) -> None:
    content = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
        raise EngineError(f"{file} is a timing cache for another GPU or version of TensorRT: name another file")


def _add_profiles(trt: Any, builder: Any, *, config: Any, model: ExportedModel, wanted: Sequence[Profile]) -> None:
    for item in wanted:
        sizes = builder.create_optimization_profile()
        for tensor in model.inputs:
            if any(isinstance(axis, str) for axis in tensor.shape):
                sizes.set_shape(tensor.name, *shapes_of(tensor.shape, item.ranges))
        if config.add_optimization_profile(sizes) < 0:
            raise EngineError(f"{model.path}: TensorRT rejects the profile {item}: {last_error(trt)}")


def _describe(
    trt: Any, plan: bytes, *, model: ExportedModel, options: EngineOptions, wanted: Sequence[Profile], seconds: float
) -> EngineDescription:
    automatic = options.norm is NormRoute.AUTO
    return EngineDescription(
        model.path.name,
        sha256_of(model.path),
        runtime=options.runtime,
        runtime_version=str(trt.__version__),
        ibnorm_export=version_of("ibnorm-export"),
        gpu=gpu_name() if options.runtime is Runtime.TENSORRT else None,
        compute_capabilities=tuple(options.compute_capabilities),
        profiles=tuple(wanted),
        norm=NormRoute.FUNCTION if automatic else options.norm,
        why=_WHY_FUNCTION if automatic else "as requested",
        norms=norm_layers(model, _kernels(trt, plan, runtime=options.runtime)),
        build_s=seconds,
        size_bytes=len(plan),
        sha256=sha256_of(plan),
    )


def _kernels(trt: Any, plan: bytes, *, runtime: Runtime) -> Any:
    if runtime is Runtime.TENSORRT_RTX:
        return kernels_in_plan(plan)
    engine = trt.Runtime(logger(trt)).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot read the plan that it built: {last_error(trt)}")
    inspector = engine.create_engine_inspector()
    return kernels_in_inspection(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _is_described(path: Path) -> bool:
    try:
        read_description(path)
    except EngineError:
        return False
    return True


#: A plan has no signature; the description next to it shows that this package wrote it.
_PLAN: Final = Kind("a plan with its description next to it", _is_described)


def _write(path: Path, plan: bytes, *, description: EngineDescription) -> None:
    with new_file(path, EngineError) as temporary:
        (temporary / path.name).write_bytes(plan)
        text = json.dumps(description.to_dict(), indent=2) + "\n"
        (temporary / description_path(path).name).write_text(text, encoding="utf-8")
