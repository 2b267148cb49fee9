"""Values that the training code saved: a wrong reading of config.json fails, and the right one is suggested."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ibnorm_export import (
    DType,
    ExportedModel,
    IBNormSpec,
    LoadedModel,
    ModelFileError,
    NormConfig,
    VerifyOptions,
    export,
    models,
)
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.progress import silent
from ibnorm_export.verifier.checkpoint.reference import Reference
from ibnorm_export.verifier.comparison import Comparison
from ibnorm_export.verifier.expected import readings
from ibnorm_export.verifier.expected.verdict import check_expected
from ibnorm_export.verifier.report import ExpectedReport
from ibnorm_export.verifier.verify import verify
from tests.support.checkpoints import LLAMA, save_checkpoint
from tests.support.planting import plant
from tests.support.trained_norms import COMPRESSIONS, EPSILON, LAMBDA, NORMS, TrainedNorm, saved_by_training, trained

TINY = LLAMA | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = IBNormSpec.from_convention("L", LAMBDA, epsilon=EPSILON, convention="divide")
    return save_checkpoint(tmp_path_factory.mktemp("expected") / "llama", TINY, spec, seed=3)


@pytest.fixture(scope="module")
def right(checkpoint: Path) -> LoadedModel:
    return models.load(checkpoint)


@pytest.fixture(scope="module")
def file(right: LoadedModel, checkpoint: Path) -> ExportedModel:
    return export(right, checkpoint.parent / "llama.onnx")


def read_as(checkpoint: Path, folder: Path, **section: Any) -> LoadedModel:
    """The checkpoint with another ibnorm section."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["ibnorm"] |= section
    (folder / "config.json").write_text(json.dumps(config))
    return models.load(folder)


def compared(file: ExportedModel, model: LoadedModel, path: Path, dtype: DType | None = None) -> ExpectedReport:
    reference = Reference(model, file.dtype, inputs=(), progress=silent)
    comparison = Comparison(file, reference, options=VerifyOptions(), progress=silent)
    return check_expected(comparison, path, dtype=dtype)


def test_values_of_the_right_reading_pass(right: LoadedModel, file: ExportedModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "values.npz", **saved_by_training(trained(right.module, TrainedNorm)))
    report = compared(file, right, tmp_path / "values.npz")
    assert report, report.findings
    assert report.dtype == "fp32"
    assert report.rows[0].what == "checkpoint in float64"
    assert len(report.rows) >= 2
    assert max(row.error for row in report.rows) < 2e-6


@pytest.mark.parametrize(
    ("code", "section"),
    [
        ("divide", {"lambda": 2.0}),
        ("divide", {"lambda": 3.0, "epsilon": 1e-4}),
        ("divide", {"epsilon": 1.0}),
        ("divide", {"epsilon": 1e-4}),
        ("divide", {"compression": "T"}),
        *[(code, {"convention": read}) for code in COMPRESSIONS for read in COMPRESSIONS if read != code],
    ],
)
def test_a_wrong_reading_fails_and_the_right_one_is_suggested(
    checkpoint: Path, file: ExportedModel, tmp_path: Path, code: str, section: dict[str, Any]
) -> None:
    model = read_as(checkpoint, tmp_path / "read", **section)
    specs = dict(model.norms)
    np.savez(tmp_path / "values.npz", **saved_by_training(trained(model.module, partial(TrainedNorm, convention=code))))
    report = compared(file, model, tmp_path / "values.npz")
    assert not report
    assert not report.rows[0].passed
    suggested = re.search(r"This reading fits: (.*)\. Correct the ibnorm section", report.findings[0].what)
    assert suggested, report.findings
    found = NormConfig.from_config(json.loads("{" + suggested[1] + "}")).default
    right = IBNormSpec.from_convention("L", LAMBDA, epsilon=EPSILON, convention=code)
    assert (found.compression, found.lambd) == (right.compression, pytest.approx(right.lambd))
    assert found.epsilon == pytest.approx(right.epsilon)
    assert {path: model.module.get_submodule(path).spec for path in specs} == specs, "it is as before"


def test_values_of_another_model_fit_no_reading(right: LoadedModel, file: ExportedModel, tmp_path: Path) -> None:
    values = saved_by_training(trained(right.module, TrainedNorm))
    values["logits"] = values["logits"][:, ::-1]
    np.savez(tmp_path / "values.npz", **values)
    report = compared(file, right, tmp_path / "values.npz")
    assert not report
    assert "No other convention, usual lambda" in report.findings[0].what
    assert "--expected-dtype bf16" in report.findings[0].what


