"""Write a Triton model repository: everything that a server needs to run an exported model.

    REPO/manifest.json  README.md  [inferenceservice.yaml]
    REPO/NAME/config.pbtxt  [libibnorm_ort.so]  1/model.onnx (and its data)  warmup/N.bin
    REPO/NAME-portable/...    the same without the library, if both variants were requested

Triton treats only folders as models, so it ignores the files at the top, and the library in the model's folder.
"""

from __future__ import annotations

import importlib.resources
import re
import shutil
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Final

import jinja2

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.manifest import MANIFEST_FILE, edited_files, read_manifest, write_manifest
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.artifacts.runtime_versions import ONNX_RUNTIME, required_versions
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.environment import version_of
from ibnorm_export.errors import BackendUnavailable, EngineError, ExportError, ModelFileError
from ibnorm_export.files import machine_of, new_folder, sha256_of
from ibnorm_export.op import native
from ibnorm_export.runtimes.tensorrt.description import EngineDescription, check_plan, read_description
from ibnorm_export.runtimes.tensorrt.options import NormRoute, Runtime
from ibnorm_export.serving.triton.config import ModelConfig, TritonLimits, batch_axis, config_text
from ibnorm_export.serving.triton.containers import CONTAINERS, Container, container_for
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions, RepositoryFormat, TritonBackend
from ibnorm_export.serving.triton.warmup import warmup_file, warmup_inputs

__all__ = ["Package", "package"]

#: The container for what runs in every one of them, and for a plan, which must have the TensorRT that built it.
_USUAL: Final = next(container for container in CONTAINERS if container.name == "25.10")
_PLAN_FILE: Final = "model.plan"


@dataclass(frozen=True, slots=True)
class Package:
    """A repository on disk.

    Args:
        path: path of the repository.
        models: names of its models.
        start: command that starts a server on it in a container.
        manifest: content of manifest.json.
    """

    path: Path
    models: tuple[str, ...]
    start: str
    manifest: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return what `package --json` prints."""
        return {"path": str(self.path), "models": self.manifest["models"], "start": self.start}

    def __str__(self) -> str:
        return "\n".join(f"{self.path / name}: {norms}" for name, norms in self.manifest["models"].items())


@dataclass(frozen=True, slots=True)
class _Contents:
    """What goes into a repository.

    Args:
        model: the exported file.
        name: name of the model.
        options: see `PackageOptions`.
        plan: description of the TensorRT plan; None for ONNX Runtime.
        library: native library of the first variant; None if its norms need none.
        limits: limits that fit the model and the plan.
        warmup: inputs for the warm-up, by name.
    """

    model: ExportedModel
    name: str
    _: KW_ONLY
    options: PackageOptions
    plan: EngineDescription | None
    library: Path | None
    limits: TritonLimits
    warmup: Arrays

    @property
    def variants(self) -> dict[str, Path | None]:
        """The library of each model, by the model's name."""
        variants = {self.name: self.library}
        if self.options.variant is PackagedNorms.BOTH:
            variants[f"{self.name}-portable"] = None
        return variants

    @property
    def norms(self) -> dict[str, str]:
        """How the norms of each model run, by the model's name."""
        if self.plan is not None:
            return dict.fromkeys(self.variants, "TensorRT plan")
        return {name: "portable" if library is None else "fused" for name, library in self.variants.items()}


def package(
    exported: ExportedModel | str | Path, repository: str | Path, *, options: PackageOptions | None = None
) -> Package:
    """Write a model repository for Triton, whole or not at all. An older repository in the same place is replaced.

    Args:
        exported: an exported file, or its path. A folder for onnxruntime-genai becomes a model of one step, which
            takes and returns its cache as tensors.
        repository: the folder to write.
        options: see `PackageOptions`; None means the defaults.

    Returns:
        The repository.

    Raises:
        ExportError: Triton cannot serve the model with these options, or the folder holds other files.
        ModelFileError: the model cannot be read, or there are no inputs for its warm-up.
        BackendUnavailable: fused kernels are required but not installed.
    """
    options = PackageOptions() if options is None else options
    model = exported if isinstance(exported, ExportedModel) else ExportedModel(exported)
    repository = Path(repository)
    contents = _collect(model, options)
    start = _start_command(contents)
    manifest = _manifest(contents)
    with new_folder(repository, _packaged_files) as new:
        for variant, library in contents.variants.items():
            _write_model(new / variant, contents, library=library)
        _write_documents(new, contents, start=start)
        libraries = {f"{variant}/{file.name}": file for variant, file in contents.variants.items() if file}
        write_manifest(new, libraries, content=manifest)
    return Package(repository, tuple(contents.variants), start, manifest)


