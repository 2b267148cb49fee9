"""ExportedModel -> a Triton model repository: what a server needs to run the model, and nothing to write by hand.

    REPO/manifest.json  README.md  [inferenceservice.yaml]
    REPO/NAME/config.pbtxt  [libibnorm_ort.so]  1/model.onnx (and its data)  warmup/N.bin
    REPO/NAME-portable/...    the same without the library, where both variants were asked for

Only folders are models to Triton, so the files at the top and the library in the model's folder are left alone.
"""

from __future__ import annotations

import enum
import importlib.resources
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import onnx.helper

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.manifest import MANIFEST_FILE, edited_files, read_manifest, write_manifest
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.environment import version_of
from ibnorm_export.errors import BackendUnavailable, ExportError, ModelFileError
from ibnorm_export.files import machine_of, new_folder, sha256_of
from ibnorm_export.op import native
from ibnorm_export.serving.triton.config import Limits, ModelConfig, batch_axis, config_text

__all__ = ["Format", "Package", "PackageOptions", "TritonBackend", "Variant", "package"]

#: Where the container of each format finds the repository. Source: NVIDIA's and KServe's documentation.
MOUNTS: Final = {"triton": "/models", "kserve": "/mnt/models"}
IMAGE: Final = "nvcr.io/nvidia/tritonserver:25.10-py3"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PLAN_FILE: Final = "model.plan"

#: Sizes of dynamic axes to warm up with, where no inputs are given; the names are those of the exporters.
_WARMUP_SIZES: Final = {
    "batch": 1,
    "sequence": 8,
    "past": 4,
    "total": 12,
    "batch_size": 1,
    "sequence_length": 8,
    "past_sequence_length": 4,
    "total_sequence_length": 12,
    "capacity": 12,
}


class Format(enum.StrEnum):
    """Who reads the repository."""

    TRITON = "triton"
    KSERVE = "kserve"


class Variant(enum.StrEnum):
    """How the norms run on the server."""

    AUTO = "auto"  # fused where the library is installed here, else portable
    FUSED = "fused"
    PORTABLE = "portable"
    BOTH = "both"


