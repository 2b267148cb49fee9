"""ExportedModel -> Engine: a TensorRT or TensorRT-RTX plan, with its description beside it.

The norms run as their functions, which the compiler fuses, or as plugins (TensorRT alone). Networks are
strongly typed: the types of the file are the types that run.

Seen with TensorRT-RTX 1.7.1, whose builder needs no GPU: opset 23's Attention builds in float32 only when it
is marked decomposable, so every one is. The parser takes an Attention of one output alone, so a cache is
grown by Concat in what it is given.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.environment import version_of
from ibnorm_export.errors import BackendUnavailable, EngineError
from ibnorm_export.files import new_file
from ibnorm_export.graph.attention import past_by_concat
from ibnorm_export.op import native
from ibnorm_export.runtimes.tensorrt.norm_kernels import NormLayers, kernels_in_inspection, kernels_in_plan, norm_layers
from ibnorm_export.runtimes.tensorrt.options import EngineOptions, NormRoute, Runtime
from ibnorm_export.runtimes.tensorrt.profiles import Profile, profiles, profiles_of, shapes_of

__all__ = ["Engine", "bindings", "build_engine", "read_engine"]

FORMAT: Final = 1
_WHY_FUNCTION: Final = (
    "TensorRT's compiler fuses the function; take the plugin where a measurement says that it is faster"
)


_MODULES: Final = {
    Runtime.TENSORRT: ("tensorrt", "tensorrt_bindings"),
    Runtime.TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """A plan on disk and what is written beside it."""

    path: Path
    description: dict[str, Any]
    norms: tuple[NormLayers, ...] = ()


def description_path(plan: Path) -> Path:
    """The JSON file beside a plan."""
    return plan.with_name(plan.name + ".json")


def bindings(runtime: Runtime) -> Any:
    """The Python module of a runtime.

    Raises:
        BackendUnavailable: it is not installed.
    """
    for name in _MODULES[runtime]:
        try:
            module = importlib.import_module(name)
            if hasattr(module, "__version__"):  # a folder of that name on the path imports too, as an empty package
                return module
        except ModuleNotFoundError as error:
            if error.name != name:
                raise BackendUnavailable(f"{name} is installed, but the package {error.name} is missing") from error
        except (ImportError, OSError) as error:
            raise BackendUnavailable(f"{name} is installed, but does not load: {error}") from error
    raise BackendUnavailable(f"{runtime.value} is not installed: pip install 'ibnorm-export[{runtime.value}]'")


@functools.cache
def _logger(trt: Any) -> Any:
    """The one logger of a process: TensorRT keeps the first that it is given."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # a C++ module without types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Collector()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _last_error(logger: Any) -> str:
    return logger.errors[-1] if logger.errors else "it gives no reason"


def _parse(trt: Any, network: Any, *, model: ExportedModel, runtime: Runtime) -> None:
    parser = trt.OnnxParser(network, _logger(trt))
    read = ir.load(model.path)
    if past_by_concat(read.graph):
        if parser.parse(ir.serde.serialize_model(read).SerializeToString(), str(model.path)):
            return
    elif parser.parse_from_file(str(model.path)):
        return
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        if error.code() == trt.ErrorCode.UNSUPPORTED_NODE:
            raise EngineError(
                f"{model.path}: {runtime.value} {trt.__version__} lacks the operator {error.node_operator()} "
                f"(node {error.node_name()!r}): {error.desc()}"
            )
    words = parser.get_error(0).desc() if parser.num_errors else _last_error(_logger(trt))
    raise EngineError(f"{model.path}: {runtime.value} {trt.__version__} cannot read it: {words}")


def _make_attention_decomposable(trt: Any, network: Any) -> None:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # how the bindings give a layer its own type
            layer.attention.decomposable = True


def _target(trt: Any, config: Any, *, names: Sequence[str]) -> None:
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
        raise EngineError(f"TensorRT {trt.__version__} does not load {library}: {_last_error(_logger(trt))}")
    if embed:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.plugins_to_serialize = [str(library)]


def _read_cache(trt: Any, config: Any, *, file: Path) -> None:
    content = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
        raise EngineError(f"{file} is the timing cache of another GPU or version of TensorRT: name another file")


def _add_profiles(trt: Any, builder: Any, *, config: Any, model: ExportedModel, wanted: Sequence[Profile]) -> None:
    for item in wanted:
        sizes = builder.create_optimization_profile()
        for tensor in model.inputs:
            if any(isinstance(axis, str) for axis in tensor.shape):
                sizes.set_shape(tensor.name, *shapes_of(tensor.shape, item.ranges))
        if config.add_optimization_profile(sizes) < 0:
            raise EngineError(f"{model.path}: TensorRT refuses the profile {item}: {_last_error(_logger(trt))}")