def _collect(model: ExportedModel, options: PackageOptions) -> _Contents:
    """Check the model against the options, before anything is written."""
    _check_types(model, options.backend)
    plan = None if options.plan is None else _read_plan(options.plan, model)
    library = _library(model, options, plan=plan)
    limits = _limits(model, options.limits, plan=plan)
    return _Contents(
        model,
        options.name or _default_name(model),
        options=options,
        plan=plan,
        library=library,
        limits=limits,
        warmup=warmup_inputs(model, options.warmup, batched=limits.max_batch > 0),
    )


def _packaged_files(repository: Path) -> set[str]:
    """Return the files that `package` wrote into a folder, or raise an error if it did not write that folder."""
    if not (repository / MANIFEST_FILE).is_file():
        raise ExportError(f"{repository} is not empty and has no {MANIFEST_FILE}; choose another folder")
    try:
        manifest = read_manifest(repository)
        if edited := edited_files(repository, manifest):
            raise ExportError(
                f"{repository / edited[0]} was edited after packaging, and the edits would be lost; move it away, or "
                "choose another folder"
            )
        return {MANIFEST_FILE, *manifest["files"]}
    except ModelFileError as error:
        raise ExportError(f"{repository} was not written by `package`: {error}; choose another folder") from error


def _default_name(model: ExportedModel) -> str:
    """Name a model after its file, or after the folder if the file is called model.onnx."""
    path = model.path.absolute()  # not where a link leads: a blob of a cache has a hash for a name
    stem = path.parent.name if path.name == MODEL_FILE else path.stem
    name = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:100]
    return f"model-{name}".rstrip("-") if not name or name.isdigit() else name


def _check_types(model: ExportedModel, backend: TritonBackend) -> None:
    bf16 = [tensor.name for tensor in (*model.inputs, *model.outputs) if tensor.dtype == "bf16"]
    if bf16 and backend is TritonBackend.ONNXRUNTIME:
        raise ExportError(
            f"{model.path}: {', '.join(bf16[:3])} {'is' if len(bf16) == 1 else 'are'} bf16, which Triton's ONNX "
            "Runtime backend rejects as an input or output; export with --dtype fp16 or fp32, or build a plan and use "
            "--backend tensorrt"
        )


def _read_plan(plan: Path, model: ExportedModel) -> EngineDescription:
    """Read the description of a plan, which must be for TensorRT and built from `model`."""
    try:
        description = read_description(plan)
        if description.runtime is not Runtime.TENSORRT:
            raise ExportError(
                f"{plan} is for {description.runtime}, which Triton does not run; build it with --runtime tensorrt"
            )
        check_plan(plan, description, source=model.path)
    except EngineError as error:
        raise ExportError(str(error)) from error
    return description


def _limits(model: ExportedModel, limits: TritonLimits, *, plan: EngineDescription | None) -> TritonLimits:
    """Reduce the batch to what the model and the plan accept."""
    axis = batch_axis(model)
    if axis is None:
        return replace(limits, max_batch=0)
    if plan is None:
        return limits
    sizes = [item.largest for profile in plan.profiles for item in profile.ranges if item.axis == axis]
    return replace(limits, max_batch=min(limits.max_batch, min(sizes, default=1)))


def _library(model: ExportedModel, options: PackageOptions, *, plan: EngineDescription | None) -> Path | None:
    """Choose the native library that goes into the repository."""
    if plan is not None:
        return native.trt_library() if plan.norm is NormRoute.PLUGIN else None
    if options.variant is PackagedNorms.PORTABLE:
        return None
    found = native.availability()
    problem: ExportError | BackendUnavailable | None = None
    if not model.norms:
        problem = ExportError(f"{model.path} has no IBNorm node for a fused kernel; package it with --variant portable")
    elif not found or found.path is None:
        problem = BackendUnavailable(f"{found}; or package with --variant portable")
    elif options.gpu and "cuda" not in found.providers:
        problem = BackendUnavailable(
            f"{found.path} has no CUDA kernels, so on a GPU every norm would be copied to the CPU and back; build it "
            "with CUDA, or package with --variant portable"
        )
    if problem is not None:
        if options.variant is PackagedNorms.AUTO:
            return None
        raise problem
    if machine_of(Path(str(found.path))) is None:
        raise BackendUnavailable(f"{found.path} is not for Linux, where Triton runs; package with --variant portable")
    return found.path


