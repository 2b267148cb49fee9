"""Right exports of models whose weights amplify rounding; verification must pass them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import LLAMA, VIT

_Change = Callable[[str, torch.nn.Parameter], None]


def _outliers(name: str, parameter: torch.nn.Parameter) -> None:
    parameter.data.view(-1)[::997] *= 1000.0


def _large_projections(name: str, parameter: torch.nn.Parameter) -> None:
    if "proj" in name or "attention" in name or "mlp" in name:
        parameter.data *= 30.0


def _tiny(name: str, parameter: torch.nn.Parameter) -> None:
    parameter.data *= 1e-4


def _zero_scales(name: str, parameter: torch.nn.Parameter) -> None:
    if parameter.dim() == 1:
        parameter.data[::2] = 0.0


def _large_means(name: str, parameter: torch.nn.Parameter) -> None:
    if "embed" in name:
        parameter.data += 30.0 * parameter.data.std()


def _unchanged(name: str, parameter: torch.nn.Parameter) -> None:
    """Leave the weights as they are: the sizes are unusual."""


_ONE_HEAD: Final = {"num_attention_heads": 1, "num_key_value_heads": 1}
_ODD: Final = {"hidden_size": 36, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 3}

#: Settings that differ, and the change of every weight, by what is hostile.
HOSTILE: Final[dict[str, tuple[dict[str, int], _Change]]] = {
    "outliers of 1000": ({}, _outliers),
    "projections 30 times larger": ({}, _large_projections),
    "tiny weights": ({}, _tiny),
    "zero scales": ({}, _zero_scales),
    "large means": ({"num_hidden_layers": 1}, _large_means),
    "one head": (_ONE_HEAD, _unchanged),
    "odd sizes": (_ODD, _unchanged),
}


def hostile_alarm(kind: str, family: str, dtype: DType, *, folder: Path, seed: int) -> tuple[str, ...]:
    """Findings of verification in a right export with hostile weights; any is a false alarm.

    A model that does not fit its dtype is refused, which is no false alarm.
    """
    settings, change = HOSTILE[kind]
    config: dict[str, Any] = {**(LLAMA if family == "llama" else VIT), **settings}
    torch.manual_seed(seed)
    model = models.new_model(config, IBNormSpec("SLT"[seed % 3], bias=family != "llama"))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        change(name, parameter)
    checkpoint = folder / f"{kind} {family} {dtype.value} {seed}"
    models.save(model, checkpoint)
    exported = export(models.load(checkpoint), folder / f"{checkpoint.name}.onnx", options=ExportOptions(dtype=dtype))
    report = verify(exported, models.load(checkpoint), options=VerifyOptions(seed=seed))
    unfit = any("does not fit this dtype" in finding.what for finding in report.findings)
    return () if report or unfit else tuple(str(finding) for finding in report.findings)
