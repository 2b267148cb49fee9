"""Turn the checkpoint of a training code into a folder that `load` and every command take."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ibnorm_export.choices import choice
from ibnorm_export.errors import CheckpointError, IBNormError, shortened
from ibnorm_export.models.containers import read_checkpoint, read_config
from ibnorm_export.models.families.causal import CausalFamily
from ibnorm_export.models.importers import litgpt, nanogpt, same_names, torchvision
from ibnorm_export.models.importers.character_tokenizer import write_character_tokenizer
from ibnorm_export.models.importers.folder import MANIFEST, copy_tokenizer, import_folder, norm_sites, write_checkpoint
from ibnorm_export.models.importers.norm_reading import (
    ClassReading,
    NormReader,
    NormSite,
    ReadNorm,
    StatedReading,
    combine,
    import_norm_class,
    stated_norms,
)
from ibnorm_export.models.importers.source import Conversion, TrainingSource, strip_prefix
from ibnorm_export.models.loading import load
from ibnorm_export.models.registry import FAMILIES, find_family
from ibnorm_export.op.spec import Grouping, IBNormSpec, NormConfig, NormKind
from ibnorm_export.parsing import read_yaml
from ibnorm_export.text_report import Report, counted, text_table

__all__ = ["ImportKind", "ImportReport", "import_checkpoint"]


class ImportKind(enum.StrEnum):
    """Which training code wrote a checkpoint."""

    AUTO = "auto"
    NANOGPT = "nanogpt"
    GALORE = "galore"
    TIMM = "timm"
    TORCHVISION = "torchvision"
    LIGHTNING = "lightning"
    DCP = "dcp"
    LITGPT = "litgpt"


#: Kinds that are containers: what is in them is recognised by the names of the tensors.
_CONTAINERS: Final = (ImportKind.AUTO, ImportKind.LIGHTNING, ImportKind.DCP)

#: By kind, whether the names of tensors are its own.
_RECOGNISED: Final[dict[ImportKind, Callable[[object], bool]]] = {
    ImportKind.NANOGPT: nanogpt.recognise,
    ImportKind.LITGPT: litgpt.recognise,
    ImportKind.TORCHVISION: torchvision.recognise,
    ImportKind.GALORE: lambda state: isinstance(state, dict) and "model.embed_tokens.weight" in state,
}

_CONVERT: Final[dict[ImportKind, Callable[[TrainingSource], Conversion]]] = {
    ImportKind.NANOGPT: nanogpt.convert,
    ImportKind.LITGPT: litgpt.convert,
    ImportKind.TORCHVISION: torchvision.convert,
}

#: Files that a folder of a training run keeps its weights in, for those that no reader of folders knows.
_WEIGHT_FILES: Final = ("lit_model.pth", "ckpt.pt")

_EXAMPLE_NORM: Final = '\'{"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide"}\''


@dataclass(frozen=True, slots=True)
class ImportReport(Report):
    """What an import did.

    Args:
        path: the folder.
        kind: which training code's checkpoint it was.
        family: the architecture of the folder.
        norms: by module path, kind, reading and, where a class was identified, the relative error of the reading.
        mapped: by name of a tensor in the folder, where it comes from.
        notes: what the user should know, one sentence each.
        tokenizer: whether the folder has a tokenizer.
        causal: whether the model can generate text.
    """

    path: Path
    _: KW_ONLY
    kind: ImportKind
    family: str
    norms: tuple[tuple[str, str, float | None], ...]
    mapped: Mapping[str, str]
    notes: tuple[str, ...]
    tokenizer: bool
    causal: bool

    def __bool__(self) -> bool:
        return bool(self.norms)

    def __str__(self) -> str:
        title = f"{self.path}: {self.family} from a checkpoint of {self.kind}, {counted(len(self.mapped), 'tensor')}"
        readings: dict[str, list[tuple[str, float | None]]] = {}
        for path, reading, residual in self.norms:
            readings.setdefault(reading, []).append((path, residual))
        rows = []
        for reading, members in readings.items():
            residuals = [residual for _, residual in members if residual is not None]
            first, last = members[0][0], members[-1][0]
            where = first if len(members) == 1 else f"{first} ... {last}"
            rows.append((where, str(len(members)), reading, f"{max(residuals):.1e}" if residuals else "stated"))
        table = text_table(title, ("norms", "count", "reading", "residual"), rows=rows)
        return "\n".join([table, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "path": str(self.path),
            "kind": str(self.kind),
            "family": self.family,
            "norms": [{"path": path, "reading": text, "residual": error} for path, text, error in self.norms],
            "tensors": dict(self.mapped),
            "notes": list(self.notes),
            "tokenizer": self.tokenizer,
        }


def _weights_path(source: Path) -> Path:
    """The file or folder that has the weights of a source."""
    if source.is_dir():
        for name in _WEIGHT_FILES:
            if (source / name).is_file():
                return source / name
    return source


def _read_source(source: Path, *, weights: str | None, settings: Mapping[str, Any]) -> TrainingSource:
    """Read a checkpoint, and the configuration files next to it.

    Raises:
        CheckpointError: it does not exist, or cannot be read safely.
    """
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    found = read_checkpoint(_weights_path(source), weights=weights)
    folder = source if source.is_dir() else source.parent
    extras = dict(found.extras)
    yaml_file = folder / "model_config.yaml"
    if yaml_file.is_file() and litgpt.recognise(dict(found.state)):
        extras["model_config"] = _read_yaml(yaml_file)
    return TrainingSource(
        source, folder, state=dict(found.state), extras=extras, given=settings, notes=tuple(found.notes)
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid YAML: {shortened(str(error))}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains {type(content).__name__}; it must be a mapping")
    return content


def _recognise(source: TrainingSource, kind: ImportKind) -> tuple[ImportKind, TrainingSource]:
    """The training code of a checkpoint, and the checkpoint without a prefix that all its tensors have.

    Raises:
        CheckpointError: it is none that is known, or another than stated.
    """
    wanted = list(_RECOGNISED) if kind in _CONTAINERS else [kind] if kind in _RECOGNISED else []
    if kind is ImportKind.TIMM or (kind in _CONTAINERS and isinstance(source.extras.get("arch"), str)):
        return ImportKind.TIMM, source
    for candidate in wanted:
        stripped = strip_prefix(source.state, _RECOGNISED[candidate])
        if stripped is not None:
            state, note = stripped
            return candidate, replace(source, state=state, notes=(*source.notes, *([note] if note else [])))
    if (source.folder / "config.json").is_file() and kind in (*_CONTAINERS, ImportKind.GALORE):
        return ImportKind.GALORE, source
    raise CheckpointError(_unknown(source, kind))


def _unknown(source: TrainingSource, kind: ImportKind) -> str:
    names = ", ".join(sorted(source.state)[:3])
    others = [other for other, recognised in _RECOGNISED.items() if strip_prefix(source.state, recognised) is not None]
    if others:
        return f"{source.path} is a checkpoint of {others[0]}, not of {kind}: use --from {others[0]}"
    known = ", ".join(_RECOGNISED)
    return (
        f"{source.path} has tensors such as {names[:150]}, which are those of no known architecture ({known}, or timm "
        "with `arch`). Export it with your own code: ibnorm-export export CHECKPOINT --model package.module:factory"
    )


def _reader(
    source: TrainingSource,
    *,
    norm: NormConfig | IBNormSpec | Mapping[str, Any] | None,
    norm_class: type[nn.Module] | str | None,
    norm_args: Mapping[str, Any],
) -> tuple[NormReader, ClassReading | None]:
    """How the norms are read.

    Raises:
        CheckpointError: neither a class nor a statement says it.
    """
    where = str(source.path)
    if norm is None and norm_class is None:
        norm = _stated_in_checkpoint(source)
    if norm_class is None:
        if norm is None:
            raise CheckpointError(
                f"{source.path} does not state what its norms compute. Add the class that it was trained with, "
                f"--norm-class package.module:Class, or its parameters, --norm {_EXAMPLE_NORM}"
            )
        return stated_norms(norm, where=where), None
    if isinstance(norm_class, str):
        norm_class = import_norm_class(norm_class)
    by_class = ClassReading(norm_class, arguments=norm_args, settings=source.settings(), where=where)
    if norm is None:
        return by_class, by_class
    stated = _other_layers(norm, where=where)
    return (lambda site, kept: (stated if stated.covers(site.path) else by_class)(site, kept)), by_class


def _stated_in_checkpoint(source: TrainingSource) -> Mapping[str, Any] | None:
    """The `ibnorm` section of the checkpoint's own configuration."""
    section = source.settings().get("ibnorm")
    if section is None and (source.folder / "config.json").is_file():
        section = read_config(source.folder).get("ibnorm")
    return section if isinstance(section, Mapping) else None


