"""Compare the files next to a language model with those that its checkpoint gives: tokenizer, configuration, manifest.

They are compared as data: the order of keys and the layout of a JSON file make no difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.manifest import MANIFEST_FILE, check_library, read_manifest
from ibnorm_export.artifacts.metadata import Target, Task
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE, MODEL_FILE
from ibnorm_export.artifacts.tokenizer import read_json
from ibnorm_export.errors import BackendUnavailable, ModelFileError
from ibnorm_export.exporter.companions import COMPANION_FILES, PREPROCESSOR, TRANSFORMERS_JS, WEB_FILES, WEB_FOLDER
from ibnorm_export.files import has_file, sha256_of
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.op.spec import OP_TYPES, SKIP_OP_TYPES
from ibnorm_export.parsing import repeated_keys
from ibnorm_export.verifier.report import Finding, StaticReport

__all__ = ["with_folder"]

#: Further files from which readers of a folder take templates, tokens, or how images become inputs.
_OTHERS: Final = (
    *("chat_template.json", "additional_chat_templates", "processor_config.json", PREPROCESSOR),
    *("vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)

#: Longest text of a value in a finding, in characters.
_SHOWN: Final = 80

#: Most differences of one file that are listed.
_LISTED: Final = 4

#: Sections of genai_config.json that users tune: how to sample, and how to run the model.
_TUNABLE: Final = ("search.", "model.decoder.session_options.")

#: Keys of those sections that are not a matter of taste.
_FIXED: Final = (
    "search.max_length",
    "search.past_present_share_buffer",
    "model.decoder.session_options.custom_ops_library",
)


def with_folder(report: StaticReport, exported: ExportedModel, *, model: LoadedModel) -> StaticReport:
    """The static verdict with that about the folder of a language model or for transformers.js, if the file is in one.

    Args:
        report: the verdict about the file itself.
        exported: the file.
        model: its checkpoint.
    """
    folder = exported.path.parent
    genai = exported.metadata.target is Target.ORT_GENAI
    web = exported.metadata.target is Target.TRANSFORMERS_JS
    if web:  # its models are in their own folder, and have other names
        folder = folder.parent
    if not web and (model.task is not Task.TEXT_GENERATION or exported.path.name != MODEL_FILE):
        return report
    if not genai and not any((folder / name).is_file() for name in COMPANION_FILES):
        note = "there is no configuration or tokenizer next to the file, so only the model was verified"
        return replace(report, notes=(*report.notes, note))
    own = (PREPROCESSOR,) if web else ()
    findings = list(_companion_problems(folder, model, names=(*COMPANION_FILES, *own), web=web))
    notes: list[str] = []
    if not genai and (folder / GENAI_CONFIG_FILE).exists():
        what = "in the folder, but the model is not for onnxruntime-genai"
        findings.append(Finding(GENAI_CONFIG_FILE, what, code=FindingCode.FILE_EXTRA))
    if genai:
        for name in (GENAI_CONFIG_FILE, MANIFEST_FILE):
            findings += _key_problems(folder / name) if (folder / name).is_file() else ()
        manifest = _read(folder, findings)
        differences = list(_genai_problems(folder, exported, model=model, manifest=manifest, notes=notes))
        findings += [f for f in differences if not _is_tuned(f)]
        compared = {*COMPANION_FILES, *([] if notes else [GENAI_CONFIG_FILE])}
        notes += [f"{f} (users may tune it)" for f in differences if _is_tuned(f)]
        findings += _manifest_problems(folder, manifest, compared=compared) if manifest else []
    return replace(report, findings=(*report.findings, *findings), notes=(*report.notes, *notes))


def _is_tuned(finding: Finding) -> bool:
    key = finding.where.partition(" ")[2]
    return key.startswith(_TUNABLE) and not key.startswith(_FIXED)


def _companion_problems(folder: Path, model: LoadedModel, *, names: Sequence[str], web: bool) -> Iterator[Finding]:
    """Files that an export copies from the checkpoint: each is there, and has the same content.

    Args:
        folder: the folder of the export.
        model: the checkpoint.
        names: files that an export copies.
        web: whether the folder is for transformers.js, where config.json has its own section.
    """
    source = Path(model.source)
    for name in names:
        file, original = folder / name, source / name
        if original.is_file() and not file.is_file():
            yield Finding(name, f"missing; the checkpoint has it: {original}", code=FindingCode.FILE_MISSING)
    for name in dict.fromkeys((*names, *_OTHERS)):
        file, original = folder / name, source / name
        if file.exists() and not original.exists():
            yield Finding(name, "in the folder, but the checkpoint has no such file", code=FindingCode.FILE_EXTRA)
        elif file.is_file() and original.is_file():
            yield from _content_problems(file, original, web=web and name == "config.json")


def _content_problems(file: Path, source: Path, *, web: bool) -> Iterator[Finding]:
    if not web and file.read_bytes() == source.read_bytes():
        return
    if file.suffix != ".json":
        yield Finding(file.name, "its content differs from the checkpoint's", code=FindingCode.FILE_DIFFERS)
        return
    try:
        actual, expected = _normalised(read_json(file)), _normalised(read_json(source))
    except ModelFileError as error:
        yield Finding(file.name, str(error), code=FindingCode.FILE_UNREADABLE)
        return
    yield from _key_problems(file)
    if web:  # where transformers.js finds the files, which is no matter of the checkpoint
        yield from _web_problems(file.parent, actual.pop(TRANSFORMERS_JS, {}))
        expected.pop(TRANSFORMERS_JS, None)
    yield from _listed(file.name, actual, expected=expected)


def _key_problems(file: Path) -> Iterator[Finding]:
    for key in _repeated(file)[:_LISTED]:
        what = f"gives the key {_shown(key)} twice, of which readers choose differently"
        yield Finding(file.name, what, code=FindingCode.FILE_DIFFERS)


def _repeated(file: Path) -> tuple[str, ...]:
    """Keys that an object of a JSON file gives more than once; none of a damaged file, which its readers report."""
    try:
        return repeated_keys(file.read_bytes())
    except (OSError, ValueError):
        return ()


def _web_problems(folder: Path, section: Any) -> Iterator[Finding]:
    """A section for transformers.js that names files which the folder does not have."""
    where = f"config.json {TRANSFORMERS_JS}"
    models = folder / WEB_FOLDER
    files = {file: dtype for dtype, file in WEB_FILES.items() if (models / file).is_file()}
    known = {"dtype", "use_external_data_format"}
    if not isinstance(section, dict) or not section.keys() <= known:
        what = f"is {_shown(section)}; an export gives only {' and '.join(sorted(known))}"
        yield Finding(where, what, code=FindingCode.FILE_DIFFERS)
        return
    unstated = None if {"fp32", "q8"} <= set(files.values()) else "fp32"  # its default outside of a browser
    if section.get("dtype", unstated) not in (None, *files.values()):
        what = f"is {_shown(section.get('dtype', _ABSENT))}; the folder has {', '.join(sorted(files.values()))}"
        yield Finding(f"{where}.dtype", what, code=FindingCode.FILE_DIFFERS)
    has = {name: len(list(models.glob(f"{name}_data*"))) for name in files}
    wanted = {name: count for name, count in has.items() if count}
    if section.get("use_external_data_format", {}) != wanted:
        what = f"is {_shown(section.get('use_external_data_format', {}))}; the folder has {_shown(wanted)}"
        yield Finding(f"{where}.use_external_data_format", what, code=FindingCode.FILE_DIFFERS)


def _listed(name: str, actual: Any, *, expected: Any) -> Iterator[Finding]:
    """The first differences of two JSON values as findings."""
    for number, (key, found, wanted) in enumerate(_differences(actual, expected, key="")):
        if number == _LISTED:
            yield Finding(name, "and more differences from the checkpoint's", code=FindingCode.FILE_DIFFERS)
            return
        yield Finding(f"{name} {key}", f"is {found}; the checkpoint gives {wanted}", code=FindingCode.FILE_DIFFERS)


def _normalised(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer in one form: older versions of the package write a merge "a b", newer ones ["a", "b"]."""
    model = content.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list) or not isinstance(model, dict):
        return content
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return {**content, "model": {**model, "merges": pairs}}


