"""The last question of the demo: which file does one ship, in fp32, fp16, int8 or int4?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.evaluation.options import EvaluationOptions, TaskName
from ibnorm_export.evaluation.sweep import sweep
from ibnorm_export.evaluation.sweep_options import SweepOptions
from ibnorm_export.evaluation.sweep_report import SweepReport
from ibnorm_export.exporter.single_file import SharedBuild
from ibnorm_export.models.loading import load
from ibnorm_export.progress import Progress, silent
from ibnorm_export.verifier.options import InputCoverage
from ibnorm_export.verifier.report import ParityReport

__all__ = ["sweep_digits", "sweep_text"]

#: Bytes of held-out text, and of a window: 63 windows, which take about a second for each file.
_TEXT_BYTES: Final = 8192
_WINDOW: Final = 256

#: The files in fp32, which others are compared with, are verified on every input before. Ordinary samples take less
#: time, and show a mistake in the types of weights.
_OPTIONS: Final = SweepOptions(rounds=10, coverage=InputCoverage.FAST)

#: Largest increase of perplexity and largest drop of top-1.
_MAX_DROP: Final = 0.02


def sweep_text(
    model: LoadedModel,
    folder: Path,
    *,
    text: bytes,
    parity: ParityReport | None,
    shared: SharedBuild,
    progress: Progress = silent,
) -> SweepReport:
    """Size, time and perplexity of the language model in every type of weights.

    Args:
        model: the trained model, loaded for text generation.
        folder: has `llama-portable/`, and receives `evaluation.txt` and `llama-sweep/`.
        text: UTF-8 that was not trained on; its beginning is used.
        parity: the report on `llama-portable/`; None verifies it again.
        shared: what has traced the model.
        progress: receives the progress of the work.
    """
    data = folder / "evaluation.txt"
    data.write_text(text[:_TEXT_BYTES].decode(errors="ignore"), encoding="utf-8")
    return sweep(
        model,
        folder / "llama-sweep",
        task=TaskName.PERPLEXITY,
        data=data,
        options=_OPTIONS,
        evaluation=EvaluationOptions(max_drop=_MAX_DROP, max_length=_WINDOW),
        files={"fp32": ExportedModel(folder / "llama-portable")},
        reports={} if parity is None else {"fp32": parity},
        shared=shared,
        progress=progress,
    )


def sweep_digits(
    checkpoint: Path,
    folder: Path,
    *,
    digits: Arrays,
    labels: NDArray[np.int64],
    parity: Sequence[ParityReport],
    progress: Progress = silent,
) -> SweepReport:
    """Size, time and top-1 of the classifier in every type of weights; int8 and int4 are for language models only.

    Args:
        checkpoint: the trained model.
        folder: has `vit.onnx` and `vit.fp16.onnx`, and receives `evaluation.npz` and `vit-sweep/`.
        digits: the held-out images.
        labels: (n,), their digits.
        parity: the reports on both files.
        progress: receives the progress of the work.
    """
    data = folder / "evaluation.npz"
    (images,) = digits.values()
    np.savez(data, images=images, labels=labels)
    return sweep(
        load(checkpoint),
        folder / "vit-sweep",
        task=TaskName.CLASSIFICATION,
        data=data,
        options=_OPTIONS,
        evaluation=EvaluationOptions(max_drop=_MAX_DROP),
        files={"fp32": ExportedModel(folder / "vit.onnx"), "fp16": ExportedModel(folder / "vit.fp16.onnx")},
        reports=dict(zip(("fp32", "fp16"), parity, strict=True)),
        progress=progress,
    )