class TritonBackend(enum.StrEnum):
    """What runs the model inside Triton."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


@dataclass(frozen=True, slots=True)
class PackageOptions:
    """How to package.

    Args:
        format: KSERVE adds an InferenceService.
        name: of the model; None takes the file's.
        backend: TENSORRT needs `plan`.
        variant: fused, portable or both; of TensorRT the plan decides.
        plan: written by `build-engine --runtime tensorrt` from the same model.
        mount: absolute path of the repository on the server; None is the format's default.
        storage_uri: where KServe fetches the repository from.
        gpu: run on GPUs.
        limits: batching, queue, instances.
        warmup: real inputs by name, or None to draw them.

    Raises:
        ExportError: a value is outside its range.
    """

    format: Format = Format.TRITON
    name: str | None = None
    _: KW_ONLY
    backend: TritonBackend = TritonBackend.ONNXRUNTIME
    variant: Variant = Variant.AUTO
    plan: Path | None = None
    mount: str | None = None
    storage_uri: str = ""
    gpu: bool = False
    limits: Limits = field(default_factory=Limits)
    warmup: Arrays | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not _NAME.fullmatch(self.name) or self.name.isdigit()):
            raise ExportError(
                f"name is {self.name!r}; it must be letters, digits, dots, - and _, begin with a letter or digit, and "
                "not be a number alone"
            )
        if not re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+", self.root):
            raise ExportError(f"mount is {self.root!r}; it must be an absolute path on the server, as in /models")
        if (self.backend is TritonBackend.TENSORRT) != (self.plan is not None):
            raise ExportError(
                "--backend tensorrt and --plan MODEL.plan belong together; `build-engine` writes the plan"
            )
        if self.plan is not None and self.variant is not Variant.AUTO:
            raise ExportError(
                "--variant is for ONNX Runtime; how the norms run in a plan was decided by `build-engine`"
            )
        if any(character in self.storage_uri for character in "\"'\\\n"):
            raise ExportError(f"storage URI is {self.storage_uri!r}; it must have no quotes")

    @property
    def root(self) -> str:
        """Where the repository lies on the server."""
        return MOUNTS[self.format.value] if self.mount is None else self.mount.rstrip("/")


@dataclass(frozen=True, slots=True)
class Package:
    """A repository on disk.

    Args:
        path: of the repository.
        models: names of its models.
        start: command that starts a server on it in a container.
        manifest: what was written as manifest.json.
    """

    path: Path
    models: tuple[str, ...]
    start: str
    manifest: Mapping[str, Any]


def package(model: ExportedModel, repository: str | Path, *, options: PackageOptions | None = None) -> Package:
    """Write a model repository for Triton. It appears whole or not at all; an older one in its place is replaced.

    Args:
        model: an exported file, or the one in a folder for onnxruntime-genai (one step, its cache in tensors).
        repository: the folder to write.
        options: see `PackageOptions`.

    Raises:
        ExportError: Triton cannot serve the model so, an option does not fit it, or the folder holds something else.
        ModelFileError: no warm-up inputs can be drawn for it.
        BackendUnavailable: fused kernels are demanded and not installed.
    """
    options = PackageOptions() if options is None else options
    repository = Path(repository)
    name = options.name or _default_name(model)
    _check_types(model, options.backend)
    plan = None if options.plan is None else _read_plan(options.plan, model)
    fused = _library(model, options, plan=plan)
    limits = options.limits if batch_axis(model) else replace(options.limits, max_batch=0)
    if plan is not None and limits.max_batch:
        largest = {item["axis"]: int(item["largest"]) for item in plan["profile"]}
        limits = replace(limits, max_batch=min(limits.max_batch, largest.get(batch_axis(model) or "", 1)))
    warmup = _warmup(model, options.warmup, batched=limits.max_batch > 0)
    variants: dict[str, Path | None] = {name: fused}
    if options.variant is Variant.BOTH:
        variants[f"{name}-portable"] = None
    start = _start_command(options, None if plan is None or fused is None else f"{options.root}/{name}/{fused.name}")
    with new_folder(repository, _earlier) as beside:
        for variant, library in variants.items():
            config = ModelConfig(
                variant,
                options.backend.value,
                file=MODEL_FILE if plan is None else _PLAN_FILE,
                inputs=model.inputs,
                outputs=model.outputs,
                limits=limits,
                gpu=options.gpu or plan is not None,
                library=None if library is None or plan is not None else f"{options.root}/{variant}/{library.name}",
                warmup={
                    key: (array.shape[limits.max_batch > 0 :], _warmup_file(index))
                    for index, (key, array) in enumerate(warmup.items())
                },
            )
            _write_model(beside / variant, model, plan=options.plan, library=library, config=config, warmup=warmup)
        recorded = model.metadata.to_dict()
        manifest = {
            "written_by": f"ibnorm-export {version_of('ibnorm-export')}",
            "source_sha256": sha256_of(model.path),
            "metadata": {key: recorded.get(key) for key in ("family", "task", "dtype", "opset")},
            "mount": options.root,
            "models": {
                variant: "TensorRT plan" if plan is not None else "portable" if library is None else "fused"
                for variant, library in variants.items()
            },
        }
        says = {"options": options, "model": model, "start": start, "image": IMAGE, "limits": limits, "name": name}
        _render(beside / "README.md", "triton_readme.md.jinja", values={**says, "models": manifest["models"]})
        if options.format is Format.KSERVE:
            service = re.sub(r"[^a-z0-9-]", "-", name.lower())[:63].strip("-")
            _render(
                beside / "inferenceservice.yaml", "inferenceservice.yaml.jinja", values={**says, "service": service}
            )
        libraries = {f"{variant}/{library.name}": library for variant, library in variants.items() if library}
        write_manifest(beside, libraries, content=manifest)
    return Package(repository, tuple(variants), start, manifest)


def _earlier(repository: Path) -> set[str]:
    """The files that were packaged into a folder."""
    if not (repository / MANIFEST_FILE).is_file():
        raise ExportError(f"{repository} is not empty and holds no {MANIFEST_FILE}; choose another folder")
    try:
        manifest = read_manifest(repository)
        if edited := edited_files(repository, manifest):
            raise ExportError(
                f"{repository / edited[0]} was edited after packaging, which would be lost; move it away, or choose "
                "another folder"
            )
        return {MANIFEST_FILE, *manifest["files"]}
    except ModelFileError as error:
        raise ExportError(f"{repository} is no repository that was packaged: {error}; choose another folder") from error


def _default_name(model: ExportedModel) -> str:
    """Of the file, or of the folder where the file is called model.onnx."""
    path = model.path.resolve()
    stem = path.parent.name if path.name == MODEL_FILE else path.stem
    name = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:100]
    return f"model-{name}".rstrip("-") if not name or name.isdigit() else name


def _check_types(model: ExportedModel, backend: TritonBackend) -> None:
    halves = [tensor.name for tensor in (*model.inputs, *model.outputs) if tensor.dtype == "bf16"]
    if halves and backend is TritonBackend.ONNXRUNTIME:
        raise ExportError(
            f"{model.path}: {', '.join(halves[:3])} {'is' if len(halves) == 1 else 'are'} bf16, which Triton's ONNX "
            "Runtime backend rejects at its inputs and outputs; export with --dtype fp16 or fp32, or build a plan and "
            "use --backend tensorrt"
        )


def _read_plan(plan: Path, model: ExportedModel) -> dict[str, Any]:
    """The description beside a plan, which must be of full TensorRT and of `model`."""
    beside = plan.with_name(plan.name + ".json")
    try:
        found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        runtime, source, digest = found["runtime"], found["source_sha256"], found["sha256"]
        actual = sha256_of(plan)
    except OSError as error:
        raise ExportError(
            f"{error.filename} cannot be read; write the plan with `ibnorm-export build-engine`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{beside} is damaged: {error!r}; build the engine again") from error
    if runtime != "tensorrt":
        raise ExportError(f"{plan} is for {runtime}, which Triton does not run; build it with --runtime tensorrt")
    if actual != digest:
        raise ExportError(f"{plan} is not the engine that {beside.name} describes; build it again")
    if source != sha256_of(model.path):
        raise ExportError(f"{plan} was built from another model than {model.path}; build it again")
    return found


def _library(model: ExportedModel, options: PackageOptions, *, plan: Mapping[str, Any] | None) -> Path | None:
    """The native library that goes into the repository."""
    if plan is not None:
        return native.trt_library() if plan.get("norm") == "plugin" else None
    if options.variant is Variant.PORTABLE:
        return None
    if not model.norms:
        if options.variant is Variant.AUTO:
            return None
        raise ExportError(f"{model.path} has no IBNorm node for a fused kernel; package it with --variant portable")
    found = native.availability()
    if not found or found.path is None:
        if options.variant is Variant.AUTO:
            return None
        raise BackendUnavailable(f"{found}; or package with --variant portable")
    if options.gpu and "cuda" not in found.providers:
        if options.variant is Variant.AUTO:
            return None
        raise BackendUnavailable(
            f"{found.path} has no CUDA kernels: on a GPU every norm would be copied to the CPU and back; "
            "build it with CUDA, or package with --variant portable"
        )
    if machine_of(found.path) is None:
        raise BackendUnavailable(f"{found.path} is not for Linux, where Triton runs; package with --variant portable")
    return found.path


def _warmup(model: ExportedModel, given: Arrays | None, *, batched: bool) -> Arrays:
    """Inputs in the model's own types; one row of them where rows are batched."""
    arrays = draw_inputs(model, _WARMUP_SIZES) if given is None else given
    types = {"bf16": "BFLOAT16", "fp16": "FLOAT16", "fp32": "FLOAT"}
    made = {}
    for tensor in model.inputs:
        array = arrays[tensor.name][:1] if batched else arrays[tensor.name]
        if tensor.dtype in types:
            wanted = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, types[tensor.dtype]))
            array = array.astype(wanted)
        made[tensor.name] = np.ascontiguousarray(array)
    return made