_ABSENT: Final = object()


def _differences(actual: Any, expected: Any, *, key: str) -> Iterator[tuple[str, str, str]]:
    """(key, value in the file, expected value) of every place where two JSON values differ."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        for name in {**expected, **actual}:
            inner = f"{key}.{name}" if key else name
            yield from _differences(actual.get(name, _ABSENT), expected.get(name, _ABSENT), key=inner)
    elif isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            yield from _differences(*pair, key=f"{key}[{index}]")
    elif not _same_type(actual, expected) or actual != expected:
        yield key, _shown(actual), _shown(expected)


def _same_type(actual: Any, expected: Any) -> bool:
    """Whether two JSON values have one type; tools that write a file again make 4 of 4.0."""
    return type(actual) is type(expected) or (type(actual) is int and type(expected) is float)


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _read(folder: Path, findings: list[Finding]) -> dict[str, Any]:
    """The manifest of the folder; empty if it is missing or damaged, which is a finding."""
    try:
        return read_manifest(folder)
    except ModelFileError as error:
        findings.append(Finding(MANIFEST_FILE, str(error), code=FindingCode.MANIFEST_WRONG))
        return {}


def _manifest_problems(folder: Path, manifest: Mapping[str, Any], *, compared: set[str]) -> Iterator[Finding]:
    """Files that were changed, lost or added since the export.

    Args:
        folder: the folder.
        manifest: its manifest.
        compared: files whose content is compared as data; the model itself is verified too.
    """
    if manifest.get("target") != Target.ORT_GENAI:
        where = f"{MANIFEST_FILE} target"
        what = f"is {_shown(manifest.get('target'))}; it must be {_shown(str(Target.ORT_GENAI))}"
        yield Finding(where, what, code=FindingCode.MANIFEST_WRONG)
    for name, entry in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield Finding(f"{MANIFEST_FILE} {_shown(name)}", "is outside the folder", code=FindingCode.MANIFEST_WRONG)
        elif name.startswith(MODEL_FILE):
            continue
        elif not has_file(folder, name):
            yield Finding(name, f"missing, but {MANIFEST_FILE} lists it", code=FindingCode.FILE_MISSING)
        elif name in manifest["libraries"]:
            yield from _library_problems(folder, name, manifest=manifest)
        elif name not in compared and sha256_of(folder / name) != entry["sha256"]:
            what = f"was changed after the export: its SHA-256 differs from the one in {MANIFEST_FILE}"
            yield Finding(name, what, code=FindingCode.FILE_CHANGED)
    for file in sorted(file for pattern in ("*.so", "*.dll", "*.dylib") for file in folder.glob(pattern)):
        if file.name not in manifest["files"]:
            yield Finding(
                file.name, f"is a native library that {MANIFEST_FILE} does not list", code=FindingCode.LIBRARY_UNLISTED
            )


def _library_problems(folder: Path, name: str, *, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        content = check_library(folder, name, manifest=manifest).read_bytes()
    except ModelFileError as error:
        yield Finding(name, str(error), code=FindingCode.LIBRARY_DIFFERENT)
        return
    # Its code is not run here: the names of the operators are in it as text.
    missing = [op_type for op_type in (*OP_TYPES, *SKIP_OP_TYPES) if op_type.encode() not in content]
    if missing:
        yield Finding(
            name,
            f"is not the library of fused kernels: it does not name {', '.join(missing)}",
            code=FindingCode.LIBRARY_DIFFERENT,
        )


def _genai_problems(
    folder: Path, exported: ExportedModel, *, model: LoadedModel, manifest: Mapping[str, Any], notes: list[str]
) -> Iterator[Finding]:
    """What differs from the configuration that an export writes; a note if it cannot be compared here."""
    library = next(iter(manifest["libraries"]), None) if manifest else None
    try:
        actual: dict[str, Any] = read_json(folder / GENAI_CONFIG_FILE)
        from ibnorm_export.exporter.genai_builder import expected_genai_config

        expected = expected_genai_config(model, dtype=exported.dtype, library=library)
    except BackendUnavailable as error:
        notes.append(f"{GENAI_CONFIG_FILE} was not compared: {error}")
        return
    except ModelFileError as error:
        yield Finding(GENAI_CONFIG_FILE, str(error), code=FindingCode.FILE_UNREADABLE)
        return
    yield from _listed(GENAI_CONFIG_FILE, actual, expected=expected)
