"""The table of faults, and how one is planted and judged."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import positions
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import IBNormError
from ibnorm_export.progress import silent
from ibnorm_export.verifier.checkpoint.samples import fixed_sizes
from ibnorm_export.verifier.preparation import prepare
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import VerifyOptions, check_stated, verify
from tests.verifier.faults import (
    kinds_blind,
    kinds_counts,
    kinds_files,
    kinds_format,
    kinds_forms,
    kinds_functions,
    kinds_half,
    kinds_interface,
    kinds_norms,
    kinds_rare,
    kinds_sizes,
    kinds_text,
    kinds_values,
    kinds_weights,
)
from tests.verifier.faults.edit import Edit
from tests.verifier.faults.forms import Form, form
from tests.verifier.faults.kind import Kind

__all__ = ["KINDS", "Outcome", "cases", "judge", "plant"]

_MODULES: Final = (
    *(kinds_weights, kinds_norms, kinds_text, kinds_values, kinds_half, kinds_functions, kinds_format, kinds_files),
    *(kinds_sizes, kinds_interface, kinds_counts, kinds_rare, kinds_forms, kinds_blind),
)

KINDS: Final = tuple(kind for module in _MODULES for kind in module.KINDS)

#: Token ids of every language model among the forms.
_VOCABULARY: Final = 256


def cases() -> Iterator[tuple[Kind, str]]:
    """Every kind with every form that it is planted in; first each kind once, so that a part shows most."""
    for position in range(max(len(kind.forms) for kind in KINDS)):
        for kind in KINDS:
            if position < len(kind.forms):
                yield kind, kind.forms[position]


@dataclass(frozen=True)
class Outcome:
    """What verification reports about one fault.

    Args:
        found: what found it: "static", "folder", "numeric", "load"; empty if it passes.
        message: the first finding.
        change: where it passes, the largest relative error on further legal inputs, over its tolerance.
        seconds: how long verification took.
    """

    found: tuple[str, ...]
    message: str
    change: float | None = None


def plant(kind: Kind, right: Form, folder: Path) -> ExportedModel:
    """Write a copy of a right file, or of its folder, with a fault in it."""
    place = folder / "planted"
    shutil.copytree(right.folder, place)
    file = place / right.file.relative_to(right.folder)
    before = {f: f.read_bytes() for f in place.rglob("*") if f.is_file()}
    proto = onnx.load(file, load_external_data=False)
    external = any(t.external_data for t in proto.graph.initializer)
    edited = kind.group.startswith("folder")
    if external and not edited:
        proto = onnx.load(file)
        file.with_name(f"{file.name}.data").unlink()
    start = proto.SerializeToString()
    kind.plant(Edit(proto, right.family, folder=place))
    if proto.SerializeToString() != start:
        onnx.save(proto, file)
    assert {f: f.read_bytes() for f in place.rglob("*") if f.is_file()} != before, f"{kind.name}: nothing was planted"
    return ExportedModel(file)


def judge(kind: Kind, name: str, forms: Path, *, first: bool = False) -> Outcome:
    """Plant a fault and verify the file.

    Args:
        kind: the fault.
        name: the form that it is planted in.
        forms: where right files are kept.
        first: whether to run the file only if reading it finds nothing, and to measure the change of an output only in
            the first form of each kind.
    """
    right = form(name, forms)
    with tempfile.TemporaryDirectory() as place:
        try:
            planted = plant(kind, right, Path(place))
            if first and (read := _read(planted, right)).findings:
                return Outcome(_found(read), str(read.findings[0])[:300])
            report = verify(planted, right.model, options=VerifyOptions(samples=2, static=not first))
        except IBNormError as error:
            return Outcome(("load",), f"{type(error).__name__}: {error}"[:300])
        if not report:
            return Outcome(_found(report), str(next(iter(report.findings), "nothing was compared"))[:300])
        measured = not first or name == kind.forms[0]
        return Outcome((), "; ".join(report.notes)[:300], _change(planted, right) if measured else None)


def _read(planted: ExportedModel, right: Form) -> ParityReport:
    """The verdict without its numeric part."""
    comparison = prepare(
        planted, right.model, options=VerifyOptions(samples=1), inputs=None, text=None, progress=silent
    )
    return ParityReport(str(planted.path), right.model.source, static=check_stated(comparison), numeric=None)


def _found(report: ParityReport) -> tuple[str, ...]:
    """What found a fault: reading the file, its folder, running it, or loading it."""
    found = []
    static = report.static.findings if report.static is not None else ()
    in_folder = [f for f in static if ".json" in f.where or ".so" in f.where or ".jinja" in f.where]
    numeric = [f for f in report.findings if f not in static]
    loading = [f for f in numeric if f.where == "runtime"]
    found += ["static"] if len(in_folder) < len(static) else []
    found += ["folder"] if in_folder else []
    found += ["load"] if loading else []
    found += ["numeric"] if len(loading) < len(numeric) else []
    return tuple(found)


def _change(planted: ExportedModel, right: Form) -> float | None:
    """The largest error over its tolerance on further legal inputs; None if it cannot be measured."""
    try:
        options = VerifyOptions(static=False)
        report = verify(planted, right.model, options=options, inputs=list(_further_inputs(planted, right)))
    except IBNormError:
        return None
    assert report.numeric is not None
    outputs = [*report.numeric.outputs, *(report.numeric.exact.outputs if report.numeric.exact is not None else ())]
    if not outputs and not report:
        return float("inf")
    return max(
        (max(o.error / o.tolerance, o.worst_sample_error / o.worst_sample_tolerance) for o in outputs), default=None
    )


def _further_inputs(planted: ExportedModel, right: Form) -> Iterator[Arrays]:
    """Legal inputs that verification does not draw: many rows, repeated tokens, padding, very large values."""
    rng = np.random.default_rng(99)
    model = right.model
    images = [spec for spec in model.inputs if spec.name == "pixel_values"]
    if images:
        shape = [int(n) for n in images[0].shape[1:]]
        ordinary = rng.standard_normal((70, *shape), dtype=np.float32)
        large = 3e4 if right.dtype is DType.FP16 else 1e7
        for image in (ordinary, ordinary[:3] * np.float32(large), np.ones((2, *shape), np.float32)):
            yield {"pixel_values": image}
        return
    fixed = fixed_sizes(planted, model)
    whole = right.name.startswith("llama genai")
    for rows, length in ((70, 3), (3, 159), (5, 33), (256, 9)):
        rows, length = fixed.get("batch_size", rows), fixed.get("sequence_length", length)
        ids = rng.integers(0, _VOCABULARY, (rows, length), dtype=np.int64)
        ids[0, : min(length, _VOCABULARY)], ids[-1] = np.arange(length), 7
        ids[rows // 2, : length // 2 * 2] = np.tile([33, 45], length // 2)
        mask = np.ones_like(ids)
        if not whole:
            mask[-1 if rows < 3 else 1, : length // 2] = 0
        if not whole and rows == 256:  # every pattern of padding of eight tokens
            mask[:, :8] = np.arange(256)[:, None] >> np.arange(8) & 1
        yield _text_inputs(model.inputs, ids, mask)
    if any(spec.floating for spec in model.inputs):
        past = fixed.get("batch_size", 2)
        arrays = _text_inputs(model.inputs, np.full((past, 1), 9), np.ones((past, 7), np.int64), past=6)
        large = 3e3 if right.dtype is DType.FP16 else 1e6
        yield {
            name: rng.standard_normal(array.shape, dtype=np.float32) * np.float32(large if "value" in name else 1.0)
            if name.startswith("past_key_values.")
            else array
            for name, array in arrays.items()
        }


def _text_inputs(specs: Any, ids: Any, mask: Any, *, past: int = 0) -> Arrays:
    """Inputs of a language model; a cache of zeros."""
    arrays: Arrays = {}
    for spec in specs:
        if spec.floating:
            shape = (len(ids), int(spec.shape[1]), past, int(spec.shape[3]))
            arrays[spec.name] = np.zeros(shape, np.float32)
        else:
            named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, past:]}
            arrays[spec.name] = named[spec.name]
    return arrays
