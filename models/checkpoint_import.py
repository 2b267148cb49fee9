"""Turn the checkpoint of a training code into a folder that `load` and every command take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ibnorm_export.choices import choice
from ibnorm_export.errors import CheckpointError, IBNormError
from ibnorm_export.models.containers import read_config
from ibnorm_export.models.families.causal import CausalFamily
from ibnorm_export.models.importers import litgpt, nanogpt, same_names, torchvision
from ibnorm_export.models.importers.character_tokenizer import write_character_tokenizer
from ibnorm_export.models.importers.folder import MANIFEST, copy_tokenizer, import_folder, norm_sites, write_checkpoint
from ibnorm_export.models.importers.norm_choice import choose_reader
from ibnorm_export.models.importers.norm_reading import NormReader, NormSite, ReadNorm, combine
from ibnorm_export.models.importers.recognition import read_source, recognise
from ibnorm_export.models.importers.report import ImportKind, ImportReport
from ibnorm_export.models.importers.source import Conversion, TrainingSource, strip_prefix
from ibnorm_export.models.loading import load
from ibnorm_export.models.registry import FAMILIES, find_family
from ibnorm_export.op.spec import Grouping, IBNormSpec, NormConfig, NormKind
from ibnorm_export.progress import Progress, silent

__all__ = ["import_checkpoint"]

_CONVERT: Final[dict[ImportKind, Callable[[TrainingSource], Conversion]]] = {
    ImportKind.NANOGPT: nanogpt.convert,
    ImportKind.LITGPT: litgpt.convert,
    ImportKind.TORCHVISION: torchvision.convert,
}


def import_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    kind: ImportKind | str = ImportKind.AUTO,
    norm: NormConfig | IBNormSpec | Mapping[str, Any] | None = None,
    norm_class: type[nn.Module] | str | None = None,
    norm_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress = silent,
) -> ImportReport:
    """Turn the checkpoint of a training code into a folder that `load` and every command take.

    The folder appears whole or not at all. What the norms compute comes from their class or from a statement, never
    from a guess. The folder is loaded once before it is put in place.

    Args:
        source: a checkpoint file or folder of the training code.
        output: the folder to write; an earlier import in it is replaced.
        kind: which training code wrote it. For "auto", "lightning" and "dcp" the architecture is recognised.
        norm: what the norms compute, as an `ibnorm` section states it. Together with `norm_class` it may only have
            "layers", for norms of another kind.
        norm_class: the norm class that the model was trained with, or "package.module:Class". Each norm is built, given
            its weights and identified.
        norm_args: arguments of its constructor that the checkpoint does not state.
        weights: "raw" or "ema", for a checkpoint that has both.
        settings: settings of the model that the checkpoint does not state, by the training code's names.
        tokenizer: a tokenizer.json, its folder, or nanoGPT's meta.pkl.
        progress: receives the progress of the work.

    Returns:
        What was mapped; `print(report)` shows it.

    Raises:
        CheckpointError: the checkpoint cannot be read, is of another kind, or does not fit the architecture.
        BackendUnavailable: timm is not installed.
    """
    kind = choice(ImportKind, kind, name="kind", error=CheckpointError)
    progress("reading the checkpoint", 0, 3)
    read = read_source(Path(source), weights=weights, settings=settings or {})
    kind, read = recognise(read, kind)
    progress("reading the norms", 1, 3)
    reader, by_class = choose_reader(read, norm=norm, norm_class=norm_class, norm_args=norm_args or {})
    conversion, norms = _convert(read, kind, reader=reader)
    if by_class is not None:
        note = f"norms were built as {by_class.describe()}"
        conversion = replace(conversion, notes=(*conversion.notes, note))
    progress("writing and loading the folder", 2, 3)
    with import_folder(Path(output)) as folder:
        report = _write(
            read,
            folder,
            conversion=conversion,
            norms=norms,
            tokenizer=None if tokenizer is None else Path(tokenizer),
        )
        report = replace(report, path=Path(output), kind=kind)
        manifest = {"source": str(source), **report.to_dict()}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return report


def _convert(source: TrainingSource, kind: ImportKind, *, reader: NormReader) -> tuple[Conversion, dict[str, ReadNorm]]:
    """The tensors under the folder's names, and its norms, read.

    Raises:
        CheckpointError: they do not fit the architecture.
    """
    if kind in _CONVERT:
        conversion = _CONVERT[kind](source)
        conversion = replace(conversion, notes=(*source.notes, *conversion.notes))
        sites = norm_sites(conversion.config, source=source.path)
    else:
        notes: tuple[str, ...] = ()
        if kind is ImportKind.TIMM:
            config = same_names.timm_config(source)
        else:
            config, notes = same_names.transformers_config(source, _transformers_settings(source))
        sites = norm_sites(config, source=source.path)
        source = _with_names_of(source, sites)
        conversion = same_names.convert(source, config, sites=sites, kind=kind.value)
        conversion = replace(conversion, notes=(*source.notes, *notes, *conversion.notes))
    norms = {site.path: reader(site, conversion.norms[site.path]) for site in sites if site.path in conversion.norms}
    if kind is ImportKind.GALORE and conversion.config.get("model_type") not in FAMILIES:
        norms = {path: _without_offset(norm) for path, norm in norms.items()}
    if missing := [site.path for site in sites if site.path not in norms]:
        raise CheckpointError(f"{source.path}: the norm at {missing[0]} has no place in {kind}")
    return conversion, norms


def _without_offset(norm: ReadNorm) -> ReadNorm:
    """The same norm, with the statement that it multiplies by its weight alone, which some architectures require."""
    identified = norm.residual is not None and norm.spec.grouping is Grouping.LAST
    return replace(norm, spec=replace(norm.spec, offset=0.0)) if identified else norm


def _with_names_of(source: TrainingSource, sites: Sequence[NormSite]) -> TrainingSource:
    """The checkpoint without a prefix that hides the norms of the architecture."""
    first = f"{sites[0].path}." if sites else ""
    stripped = strip_prefix(source.state, lambda state: any(name.startswith(first) for name in state))
    if stripped is None:
        return source
    state, note = stripped
    return replace(source, state=state, notes=(*source.notes, *([note] if note else [])))


def _transformers_settings(source: TrainingSource) -> dict[str, Any]:
    """config.json next to the weights, or the settings in the checkpoint.

    Raises:
        CheckpointError: neither states an architecture.
    """
    if (source.folder / "config.json").is_file():
        return read_config(source.folder)
    settings = source.settings()
    if "model_type" not in settings:
        raise CheckpointError(
            f"{source.path} has no config.json next to it, which states the architecture; copy the one that the model "
            "was trained with to its folder"
        )
    return settings


def _write(
    source: TrainingSource,
    folder: Path,
    *,
    conversion: Conversion,
    norms: Mapping[str, ReadNorm],
    tokenizer: Path | None,
) -> ImportReport:
    """Write the checkpoint and its tokenizer into a folder, and load it.

    Raises:
        CheckpointError: the folder does not load, or the tokenizer does not fit.
    """
    tensors, origins, notes = _all_tensors(conversion, norms)
    config = conversion.config | {"ibnorm": combine(norms).to_config()}
    write_checkpoint(folder, config, tensors=tensors)
    vocabulary = _check_loads(folder, source.path)
    if vocabulary:
        notes.append(write_tokenizer(source, folder, tokenizer=tokenizer, vocabulary=vocabulary))
    return ImportReport(
        folder,
        kind=ImportKind.AUTO,
        family=str(config.get("model_type") or config.get("architecture")),
        norms=tuple((path, _reading(norm), norm.residual) for path, norm in norms.items()),
        mapped={name: origins.get(name, name) for name in tensors},
        notes=(*conversion.notes, *notes),
        tokenizer=(folder / "tokenizer.json").is_file(),
        causal=vocabulary > 0,
    )


def _all_tensors(
    conversion: Conversion, norms: Mapping[str, ReadNorm]
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """All tensors of the folder in one type, their origins, and notes.

    A scale that `identify` derived, such as 1 + weight, is float64; it is rounded to the type of the weights.
    """
    tensors, origins = dict(conversion.tensors), dict(conversion.origins)
    types = {t.dtype for t in tensors.values() if t.is_floating_point()}
    wide = next((t for t in (torch.float64, torch.float32) if t in types), None)
    common = wide or (next(iter(types)) if len(types) == 1 else torch.float32)
    notes = [f"weights of {_names(types)}: all are stored as {_names({common})}"] if len(types) > 1 else []
    for path, norm in norms.items():
        for name, tensor in norm.tensors.items():
            tensors[f"{path}.{name}"] = tensor
            kept = conversion.norms[path].get(name)
            if kept is None or kept.shape != tensor.shape or not torch.equal(kept.to(tensor.dtype), tensor):
                origins[f"{path}.{name}"] = (
                    f"derived from {', '.join(sorted(conversion.norms[path])) or 'no parameter'}"
                )
    stored = {name: t.to(common) if t.is_floating_point() else t for name, t in tensors.items()}
    return stored, origins, notes


def _names(types: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(t).removeprefix("torch.") for t in types))


def _reading(norm: ReadNorm) -> str:
    if norm.kind is not NormKind.IBNORM:
        return f"{norm.kind} (epsilon {norm.spec.epsilon:g})"
    grouping = "" if norm.spec.grouping.value == "last" else f", {norm.spec.grouping.value}"
    return f"{norm.spec}{grouping}"


def _check_loads(folder: Path, source: Path) -> int:
    """Load the folder; return the size of the vocabulary if the model can generate text, else 0.

    Raises:
        CheckpointError: it does not load: the tensors do not fit the architecture.
    """
    try:
        loaded = load(folder)
    except IBNormError as error:
        raise CheckpointError(str(error).replace(str(folder), str(source))) from error
    causal = isinstance(find_family(read_config(folder)), CausalFamily)
    config: Any = loaded.module.config if causal else None
    return int(config.vocab_size) if causal else 0


def write_tokenizer(source: TrainingSource, folder: Path, *, tokenizer: Path | None, vocabulary: int) -> str:
    """Write the tokenizer into the folder; return a note, "" if there is nothing to say.

    Raises:
        CheckpointError: the given path has no tokenizer, or one with more tokens than the model.
    """
    if tokenizer is not None and tokenizer.suffix == ".pkl":
        tokens = write_character_tokenizer(tokenizer, folder)
        if tokens > vocabulary:
            raise CheckpointError(f"{tokenizer} has {tokens} tokens, but the model has {vocabulary}")
        return f"tokenizer: {tokens} characters of {tokenizer}"
    place = source.folder if tokenizer is None else tokenizer
    if tokenizer is not None and not place.exists():
        raise CheckpointError(f"--tokenizer {tokenizer} does not exist")
    copied = copy_tokenizer(place, folder)
    if "tokenizer.json" in copied:
        return f"tokenizer: {', '.join(copied)} of {place}"
    if tokenizer is not None:
        raise CheckpointError(
            f"--tokenizer {tokenizer} has no tokenizer.json; give that file, its folder, or a meta.pkl"
        )
    return (
        "no tokenizer, which `generate` needs: import again with --tokenizer PATH, a tokenizer.json, its "
        "folder, or nanoGPT's meta.pkl"
    )
