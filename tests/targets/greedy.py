"""Texts of the most probable tokens, written without a cache and without this package's generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from ibnorm_export import LoadedModel

__all__ = ["Logits", "continued", "in_onnxruntime", "in_pytorch"]

#: All tokens of a text -> the logits of every position (tokens, vocabulary).
Logits = Callable[[list[int]], NDArray[Any]]


def continued(logits: Logits, ids: list[int], *, tokens: int) -> list[int]:
    """`ids` and the most probable next tokens."""
    for _ in range(tokens):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    return ids


def in_pytorch(model: LoadedModel) -> Logits:
    """The logits of the model in float64."""
    truth = model.truth()

    def logits(ids: list[int]) -> NDArray[Any]:
        with torch.no_grad():
            result: NDArray[Any] = truth(input_ids=torch.tensor([ids])).logits[0].numpy()
        return result

    return logits


def in_onnxruntime(file: Path) -> Logits:
    """The logits of an exported file, which gets the whole text and an empty cache every time."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtypes[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }

    def logits(ids: list[int]) -> NDArray[Any]:
        n = len(ids)
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, n), dtype=np.int64),
            "position_ids": np.arange(n)[None],
        }
        result: NDArray[Any] = session.run(["logits"], feeds | past)[0][0]
        return result

    return logits
