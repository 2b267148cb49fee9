"""The inputs of a comparison: drawn or the user's own, checked, and rounded to the file's dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Final

import numpy as np
import torch

from ibnorm_export.artifacts.axes import PAST, TOTAL
from ibnorm_export.artifacts.covering_inputs import CoveringInputs, draw_covering_inputs, fit_sizes
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import without_padding
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import Target, Task
from ibnorm_export.artifacts.model_limits import ModelLimits, find_limits
from ibnorm_export.artifacts.stress_inputs import draw_stress_inputs
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError
from ibnorm_export.runtimes.runner import Backend
from ibnorm_export.verifier.options import InputCoverage, VerifyOptions

__all__ = [
    "FAST_LEAVES_OUT",
    "PreparedSamples",
    "RefusedInputError",
    "can_decode",
    "fixed_sizes",
    "prepare_samples",
    "refusals",
    "round_inputs",
]

#: What fast coverage leaves out, and why.
FAST_LEAVES_OUT: Final = (
    "the longest sequence, the last slot of a cache, a large batch, much padding, both ends of the vocabulary and "
    "large values: coverage is fast"
)

#: Backends that take only the sizes that an engine was built for or a server allows.
_BOUNDED_BACKENDS: Final = (Backend.TENSORRT, Backend.TENSORRT_RTX, Backend.TRITON)


class RefusedInputError(ModelFileError):
    """PyTorch cannot run the checkpoint on an input."""


@contextlib.contextmanager
def refusals(index: int, inputs: Arrays) -> Iterator[None]:
    """Report the input by number if PyTorch fails on it in this block.

    Raises:
        RefusedInputError: PyTorch raised an error; the message has the ranges of the input.
    """
    try:
        yield
    except (IndexError, ValueError, RuntimeError) as error:
        ranges = ", ".join(f"{name} from {a.min()} to {a.max()}" for name, a in inputs.items() if a.size)
        raise RefusedInputError(f"PyTorch cannot run the checkpoint on input {index} ({ranges}): {error}") from error


def round_inputs(inputs: Arrays, dtype: torch.dtype) -> Arrays:
    """Floating-point inputs as the model sees them, in float32, so that rounding them adds no error on either side."""
    return {
        name: torch.from_numpy(a).to(dtype).float().numpy() if np.issubdtype(a.dtype, np.floating) else a
        for name, a in inputs.items()
    }


@dataclass(frozen=True, slots=True)
class PreparedSamples:
    """The inputs of a comparison.

    Args:
        inputs: the inputs, rounded to the file's dtype.
        notes: notes about them for the reader.
        covers: what a covering input covers, by its index. It is left out where PyTorch cannot run it.
        other_sizes: indices of the inputs of other sizes than the example of a user's code, which may refuse them.
        left_out: what is not run, and why.
        limits: what the model takes.
    """

    inputs: tuple[Arrays, ...] = ()
    notes: tuple[str, ...] = ()
    _: KW_ONLY
    covers: Mapping[int, str] = field(default_factory=dict)
    other_sizes: Collection[int] = ()
    left_out: tuple[str, ...] = ()
    limits: ModelLimits = field(default_factory=lambda: ModelLimits({}, 0))


def fixed_sizes(exported: ExportedModel, model: LoadedModel) -> dict[str, int]:
    """Sizes of the axes that are dynamic in the model and fixed in the file, by name."""
    shapes = {tensor.name: tensor.shape for tensor in exported.inputs}
    return {
        axis: size
        for spec in model.inputs
        for axis, size in zip(spec.shape, shapes.get(spec.name, ()), strict=False)
        if isinstance(axis, str) and isinstance(size, int)
    }


def can_decode(fixed: Mapping[str, int]) -> bool:
    """Whether a file with these fixed sizes takes a cache that grows from call to call."""
    return not {PAST, TOTAL} & set(fixed)


def _draw(exported: ExportedModel, model: LoadedModel, *, options: VerifyOptions) -> PreparedSamples:
    """Inputs that walk through the shapes that matter, then covering inputs, then stress inputs if requested."""
    rng = np.random.default_rng(options.seed)
    drawn = [model.sample(rng, index) for index in range(options.samples)]
    with refusals(0, drawn[0]):
        limits = find_limits(model, inputs=drawn[0])
    fixed = fixed_sizes(exported, model)
    drawn = [fit_sizes(model, arrays, limits=limits, fixed=fixed) for arrays in drawn]
    covering = _cover(model, rng, options=options, limits=limits, fixed=fixed, drawn=drawn)
    stress = draw_stress_inputs(model, rng) if options.stress else {}
    stressed = [fit_sizes(model, arrays, limits=limits, fixed=fixed) for arrays in stress.values()]
    covered = len(drawn) + len(covering.samples)
    notes = [f"samples {covered} and up are stress inputs: {', '.join(stress)}"] if stress else []
    if fixed:
        sizes = ", ".join(f"{name} {size}" for name, size in fixed.items())
        stuck = model.task is Task.TEXT_GENERATION and not can_decode(fixed)
        steps = ", nor is decoding, for which the cache must grow" if stuck else ""
        notes.append(f"the file takes one size only: {sizes}; other sizes are not compared{steps}")
    return PreparedSamples(
        (*drawn, *covering.samples.values(), *stressed),
        tuple(notes),
        covers=dict(enumerate(covering.samples, len(drawn))),
        other_sizes=() if model.original is None else _of_other_sizes(drawn),
        left_out=covering.left_out,
        limits=limits,
    )


def _of_other_sizes(drawn: Sequence[Arrays]) -> tuple[int, ...]:
    """Indices of the samples whose sizes differ from those of the first, which has the sizes of the user's example."""
    sizes = [{name: array.shape for name, array in arrays.items()} for arrays in drawn]
    return tuple(index for index, found in enumerate(sizes) if found != sizes[0])


