"""check.toml: legal values, the messages about illegal ones, and the template."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ConfigError
from ibnorm_export.exporter.export import ExportOptions
from ibnorm_export.gate.config import CheckConfig, ExportCheck, LatencyBudget, ParityCheck, read_check_config
from ibnorm_export.gate.template import write_template

START = '[[export]]\nname = "m"\ncheckpoint = "c"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "check.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    text = """
results = "out"
[[export]]
name = "m"
checkpoint = "c"
dtype = "fp16"
[export.parity]
backends = ["ort-cpu", "present"]
max_error = 1
inputs = ["x.npz"]
[[export.latency]]
against = "n"
max_ratio = 1.5
[[export]]
name = "n"
checkpoint = "/c"
"""
    config = read_check_config(written(tmp_path, text))
    first = ExportCheck(
        "m",
        tmp_path / "c",
        dtype=DType.FP16,
        latency=(LatencyBudget(against="n", max_ratio=1.5),),
        parity=ParityCheck(("ort-cpu", "present"), inputs=(tmp_path / "x.npz",), max_error=1.0),
    )
    assert config == CheckConfig((first, ExportCheck("n", Path("/c"))), tmp_path / "out")


def test_the_defaults_are_those_of_export() -> None:
    options, entry = ExportOptions(), ExportCheck("m", Path("c"))
    assert (entry.dtype, entry.opset, entry.inline, entry.fuse_skip) == (
        options.dtype,
        options.opset,
        options.inline,
        options.fuse_skip,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "export is missing"),
        ("export = []", "nothing to check"),
        ("[[export", "not a TOML file"),
        (START + "tolerance = 1", "unknown keys ['tolerance']"),
        (START + "[export.parity]\nsample = 3", "unknown keys ['sample']"),
        (START + "_ = 1", "unknown keys ['_']; legal keys are ['name', 'checkpoint', 'model',"),
        (START + "[export.parity]\nsamples = true", "samples is True; it must be int"),
        (START + "[export.parity]\nsamples = 0", "samples is 0"),
        (START + "[export.parity]\nmax_error = 1" + "0" * 400, "it must be a number that a float can hold"),
        (START + "[export.parity]\nseed = -1", "parity.seed is -1"),
        (START + "[export.parity]\nmax_error = -1.0", "parity.max_error is -1.0"),
        (START + "[export.parity]\nmax_error = nan", "parity.max_error is nan"),
        (START + '[export.parity]\nbackends = ["gpu"]', "no backend 'gpu'"),
        (START + '[export.parity]\nbackends = ["triton"]', "no backend 'triton'"),
        (START + 'dtype = "fp8"', "'fp8'; it must be one of fp32, fp16, bf16"),
        (START + 'task = "dream"', "'dream'"),
        (START + "[[export.latency]]\nrounds = 3", "names []; it must name exactly one"),
        (START + '[[export.latency]]\nmax_ms = 1\nbackend = "present"', "'present'; it must be one of ort-cpu"),
        (START + '[[export.latency]]\nmax_ms = 1\nbackend = "triton"', "'triton'"),
        (START + "[[export.latency]]\nmax_ms = 1\nrounds = 0", "rounds is 0; it must be at least 1"),
        (START + '[[export.latency]]\nmax_ms = 1\nagainst = "torch"', "exactly one"),
        (START + '[[export.latency]]\nagainst = "other"', "'other'"),
        (START + "[[export.latency]]\nmax_ms = -1", "above 0"),
        (START + "[[export.latency]]\nmax_ms = nan", "above 0"),
        (START + "[[export.latency]]\nmax_ms = 1\nthreads = -3", "latency[0]: threads is -3"),
        (START + "[[export.latency]]\nmax_ms = 1\nmax_rounds = 3", "max_rounds is 3; it must be at least rounds"),
        (START + START, "appears 2 times"),
        ('[[export]]\nname = "../m"\ncheckpoint = "c"', "the name of a file"),
        ("format = 2\n" + START, "reads 1"),
        ('[[export]]\nname = "m"', "checkpoint is missing"),
        ("export = 3", "must be a list"),
    ],
)
def test_an_illegal_value_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_check_config(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_answered_with_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--init"):
        read_check_config(tmp_path / "none.toml")


def test_the_template_is_legal_and_does_not_replace_a_file(llama_checkpoint: Path, tmp_path: Path) -> None:
    path = write_template(llama_checkpoint, tmp_path / "check.toml")
    config = read_check_config(path)
    assert [export.dtype for export in config.export] == [DType.FP32, DType.FP16]
    assert config.export[0].checkpoint.resolve() == llama_checkpoint.resolve()
    assert config.export[0].latency[0].sequence == 64
    with pytest.raises(ConfigError, match="already exists"):
        write_template(llama_checkpoint, path)
    (tmp_path / "w.pt").touch()
    with pytest.raises(ConfigError, match=r'is for a checkpoint folder; .* model = "package.module:factory"'):
        write_template(tmp_path / "w.pt", tmp_path / "own.toml")
    chosen = read_check_config(write_template(llama_checkpoint, tmp_path / "raw.toml", weights=Weights.RAW))
    assert [export.weights for export in chosen.export] == [Weights.RAW, Weights.RAW]
