"""An exported file, run in plain onnxruntime, against the stranger's module of the same weights in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from ibnorm_export.op.float64_mode import compute_in_float64

#: Relative error of a float32 file: about eight roundings of 2^-24 in each of some four steps that do not average out.
TOLERANCE = 2e-6

Arrays = dict[str, NDArray[Any]]


def open_session(path: str | Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, arrays: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, arrays), strict=True))


def _truth(theirs: Any, arrays: Arrays) -> Any:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    with compute_in_float64(), torch.no_grad():
        return theirs(**wide)


def _error(file: NDArray[Any], truth: torch.Tensor, where: NDArray[np.bool_] | None = None) -> float:
    expected = truth.numpy()
    a, b = (file, expected) if where is None else (file[where], expected[where])
    assert a.shape == b.shape
    assert a.size
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions that start at 0 where the text starts."""
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(1) - 1, 0)
    return positions


def _text(right: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens (3, 20) and their mask: one row has padding on the left and, if `right`, one on the right."""
    ids = np.random.default_rng(0).integers(3, 128, (3, 20), dtype=np.int64)
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    if right:
        mask[2, 15:] = 0
    return ids, mask


def image_error(path: str | Path, theirs: Any) -> float:
    """Relative error of the logits of three images."""
    session = open_session(path)
    shape = session.get_inputs()[0].shape[1:]
    arrays = {"pixel_values": np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)}
    return _error(_run(session, arrays)["logits"], _truth(theirs, arrays).logits)


def encoder_error(path: str | Path, theirs: Any) -> float:
    """The largest relative error of an output, over texts with padding on either side."""
    session = open_session(path)
    ids, mask = _text(right=True)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in [value.name for value in session.get_inputs()]:
        arrays["token_type_ids"] = ids % 2
    found, truth = _run(session, arrays), _truth(theirs, arrays)
    assert set(found) == set(truth.keys())
    per_token = {name: value.ndim > 1 and value.shape[1] == mask.shape[1] for name, value in found.items()}
    return max(_error(value, truth[name], mask != 0 if per_token[name] else None) for name, value in found.items())


def logits_error(path: str | Path, theirs: Any) -> float:
    """Relative error of the logits of texts with padding on the left, without a cache."""
    ids, mask = _text(right=False)
    arrays = {"input_ids": ids, "attention_mask": mask}
    # The exported positions count from the left end: relative ones give the same values, learned ones do not.
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    truth = _truth(theirs, {**arrays, "position_ids": positions}).logits
    return _error(_run(open_session(path), arrays)["logits"], truth, mask != 0)


def decode(session: ort.InferenceSession, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Iterator[Any]:
    """Logits of a prompt (batch, prompt, vocabulary), then of each token that is sent back."""
    past = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    while True:
        positions = _positions(mask)[:, -ids.shape[1] :]
        found = _run(session, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        ids = yield found["logits"]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)


def decoding_error(path: str | Path, theirs: Any, *, prompt: int = 14) -> float:
    """The largest relative error of a prompt with padding, and of each cached step after it."""
    ids, mask = _text(right=False)
    truth = _truth(theirs, {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask)}).logits
    steps = decode(open_session(path), ids[:, :prompt], mask[:, :prompt])
    errors = [_error(next(steps), truth[:, :prompt], mask[:, :prompt] != 0)]
    for step in range(prompt, ids.shape[1]):
        errors.append(_error(steps.send(ids[:, step : step + 1]), truth[:, step : step + 1]))
    return max(errors)


def greedy_tokens(path: str | Path, theirs: Any, *, count: int = 20) -> tuple[list[int], list[int]]:
    """The tokens that the file generates from its own logits, and those of transformers' `generate`."""
    ids, mask = _text(right=False)
    ids, mask = ids[:1, :3], mask[:1, :3]
    steps = decode(open_session(path), ids, mask)
    logits, tokens = next(steps), []
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits = steps.send(np.array([tokens[-1:]], dtype=np.int64))
    with compute_in_float64(), torch.no_grad():
        text = theirs.generate(torch.from_numpy(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokens, text[0, ids.shape[1] :].tolist()