def build_engine(model: ExportedModel, path: str | Path, *, options: EngineOptions | None = None) -> Engine:
    """Build a plan for `model`, and write it with its description beside it.

    Args:
        model: the file; its external data is read from beside it.
        path: of the plan; the description is written to the same name with ".json" added.
        options: see `EngineOptions`.

    Returns:
        The plan, and how each norm was realised.

    Raises:
        EngineError: an option does not fit the model or the runtime, or the runtime cannot read or build it.
        BackendUnavailable: the runtime is not installed, or needs a GPU and there is none.
    """
    options = EngineOptions() if options is None else options
    path = Path(path)
    wanted = profiles(model, options.ranges)
    trt = bindings(options.runtime)
    logger = _logger(trt)
    logger.errors.clear()
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the bindings raise one or the other for a null builder
        raise BackendUnavailable(
            f"{options.runtime.value} {trt.__version__} does not start, most likely because there is no GPU or driver: "
            f"{_last_error(logger)}"
        ) from error
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
        _target(trt, config, names=options.compute_capabilities)
    if options.timing_cache is not None:
        _read_cache(trt, config, file=options.timing_cache)
    _add_profiles(trt, builder, config=config, model=model, wanted=wanted)
    began = time.perf_counter()
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise EngineError(
            f"{model.path}: {options.runtime.value} {trt.__version__} cannot build it: {_last_error(logger)}"
        )
    plan = bytes(built)
    norms = norm_layers(model, _kernels(trt, options.runtime, plan=plan))
    description = {
        "format": FORMAT,
        "source": model.path.name,
        "source_sha256": _sha256(model.path),
        "runtime": options.runtime.value,
        "runtime_version": trt.__version__,
        "ibnorm_export": version_of("ibnorm-export"),
        "gpu": _gpu_name() if options.runtime is Runtime.TENSORRT else None,
        "compute_capabilities": list(options.compute_capabilities) or "the runtime's default",
        "profiles": [{"name": item.name, "ranges": [asdict(r) for r in item.ranges]} for item in wanted],
        "norm": (NormRoute.FUNCTION if options.norm is NormRoute.AUTO else options.norm).value,
        "why": _WHY_FUNCTION if options.norm is NormRoute.AUTO else "asked for",
        "norms": [{**asdict(norm), "kernels": list(norm.kernels)} for norm in norms],
        "build_s": round(time.perf_counter() - began, 3),
        "size_bytes": len(plan),
        "sha256": hashlib.sha256(plan).hexdigest(),
    }
    with new_file(path, EngineError) as beside:
        (beside / path.name).write_bytes(plan)
        text = json.dumps(description, indent=2) + "\n"
        (beside / description_path(path).name).write_text(text, encoding="utf-8")
    if options.timing_cache is not None:
        with new_file(options.timing_cache, EngineError) as beside:
            (beside / options.timing_cache.name).write_bytes(bytes(config.get_timing_cache().serialize()))
    return Engine(path, description, norms)


def _kernels(trt: Any, runtime: Runtime, *, plan: bytes) -> Any:
    if runtime is Runtime.TENSORRT_RTX:
        return kernels_in_plan(plan)
    engine = trt.Runtime(_logger(trt)).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"TensorRT {trt.__version__} does not read its own plan: {_last_error(_logger(trt))}")
    inspector = engine.create_engine_inspector()
    return kernels_in_inspection(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _gpu_name() -> str | None:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _gpu_target() -> str | None:
    import torch

    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def read_engine(path: str | Path, model: ExportedModel | None = None, *, wanted: Runtime | None = None) -> Engine:
    """A plan that `build_engine` wrote, checked against its description and the installed runtime.

    Args:
        model: the file that it must have been built from.
        wanted: the runtime that it must be for.

    Raises:
        EngineError: plan or description is missing, truncated or changed, or of another version, GPU, file or runtime.
        BackendUnavailable: the runtime is not installed.
    """
    path = Path(path)
    beside = description_path(path)
    for file in (path, beside):
        if not file.is_file():
            raise EngineError(f"{file} does not exist; write it with `ibnorm-export build-engine`")
    try:
        description = json.loads(beside.read_text(encoding="utf-8"))
        size, digest = int(description["size_bytes"]), str(description["sha256"])
        runtime, version = Runtime(description["runtime"]), str(description["runtime_version"])
        norms = tuple(NormLayers(**{**norm, "kernels": tuple(norm["kernels"])}) for norm in description["norms"])
        gpu, targets = description["gpu"], description["compute_capabilities"]
        source, source_digest = str(description["source"]), str(description["source_sha256"])
        profiles_of(description)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{beside} is damaged: {error}; build the engine again") from error
    if path.stat().st_size != size:
        raise EngineError(f"{path} is truncated: it has {path.stat().st_size} bytes, not {size}; build it again")
    if _sha256(path) != digest:
        raise EngineError(f"{path} is not the engine that {beside.name} describes; build it again")
    if wanted is not None and runtime is not wanted:
        raise EngineError(
            f"{path} is an engine of {runtime.value}, not of {wanted.value}: use --backend {runtime.value}"
        )
    if model is not None and _sha256(model.path) != source_digest:
        raise EngineError(f"{path} was built from another file ({source}) than {model.path} is now: build it again")
    installed = str(bindings(runtime).__version__)
    if installed != version:
        raise EngineError(f"{path} was built by {runtime.value} {version}; {installed} is installed: build it again")
    here = _gpu_name()
    if gpu is not None and here is not None and gpu != here:
        raise EngineError(f"{path} was built for {gpu}; this machine has {here}: build it again")
    target = _gpu_target()
    if isinstance(targets, list) and target is not None and target not in targets:
        raise EngineError(
            f"{path} was built for {', '.join(targets)}; this machine has {target} ({here}): build it again"
        )
    return Engine(path, description, norms)