def _warmup_file(index: int) -> str:
    """By number: an input's name may hold what a file's may not."""
    return f"{index}.bin"


def _write_model(
    folder: Path, model: ExportedModel, *, plan: Path | None, library: Path | None, config: ModelConfig, warmup: Arrays
) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    if plan is not None:
        shutil.copyfile(plan, version / _PLAN_FILE)
    else:
        shutil.copyfile(model.path, version / MODEL_FILE)
        for file in model.external_files:
            target = version / file.relative_to(model.path.resolve().parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    if library is not None:
        shutil.copyfile(library, folder / library.name)
    (folder / "warmup").mkdir()
    for index, array in enumerate(warmup.values()):
        (folder / "warmup" / _warmup_file(index)).write_bytes(array.tobytes())
    (folder / "config.pbtxt").write_text(config_text(config), encoding="utf-8")


def _start_command(options: PackageOptions, plugin: str | None) -> str:
    lines = [
        f"docker run --rm {'--gpus=all ' if options.gpu or options.plan else ''}-p 127.0.0.1:8000-8002:8000-8002",
        f'-v "$PWD:{options.root}:ro" {IMAGE}',
        f"tritonserver --model-repository={options.root}",
    ]
    if plugin is not None:
        lines[-1] += f" --backend-config=tensorrt,plugins={plugin}"
    return " \\\n  ".join(lines)


def _render(file: Path, template: str, *, values: Mapping[str, Any]) -> None:
    text = (
        importlib.resources.files("ibnorm_export.serving.triton")
        .joinpath("templates", template)
        .read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
    file.write_text(environment.from_string(text).render(values), encoding="utf-8")
