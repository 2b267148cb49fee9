"""The section `evaluate` of a check.toml."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ibnorm_export import load
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.errors import ConfigError
from ibnorm_export.evaluation.options import TaskName
from ibnorm_export.gate.case import Outcome
from ibnorm_export.gate.config import EvaluationCheck, ExportCheck, read_check_config
from ibnorm_export.gate.evaluations import evaluate_export
from ibnorm_export.gate.latency import Prepared
from ibnorm_export.gate.report import CheckReport
from ibnorm_export.gate.report_files import write_report_files

START = '[[export]]\nname = "m"\ncheckpoint = "c"\n[[export.evaluate]]\ntask = "classification"\n'


def read(folder: Path, text: str) -> EvaluationCheck:
    (folder / "check.toml").write_text(START + text, encoding="utf-8")
    (wanted,) = read_check_config(folder / "check.toml").export[0].evaluate
    return wanted


def test_the_keys(tmp_path: Path) -> None:
    wanted = read(tmp_path, 'data = "val"\nmax_drop = 0.01\nlimit = 100\n')
    assert wanted == EvaluationCheck(TaskName.CLASSIFICATION, tmp_path / "val", max_drop=0.01, limit=100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"evaluate\[0\].data is missing"),
        ('data = "val"\nmax_drop = -1.0\n', "max_drop is -1.0; it must be at least 0"),
        ('data = "val"\nlimit = 0\n', "limit is 0; it must be at least 1"),
        ('data = "val"\nbackend = "triton"\n', "backend is .*triton.*; it must be one of"),
        ('data = "val"\nmetric = "top-1"\n', r"unknown keys \['metric'\]"),
    ],
)
def test_illegal_keys_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_an_export_is_evaluated_against_its_checkpoint(
    vit_checkpoint: Path, exported_vit: ExportedModel, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "val.npz",
        images=rng.standard_normal((80, 1, 8, 8), dtype=np.float32),
        labels=rng.integers(0, 10, 80),
    )
    entry = ExportCheck("vit", vit_checkpoint)
    prepared = Prepared(entry, load(vit_checkpoint), exported_vit)
    wide = EvaluationCheck(TaskName.CLASSIFICATION, tmp_path / "val.npz", max_drop=0.2)
    passed = evaluate_export(prepared, wide, results=tmp_path / "results")
    assert passed.case.outcome is Outcome.PASS
    assert passed.case.suite == "vit.ort-cpu.evaluate"
    narrow = EvaluationCheck(TaskName.CLASSIFICATION, tmp_path / "val.npz", max_drop=0.001)
    undecided = evaluate_export(prepared, narrow, results=tmp_path / "results")
    assert undecided.case.outcome is Outcome.CANNOT_TELL
    assert undecided.report is not None
    assert [c.cached for c in undecided.report.candidates] == [80, 80], "nothing is computed again"
    missing = evaluate_export(
        prepared, EvaluationCheck(TaskName.CLASSIFICATION, tmp_path / "nowhere"), results=tmp_path / "results"
    )
    assert missing.case.outcome is Outcome.ERROR
    assert "nothing is downloaded" in missing.case.message
    report = CheckReport(
        "check.toml",
        (passed.case,),
        parity={},
        environment={},
        seconds=1.0,
        evaluations={"vit, val": undecided.report},
    )
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    write_report_files(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "vit, val: Differences from torch" in page
    assert "Calibration" in page