def _config(contents: _Contents, variant: str, *, library: Path | None) -> ModelConfig:
    options, limits, with_plan = contents.options, contents.limits, contents.plan is not None
    return ModelConfig(
        variant,
        options.backend.value,
        file=_PLAN_FILE if with_plan else MODEL_FILE,
        inputs=contents.model.inputs,
        outputs=contents.model.outputs,
        limits=limits,
        gpu=options.gpu or with_plan,
        library=None if library is None or with_plan else f"{options.root}/{variant}/{library.name}",
        warmup={
            name: (array.shape[limits.max_batch > 0 :], warmup_file(index))
            for index, (name, array) in enumerate(contents.warmup.items())
        },
    )


def _write_model(folder: Path, contents: _Contents, *, library: Path | None) -> None:
    version, model = folder / "1", contents.model
    version.mkdir(parents=True)
    if contents.options.plan is not None:
        shutil.copyfile(contents.options.plan, version / _PLAN_FILE)
    else:
        shutil.copyfile(model.path, version / MODEL_FILE)
        for file in model.external_files:
            target = version / file.relative_to(model.path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    if library is not None:
        shutil.copyfile(library, folder / library.name)
    (folder / "warmup").mkdir()
    for index, array in enumerate(contents.warmup.values()):
        (folder / "warmup" / warmup_file(index)).write_bytes(array.tobytes())
    config = _config(contents, folder.name, library=library)
    (folder / "config.pbtxt").write_text(config_text(config), encoding="utf-8")


def _manifest(contents: _Contents) -> dict[str, Any]:
    model = contents.model
    metadata = model.metadata.to_dict()
    return {
        "written_by": f"ibnorm-export {version_of('ibnorm-export')}",
        "source_sha256": sha256_of(model.path),
        "metadata": {key: metadata.get(key) for key in ("family", "task", "dtype", "opset")},
        "mount": contents.options.root,
        "models": contents.norms,
    }


def _container(contents: _Contents) -> Container:
    """The usual container, or a newer one where the model needs it; the newest if no known one runs the model."""
    if contents.plan is not None:
        return _USUAL
    oldest = container_for(contents.model) or CONTAINERS[-1]
    return max(oldest, _USUAL, key=CONTAINERS.index)


def _start_command(contents: _Contents) -> str:
    options, library = contents.options, contents.library
    lines = [
        f"docker run --rm {'--gpus=all ' if options.gpu or options.plan else ''}-p 127.0.0.1:8000-8002:8000-8002",
        f'-v "$PWD:{options.root}:ro" {_container(contents).image}',
        f"tritonserver --model-repository={options.root}",
    ]
    if contents.plan is not None and library is not None:
        lines[-1] += f" --backend-config=tensorrt,plugins={options.root}/{contents.name}/{library.name}"
    return " \\\n  ".join(lines)


def _write_documents(folder: Path, contents: _Contents, *, start: str) -> None:
    values: dict[str, Any] = {
        "options": contents.options,
        "model": contents.model,
        "oldest": required_versions(contents.model)[ONNX_RUNTIME],
        "start": start,
        "container": _container(contents),
        "first_container": container_for(contents.model),
        "limits": contents.limits,
        "name": contents.name,
        "models": contents.norms,
        "service": re.sub(r"[^a-z0-9-]", "-", contents.name.lower())[:63].strip("-"),
    }
    _render(folder / "README.md", "triton_readme.md.jinja", values=values)
    if contents.options.format is RepositoryFormat.KSERVE:
        _render(folder / "inferenceservice.yaml", "inferenceservice.yaml.jinja", values=values)


def _render(file: Path, template: str, *, values: Mapping[str, Any]) -> None:
    templates = importlib.resources.files("ibnorm_export.serving.triton").joinpath("templates")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
    text = templates.joinpath(template).read_text(encoding="utf-8")
    file.write_text(environment.from_string(text).render(values), encoding="utf-8")