@pytest.mark.parametrize("norm", list(NORMS.values())[5:], ids=list(NORMS)[5:])
def test_a_norm_that_the_config_cannot_state_fails(
    right: LoadedModel, file: ExportedModel, tmp_path: Path, norm: type[TrainedNorm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "_MAX_TRIED", 20)  # the number of readings is the same for all
    np.savez(tmp_path / "values.npz", **saved_by_training(trained(right.module, norm)))
    report = compared(file, right, tmp_path / "values.npz")
    assert not report
    assert not any(row.passed for row in report.rows)


def test_half_precision_has_its_own_tolerance(right: LoadedModel, file: ExportedModel, tmp_path: Path) -> None:
    """In bfloat16 the training code is further off, which is stated: NumPy has no such type."""
    np.savez(tmp_path / "bf16.npz", **saved_by_training(trained(right.module, TrainedNorm), torch.bfloat16))
    assert not compared(file, right, tmp_path / "bf16.npz")
    report = compared(file, right, tmp_path / "bf16.npz", DType.BF16)
    assert report, report.findings
    wrong = saved_by_training(trained(right.module, partial(TrainedNorm, convention="multiply")), torch.bfloat16)
    np.savez(tmp_path / "wrong.npz", **wrong)
    assert not compared(file, right, tmp_path / "wrong.npz", DType.BF16)


def test_a_wrong_file_fails_where_the_checkpoint_passes(
    file: ExportedModel, right: LoadedModel, tmp_path: Path
) -> None:
    def quarter(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "lambd":
                    attribute.f /= 4.0

    other = plant(file, tmp_path, quarter)
    np.savez(tmp_path / "values.npz", **saved_by_training(trained(right.module, TrainedNorm)))
    report = compared(other, right, tmp_path / "values.npz")
    assert report.rows[0].passed
    assert not any(row.passed for row in report.rows[1:])
    assert not report


def test_verify_fails_although_file_and_checkpoint_agree(checkpoint: Path, tmp_path: Path) -> None:
    model = read_as(checkpoint, tmp_path / "read", convention="unit_slope")
    exported = export(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "values.npz", **saved_by_training(trained(model.module, TrainedNorm)))
    assert verify(exported, model, options=VerifyOptions(samples=1))
    report = verify(exported, model, options=VerifyOptions(samples=1, expected=tmp_path / "values.npz"))
    assert not report
    assert report.static
    assert report.numeric
    assert report.to_dict()["expected"]["verdict"] == "fail"
    assert "This reading fits" in str(report)
    assert not any("assumed" in note for note in report.all_notes)


def test_a_language_model_needs_only_its_tokens(checkpoint: Path, right: LoadedModel, tmp_path: Path) -> None:
    model = models.load(checkpoint, task=Task.TEXT_GENERATION)
    exported = export(model, tmp_path / "text")
    values = saved_by_training(trained(right.module, TrainedNorm))
    del values["attention_mask"]
    np.savez(tmp_path / "values.npz", **values)
    report = compared(exported, model, tmp_path / "values.npz")
    assert report, report.findings


def without(name: str) -> dict[str, Any]:
    return {key: array for key, array in GOOD.items() if key != name}


GOOD: dict[str, Any] = {
    "input_ids": np.ones((2, 3), np.int64),
    "attention_mask": np.ones((2, 3), np.int64),
    "logits": np.zeros((2, 3, 256), np.float32),
}


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (without("input_ids"), "it must have the inputs ['input_ids', 'attention_mask']"),
        (without("logits"), "at least one of the outputs ['logits']"),
        (GOOD | {"loss": np.zeros(1)}, "contains the arrays"),
        (GOOD | {"output.logits": GOOD["logits"]}, "logits twice"),
        (GOOD | {"input_ids": np.ones((2, 3))}, "input_ids has dtype float64; it must be integer"),
        (GOOD | {"logits": np.zeros((2, 3, 256), np.int64)}, "logits has dtype int64; it must be floating"),
        (GOOD | {"input_ids": np.ones((2, 4), np.int64)}, "attention_mask has shape (2, 3)"),
        (GOOD | {"input_ids": np.ones(2, np.int64)}, "input_ids has shape (2,); it must be"),
        (
            GOOD | {"logits": np.zeros((2, 3, 255), np.float32)},
            "logits has shape (2, 3, 255); the checkpoint gives (2, 3, 256)",
        ),
        (GOOD | {"logits": np.full((2, 3, 256), np.nan)}, "logits has NaN or infinity"),
        (GOOD | {"logits": np.array([None], dtype=object)}, "Python objects"),
        (GOOD | {"input_ids": np.full((2, 3), 999)}, "PyTorch cannot run the checkpoint"),
    ],
)
def test_a_bad_file_is_one_clear_line(
    right: LoadedModel, file: ExportedModel, tmp_path: Path, arrays: dict[str, Any], expected: str
) -> None:
    np.savez(tmp_path / "bad.npz", allow_pickle=True, **arrays)
    with pytest.raises(ModelFileError) as caught:
        compared(file, right, tmp_path / "bad.npz")
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_prefixes_tell_inputs_from_outputs(right: LoadedModel, file: ExportedModel, tmp_path: Path) -> None:
    values = saved_by_training(trained(right.module, TrainedNorm))
    named = {f"{'output' if name == 'logits' else 'input'}.{name}": array for name, array in values.items()}
    np.savez(tmp_path / "values.npz", **named)
    assert compared(file, right, tmp_path / "values.npz")
