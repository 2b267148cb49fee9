"""The inputs of a comparison: drawn or the user's own, checked, and rounded to the file's dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import without_padding
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.artifacts.stress_inputs import draw_stress_inputs
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError
from ibnorm_export.verifier.options import VerifyOptions

__all__ = ["RefusedInputError", "prepare_samples", "refusals", "round_inputs"]


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


def _draw(model: LoadedModel, options: VerifyOptions) -> tuple[list[Arrays], list[str]]:
    """Inputs that walk through the shapes that matter, then stress inputs if requested; and notes."""
    rng = np.random.default_rng(options.seed)
    drawn = [model.sample(rng, index) for index in range(options.samples)]
    stress = draw_stress_inputs(model, rng) if options.stress else {}
    notes = [f"samples {len(drawn)} and up are stress inputs: {', '.join(stress)}"] if stress else []
    return [*drawn, *stress.values()], notes


def prepare_samples(
    exported: ExportedModel, model: LoadedModel, *, options: VerifyOptions, given: Sequence[Arrays] | None
) -> tuple[tuple[Arrays, ...], tuple[str, ...]]:
    """The inputs to compare on.

    Args:
        exported: the file.
        model: the checkpoint; it draws inputs.
        options: number of samples, seed, and whether to add stress inputs.
        given: the user's own inputs instead.

    Returns:
        The inputs, and notes about them.

    Raises:
        ModelFileError: `given` is empty, or has padding, which the file does not take.
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
    samples, notes = _draw(model, options) if given is None else (list(given), [])
    if genai:
        notes.append("rows of a batch have equal lengths: GroupQueryAttention counts positions without padding")
        samples = [without_padding(sample) for sample in samples]
    dtype = torch_dtype(exported.dtype)
    return tuple(round_inputs(sample, dtype) for sample in samples), tuple(notes)