def _cover(
    model: LoadedModel,
    rng: np.random.Generator,
    *,
    options: VerifyOptions,
    limits: ModelLimits,
    fixed: Mapping[str, int],
    drawn: Sequence[Arrays],
) -> CoveringInputs:
    if options.coverage is InputCoverage.FAST:
        return CoveringInputs({}, (FAST_LEAVES_OUT,))
    if options.backend in _BOUNDED_BACKENDS:
        reason = f"backend {options.backend} takes only the sizes of its engine or server"
        return CoveringInputs({}, (f"the longest sequence, a large batch and large values: {reason}",))
    return draw_covering_inputs(model, rng, limits=limits, fixed=fixed, drawn=drawn)


def _check_sizes(exported: ExportedModel, model: LoadedModel, sample: Arrays) -> None:
    """Compare the sizes of the user's inputs with those that `export --shape` fixed."""
    for spec in model.inputs:
        for axis, found in zip(spec.shape, sample[spec.name].shape, strict=True):
            wanted = exported.metadata.shape.get(axis, found) if isinstance(axis, str) else found
            if found != wanted:
                raise ModelFileError(
                    f"{exported.path} takes only {axis} {wanted}, not {found} (input {spec.name}): give inputs of that "
                    f"size, or export with --shape {axis}={found}"
                )


def prepare_samples(
    exported: ExportedModel, model: LoadedModel, *, options: VerifyOptions, given: Sequence[Arrays] | None
) -> PreparedSamples:
    """The inputs to compare on.

    Args:
        exported: the file.
        model: the checkpoint; it draws inputs.
        options: number of samples, seed, and whether to add covering and stress inputs.
        given: the user's own inputs instead.

    Raises:
        ModelFileError: `given` is empty, or has padding or sizes that the file does not take.
    """
    if given is not None and not given:
        raise ModelFileError("inputs is empty; give at least one set of arrays, or None to draw samples")
    genai = exported.metadata.target is Target.ORT_GENAI
    if genai and given is not None and any((sample["attention_mask"] == 0).any() for sample in given):
        raise ModelFileError(
            f"rows of the inputs have unequal lengths (attention_mask has zeros), which {exported.path} cannot take: "
            "GroupQueryAttention counts positions without padding. Give rows of equal length, or export --target "
            "portable"
        )
    for sample in given or ():
        _check_sizes(exported, model, sample)
    if given is None:
        prepared = _draw(exported, model, options=options)
    else:
        with refusals(0, given[0]):
            limits = find_limits(model, inputs=given[0])
        left_out = ("anything but your own inputs",)
        prepared = PreparedSamples(tuple(given), (), left_out=left_out, limits=limits)
    samples, notes = prepared.inputs, prepared.notes
    if genai:
        notes = (*notes, "rows of a batch have equal lengths: GroupQueryAttention counts positions without padding")
        samples = tuple(without_padding(sample) for sample in samples)
    dtype = torch_dtype(exported.dtype)
    return replace(prepared, inputs=tuple(round_inputs(sample, dtype) for sample in samples), notes=notes)