def _other_layers(norm: object, *, where: str) -> StatedReading:
    """Rules for norms that are not of the given class.

    Raises:
        CheckpointError: it states more than rules.
    """
    if not isinstance(norm, Mapping) or set(norm) != {"layers"}:
        raise CheckpointError(
            'with --norm-class, --norm may only have "layers", for norms of another kind, for example '
            '\'{"layers": [{"match": "*.ln_f", "norm": "layernorm", "epsilon": 1e-5}]}\''
        )
    base = {"compression": "S", "lambda": 1.0, "epsilon": 1e-5, "convention": "divide"}
    return stated_norms({**base, **norm}, where=where)


def _write_tokenizer(source: TrainingSource, folder: Path, *, tokenizer: Path | None, vocabulary: int) -> str:
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

    Returns:
        What was mapped; `print(report)` shows it.

    Raises:
        CheckpointError: the checkpoint cannot be read, is of another kind, or does not fit the architecture.
        BackendUnavailable: timm is not installed.
    """
    kind = choice(ImportKind, kind, name="kind", error=CheckpointError)
    read = _read_source(Path(source), weights=weights, settings=settings or {})
    kind, read = _recognise(read, kind)
    reader, by_class = _reader(read, norm=norm, norm_class=norm_class, norm_args=norm_args or {})
    conversion, norms = _convert(read, kind, reader=reader)
    if by_class is not None:
        note = f"norms were built as {by_class.describe()}"
        conversion = replace(conversion, notes=(*conversion.notes, note))
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
        notes.append(_write_tokenizer(source, folder, tokenizer=tokenizer, vocabulary=vocabulary))
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


def _reading(norm: ReadNorm) -> str:
    if norm.kind is not NormKind.IBNORM:
        return f"{norm.kind} (epsilon {norm.spec.epsilon:g})"
    grouping = "" if norm.spec.grouping.value == "last" else f", {norm.spec.grouping.value}"
    return f"{norm.spec}{grouping}"


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
