"""Batches to analyse: a text as rows of tokens, and labels from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.npz import read_npy
from ibnorm_export.artifacts.tensors import Arrays, default_length
from ibnorm_export.artifacts.tokenizer import FolderTokenizer
from ibnorm_export.errors import ModelFileError

__all__ = ["read_labels", "text_batch"]


def text_batch(model: LoadedModel, text: str, *, tokens: int) -> Arrays:
    """The first tokens of a text as input_ids and attention_mask (batch, sequence), at least `tokens` of them.

    Raises:
        ModelFileError: the model is no language model, or the text is too short for one row.
    """
    if {spec.name for spec in model.inputs} != {"input_ids", "attention_mask"}:
        raise ModelFileError(f"{model.source} takes {[s.name for s in model.inputs]}; a text is for a language model")
    embedding: Any = next(p for name, p in model.module.named_parameters() if p.dim() == 2)
    ids = FolderTokenizer(Path(model.source), int(embedding.shape[0])).encode(text)
    length = default_length(model.max_positions)
    count = min(-(-tokens // length), len(ids) // length)
    if count < 1:
        raise ModelFileError(f"the text has {len(ids)} tokens; at least {length} are needed: give a longer text")
    rows = np.asarray(ids[: count * length], np.int64).reshape(count, length)
    return {"input_ids": rows, "attention_mask": np.ones_like(rows)}


def read_labels(path: Path) -> NDArray[Any]:
    """Integers from a .npy file.

    Raises:
        ModelFileError: the file is missing, damaged or holds something else.
    """
    labels = read_npy(path, "a .npy file of labels")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ModelFileError(f"{path} holds {labels.dtype}; labels are integers")
    return labels
