"""Batches to analyse: random inputs, inputs from a file, a text as rows of tokens; and labels from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.input_files import read_inputs, read_text
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.npz import read_npy
from ibnorm_export.artifacts.tensors import Arrays, default_length
from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import ModelFileError

__all__ = ["read_batch", "read_labels", "text_batch"]


def read_batch(
    model: LoadedModel, *, inputs: Path | None = None, text: Path | None = None, tokens: int, seed: int = 0
) -> Arrays:
    """One batch for a model: from a text file, else from an .npz file, else random.

    Args:
        model: the checkpoint.
        inputs: an .npz file with arrays by input name.
        text: a text file for a language model.
        tokens: how many tokens of the text to read, at least.
        seed: seed for random inputs.

    Raises:
        ModelFileError: a file cannot be read or does not fit the model.
    """
    if text is not None:
        return text_batch(model, read_text(text), tokens=tokens)
    if inputs is not None:
        return read_inputs(inputs, model)
    return model.sample(np.random.default_rng(seed), 0)


def text_batch(model: LoadedModel, text: str, *, tokens: int) -> Arrays:
    """The beginning of a text as input_ids and attention_mask (batch, sequence), with at least `tokens` tokens.

    Raises:
        ModelFileError: the model is not a language model, or the text is too short for one row.
    """
    names = {spec.name for spec in model.inputs}
    if names != {"input_ids", "attention_mask"}:
        raise ModelFileError(f"{model.source} takes {sorted(names)}; only a language model reads a text")
    embedding: Any = next(p for _, p in model.module.named_parameters() if p.dim() == 2)
    ids = FolderTokenizer(Path(model.source), int(embedding.shape[0])).encode(text)
    length = default_length(model.max_positions)
    count = min(-(-tokens // length), len(ids) // length)
    if count < 1:
        raise ModelFileError(f"the text has {len(ids)} tokens, and one row needs {length}: give a longer text")
    rows = np.asarray(ids[: count * length], np.int64).reshape(count, length)
    return {"input_ids": rows, "attention_mask": np.ones_like(rows)}


def read_labels(path: Path) -> NDArray[Any]:
    """Read integer labels from a .npy file.

    Raises:
        ModelFileError: the file is missing, damaged, or does not hold integers.
    """
    labels = read_npy(path, "a .npy file of labels")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ModelFileError(f"{path} contains {labels.dtype}; labels must be integers")
    return labels
