"""The commands as a user sees them: exit codes, one line for an error, one JSON object, verdicts."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
from rich.console import Console

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.cli import console, main
from ibnorm_export.cli.bench import _following
from ibnorm_export.cli.export import _print_export
from ibnorm_export.errors import ExitCode
from tests.support.held_process import held_process
from tests.support.messages import messages
from tests.support.shared_exports import SharedExports


@pytest.fixture(scope="module")
def exported(exports: SharedExports) -> Path:
    return exports("llama").path


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_has_an_example(cli: Any, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"Example: ibnorm-export {command}" in " ".join(result.out.split())
    assert "--json" in result.out


def test_the_list_has_every_command_and_every_exit_code(cli: Any) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(command in result.out for command in main.COMMANDS)
    assert all(f"{int(code)} " in result.out for code in ExitCode)


def test_consoles_escape_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console.out.print("warning: a\x1b[2Jb", markup=False)
    console.err.print("warning: a\x1b[2Jb", markup=False)
    assert list(capsys.readouterr()) == ["warning: a\\x1b[2Jb\n"] * 2


def test_a_report_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a table  1\nnote: [bold]as it is[/bold]\nFAIL x: y\nverdict: fail"
    console.print_report(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_quiet_leaves_notes_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.err, "verbosity", console.Verbosity.QUIET)
    console.print_report("note: a\nFAIL x: note: y\nverdict: fail")
    assert capsys.readouterr().out == "FAIL x: note: y\nverdict: fail\n"
    console.print_aside("stopping")
    console.print_next("verify", "m.onnx")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verbosity", [console.Verbosity.QUIET, console.Verbosity.NORMAL])
def test_export_leaves_notes_of_the_checkpoint_out_if_quiet(
    exported: Path, verbosity: console.Verbosity, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.err, "verbosity", verbosity)
    loaded: Any = SimpleNamespace(notes=("tied",), warnings=("old",))
    _print_export(ExportedModel(exported), loaded)
    printed = capsys.readouterr().out.splitlines()
    assert printed[: printed.index("warning: old")] == ["note: tied"] * (verbosity is console.Verbosity.NORMAL)


def test_names_with_control_characters_are_shown_escaped(cli: Any, exported: Path, tmp_path: Path) -> None:
    """A name comes from a file: it could clear the screen, or print its own verdict."""
    proto = onnx.load(exported)
    proto.graph.input[0].name = "ids\x1b[2J\nverdict: pass"
    proto.graph.output[0].name = "logits\x1b]0;title\x07" + "x" * 100_000
    onnx.save(proto, tmp_path / "m.onnx")
    result = cli("inspect", tmp_path / "m.onnx")
    assert r"ids\x1b[2J\nverdict: pass" in result.out
    assert "\x1b" not in result.out + result.err
    assert not any(line.startswith("verdict") for line in result.out.splitlines())
    result = cli("inspect", tmp_path / "a\x1b[2Jb")
    assert result.code == 2
    assert "\x1b" not in result.err


def test_export_and_verify(cli: Any, llama_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    result = cli("export", llama_checkpoint, "-o", target, "--dtype", "fp16", "--json")
    assert result.code == 0, result.err
    assert result.json["dtype"] == "fp16"
    assert result.json["norms"] == 5
    assert [f.name for f in onnx.load(target).functions] == ["IBNormL", "SkipIBNormL"]
    result = cli("verify", target, llama_checkpoint, "--samples", 2, "--json")
    assert result.code == 0, result.err
    assert result.json["verdict"] == "pass"
    assert result.json["static"]["verdict"] == result.json["numeric"]["verdict"] == "pass"
    assert "explicit Casts" in result.json["numeric"]["method"]
    output = result.json["numeric"]["outputs"][0]
    assert output["name"] == "logits"
    assert 0 < output["error"] <= output["tolerance"]


def test_verify_prints_every_figure(cli: Any, exported: Path, llama_checkpoint: Path) -> None:
    result = cli("verify", exported, llama_checkpoint)
    assert result.code == 0, result.err
    for word in ("logits", "max abs", "rel. error", "baseline error", "ratio", "cosine", "top-1", "verdict: pass"):
        assert word in result.out


def test_verify_layers_and_the_page(cli: Any, exported: Path, llama_checkpoint: Path, tmp_path: Path) -> None:
    result = cli("verify", exported, llama_checkpoint, "--samples", 1, "--layers", "--report", tmp_path / "r.html")
    assert result.code == 0, result.err
    assert "no step exceeds its tolerance" in result.out
    assert "all are within their tolerance" in result.out
    assert "model.layers.1.post_attention_layernorm" in result.out
    assert "Error by depth" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_baseline_is_saved_and_compared(cli: Any, exported: Path, tmp_path: Path) -> None:
    kept = tmp_path / "a.json"
    result = cli("bench", exported, "--seq", 4, "--rounds", 12, "--save-baseline", kept)
    assert result.code == 0, result.err
    content = json.loads(kept.read_text(encoding="utf-8"))
    assert len(content["times_ms"]) == len(content["reference_ms"]) == 12
    slow = tmp_path / "b.json"
    slow.write_text(json.dumps({**content, "times_ms": [100 * t for t in content["times_ms"]]}), encoding="utf-8")
    result = cli("compare", kept, slow, "--report", tmp_path / "r.html", "--json")
    assert result.code == 1
    assert result.json["verdict"] == "fail"
    assert result.json["ratio"] > 10
    assert "Time over the reference load" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert cli("compare", slow, kept).code == 0


def test_a_failed_verdict_is_exit_1_and_prints_the_finding(
    cli: Any, exported: Path, llama_checkpoint: Path, tmp_path: Path
) -> None:
    proto = onnx.load(exported)
    node = next(n for n in proto.graph.node if n.op_type == "IBNormL")
    next(a for a in node.attribute if a.name == "lambd").f = 4.1
    onnx.save(proto, tmp_path / "bad.onnx")
    result = cli("verify", tmp_path / "bad.onnx", llama_checkpoint, "--json")
    assert result.code == 1
    assert result.json["verdict"] == "fail"
    assert result.json["static"]["verdict"] == "fail"
    assert node.name in result.json["static"]["findings"][0]["where"]
    result = cli("verify", tmp_path / "bad.onnx", llama_checkpoint)
    assert result.code == 1
    assert "verdict: fail" in result.out
    assert "lambd" in result.out


def test_verify_on_the_users_own_inputs(cli: Any, exported: Path, llama_checkpoint: Path, tmp_path: Path) -> None:
    ids = np.arange(12).reshape(2, 6)
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    result = cli("verify", exported, llama_checkpoint, "--inputs", tmp_path / "in.npz", "--json")
    assert result.code == 0, result.err
    assert result.json["numeric"]["samples"] == 1
    assert result.json["numeric"]["outputs"][0]["elements"] == 12 * 256
    np.savez(tmp_path / "wrong.npz", input_ids=ids)
    result = cli("verify", exported, llama_checkpoint, "--inputs", tmp_path / "wrong.npz")
    assert result.code == 2
    assert "attention_mask" in result.err


def test_bench(cli: Any, exported: Path, llama_checkpoint: Path) -> None:
    result = cli(
        "bench", exported, "--checkpoint", llama_checkpoint, "--against", "torch", "--seq", 16, "--rounds", 3, "--json"
    )
    assert result.code == 0, result.err
    report = result.json
    assert [latency["name"] for latency in report["latencies"]] == ["ort-cpu", "torch"]
    assert all(0 < x["p50_ms"] <= x["p90_ms"] <= x["p99_ms"] for x in report["latencies"])
    assert report["ratios"][0]["p25"] <= report["ratios"][0]["median"] <= report["ratios"][0]["p75"]
    assert {"name": "input_ids", "dtype": "int64", "shape": [1, 16]} in report["inputs"]
    assert report["environment"]["processor"]


def test_inspect_reads_files_and_checkpoints(cli: Any, exported: Path, llama_checkpoint: Path) -> None:
    file = cli("inspect", exported, "--json").json
    checkpoint = cli("inspect", llama_checkpoint, "--json").json
    assert [n["module"] for n in file["norms"]] == [n["module"] for n in checkpoint["norms"]]
    assert file["metadata"]["source_sha256"] == checkpoint["source_sha256"]
    assert file["functions"] == ["ai.ibnorm::IBNormL", "ai.ibnorm::SkipIBNormL"]
    assert "norms" in cli("inspect", exported).out


def _metadata(key: str, text: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        kept = [entry for entry in proto.metadata_props if entry.key != f"ibnorm.{key}"]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
        proto.metadata_props.add(key=f"ibnorm.{key}", value=text)

    return change


def _type_of_an_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = 99


def _type_of_a_weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 99


def _place_of_a_weight(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="a\0b")


def _lambda_in_words(proto: onnx.ModelProto) -> None:
    norm = next(node for node in proto.graph.node if node.domain == "ai.ibnorm")
    next(a for a in norm.attribute if a.name == "lambd").CopyFrom(onnx.helper.make_attribute("lambd", "4.0"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_type_of_an_input, "'input_ids' has element type 99"),
        (_type_of_a_weight, "has element type 99"),
        (_place_of_a_weight, "which is not a valid file name"),
        (_lambda_in_words, "lambd of the norm model.layers.0.input_layernorm is '4.0'; it must be a number"),
        (_metadata("config", "[" * 100_000), "'ibnorm.config' is not valid JSON"),
        (_metadata("packed", "[1, 2]"), "metadata 'packed' is [1, 2]"),
        (_metadata("packed", '{"patch": 5}'), "metadata 'packed' is {'patch': 5}"),
        (_metadata("packed", '{"patch": [5]}'), "it must be an object of lists of names"),
        (_metadata("quantization", '"int8"'), "metadata 'quantization' is 'int8'"),
        (_metadata("quantization", '{"bits": 3}'), "whose bits are 4 or 8"),
    ],
)
def test_a_damaged_file_is_bad_input(
    cli: Any, exported: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    proto = onnx.load(exported)
    change(proto)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    result = cli("inspect", tmp_path / "m.onnx")
    assert result.code == 2, result.err
    assert message in result.err
    assert len(messages(result.err)) == 1


def test_a_config_is_not_a_model_file(cli: Any, llama_checkpoint: Path) -> None:
    """onnx.load would read it as a model in JSON because of its suffix."""
    result = cli("verify", llama_checkpoint / "config.json", llama_checkpoint)
    assert result.code == 2
    assert "config.json is truncated or is not an ONNX file" in result.err


def test_doctor(cli: Any) -> None:
    result = cli("doctor", "--json")
    assert result.code == 0, result.err
    checks = {check["name"]: check for check in result.json["checks"]}
    assert checks["ONNX Runtime"]["works"]
    assert all(check["works"] or check["remedy"] for check in checks.values()), "every failed check needs a remedy"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("verify", "missing.onnx", "nowhere"), 2, "'missing.onnx' does not exist"),
        (("export", "nowhere", "-o", "x.onnx"), 2, "'nowhere' does not exist"),
        (("inspect", "nowhere"), 2, "'nowhere' does not exist"),
        (("export",), 2, "CHECKPOINT"),
        (("frobnicate",), 2, "frobnicate"),
        (("verify", "--frobnicate"), 2, "--frobnicate"),
        (("export", "x", "-o", "y", "--dtype", "fp8"), 2, "fp8"),
        (("demo", "--max-steps", "0"), 2, "--max-steps"),
        (("demo", "--text", "nowhere.txt"), 2, "nowhere.txt"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*words)
    assert result.code == code
    assert message in result.err
    assert len(messages(result.err)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_utf8_is_not_a_text(
    cli: Any, exported: Path, llama_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("na\u00efve".encode("latin-1"))
    for words in (("verify", exported, llama_checkpoint), ("analyze", llama_checkpoint)):
        result = cli(*words, "--text", text)
        assert result.code == 2
        assert "not UTF-8 text" in result.err


def test_options_that_do_not_apply_to_a_text_folder_are_refused(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").touch()
    for words in (("--require-fused",), ("--save-baseline", tmp_path / "b.json"), ("--model", "a:b")):
        result = cli("bench", tmp_path, *words)
        assert result.code == 2
        assert "generates text" in " ".join(result.err.split())


def test_the_next_step_after_a_benchmark_is_one_that_the_file_takes(exported: Path, tmp_path: Path) -> None:
    """--save-baseline is not suggested for a folder that generates text, which refuses it."""
    baseline = tmp_path / "b.json"
    assert _following(exported, None, None)[-4:] == ["--checkpoint", "CHECKPOINT", "--against", "torch"]
    assert _following(exported, tmp_path, None) == ["bench", exported, "--save-baseline", f"{exported.stem}.json"]
    assert _following(exported, tmp_path, baseline) == ["compare", baseline, "LATER.json"]
    (tmp_path / "genai_config.json").touch()
    assert _following(tmp_path, tmp_path, None) == ["generate", tmp_path, "PROMPT"]


def test_generate_refuses_a_single_file(cli: Any, exported: Path) -> None:
    result = cli("generate", exported, "--prompt", "a")
    assert result.code == 2
    assert "--task text-generation" in result.err


def test_an_error_with_json_is_json(cli: Any) -> None:
    result = cli("verify", "missing.onnx", "nowhere", "--json")
    assert result.code == 2
    assert result.json["exit_code"] == 2
    assert "missing.onnx" in result.json["error"]["message"]


def test_unknown_backend_and_candidate(cli: Any, exported: Path, llama_checkpoint: Path) -> None:
    assert cli("verify", exported, llama_checkpoint, "--backend", "abacus").code == 2
    result = cli("bench", exported, "--against", "abacus")
    assert result.code == 2
    assert "torch.compile" in result.err
    assert "--checkpoint" in cli("bench", exported, "--against", "torch").err


def test_a_sequence_longer_than_the_positions_is_refused(cli: Any, exported: Path) -> None:
    longest = ExportedModel(exported).metadata.max_positions
    result = cli("bench", exported, "--seq", longest + 1, "--rounds", 1)
    assert result.code == 2
    assert f"has {longest} positions, fewer than a sequence of {longest + 1}" in result.err
    for words in ((), ("--seq", longest)):  # the default, 128, is more than it has
        result = cli("bench", exported, *words, "--rounds", 1, "--json")
        assert result.json["inputs"][0]["shape"] == [1, longest]


def test_bf16_cannot_be_timed_on_a_cpu(cli: Any, exports: SharedExports) -> None:
    result = cli("bench", exports("llama", dtype="bf16").path)
    assert result.code == 3
    assert "bfloat16" in result.err


def test_a_missing_runtime_is_exit_3(cli: Any, exported: Path, llama_checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "ibnorm_export.runtimes.ort", raising=False)
    result = cli("verify", exported, llama_checkpoint)
    assert result.code == 3, result.err
    assert "pip install 'ibnorm-export[cpu]'" in result.err


def test_an_unexpected_error_is_exit_70(cli: Any, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ibnorm_export import inspection

    def broken(path: Path) -> dict[str, Any]:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(inspection, "inspect_file", broken)
    result = cli("inspect", exported)
    assert result.code == 70
    assert "planted" in result.err
    assert len(messages(result.err)) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(signum: int, llama_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import torch.onnx\n"
        "torch.onnx.export = hold\n"
        "from ibnorm_export.cli.__main__ import run\n"
        f"sys.argv = ['ibnorm-export', 'export', {str(llama_checkpoint)!r}, '-o', {str(tmp_path / 'm.onnx')!r}]\n"
        "run()\n"
    )
    with held_process(code) as process:
        process.send_signal(signum)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_a_report_does_not_replace_a_file_of_another_kind(
    cli: Any, exported: Path, llama_checkpoint: Path, tmp_path: Path
) -> None:
    """This is checked before the work whose result would be written."""
    config = tmp_path / "config.json"
    config.write_text("{}")
    for words, message in (
        (("verify", exported, llama_checkpoint, "--report", exported), "does not end in .html"),
        (("verify", exported, llama_checkpoint, "--report", tmp_path / "no" / "x.html"), "no does not exist"),
        (("analyze", llama_checkpoint, "--report", config), "does not end in .html"),
        (("compare", config, config, "--report", config), "does not end in .html"),
        (("bench", exported, "--save-baseline", config), "would be lost: "),
        (("bench", exported, "--save-baseline", exported), "does not end in .json"),
    ):
        result = cli(*words)
        assert result.code == 2
        assert message in result.err
    assert config.read_text() == "{}"


def test_a_report_keeps_its_lines_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal folds a line where it must; numbers are not broken, and nothing is cut."""
    monkeypatch.setattr(console, "out", Console(width=40, soft_wrap=True, file=io.StringIO()))
    line = "model.layers.0.post_attention_layernorm  1.23456e-07  2.34567e-06  " + "/long" * 40
    console.print_report(line)
    assert console.out.file.getvalue() == f"{line}\n"  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.parametrize("words", [("verify", "FILE", "EMPTY"), ("bench", "FILE", "--checkpoint", "EMPTY")])
def test_a_missing_backend_is_reported_before_the_checkpoint_is_read(
    cli: Any, exported: Path, tmp_path: Path, *, words: tuple[str, ...]
) -> None:
    command = [{"FILE": exported, "EMPTY": tmp_path}.get(word, word) for word in words]
    result = cli(*command, "--backend", "ort-web", "--npm", tmp_path)
    assert result.code == 3
    assert "needs the npm package onnxruntime-web" in result.err or "no `node` on PATH" in result.err
