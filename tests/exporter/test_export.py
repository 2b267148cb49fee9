"""Export: what is in the file, that it runs and verifies, and that nothing half-written is ever left."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from ibnorm_export import IBNormSpec, NormConfig, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import ModelMetadata
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import ExportError, ModelFileError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.runtimes.ort import OrtRunner
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import VIT
from tests.support.held_process import held_process

MODULE = sys.modules["ibnorm_export.exporter.export"]


@pytest.fixture(scope="session", params=["llama", "vit"])
def pair(request: pytest.FixtureRequest) -> tuple[ExportedModel, Path]:
    """The fp32 export and the checkpoint of each family in turn."""
    return request.getfixturevalue(f"exported_{request.param}"), request.getfixturevalue(f"{request.param}_checkpoint")


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- what is in the file ----


def test_one_node_per_norm_with_everything_spelled_out(pair: tuple[ExportedModel, Path]) -> None:
    exported, checkpoint = pair
    model = models.load(checkpoint)
    assert [n.module for n in exported.norms] == sorted(model.norms, key=list(model.norms).index)
    for norm in exported.norms:
        spec: IBNormSpec = model.norms[norm.module]
        assert (norm.op_type.removeprefix("Skip"), norm.name) == (spec.op_type, norm.module)
        assert norm.attributes == {
            "lambd": float(np.float32(spec.lambd)),
            "epsilon": float(np.float32(spec.epsilon)),
            "axis": -1,
            "plugin_namespace": "",
        }
        assert norm.scale == f"{norm.module}.weight"
        assert norm.bias == (f"{norm.module}.bias" if spec.bias else "ibnorm.zeros.32")
    skip = [norm.module for norm in exported.norms if norm.op_type.startswith("Skip")]
    behind_a_residual = r"post_attention_layernorm|layernorm_after|layers\.1\.(input_layernorm|layernorm_before)"
    assert skip == [path for path in model.norms if re.search(behind_a_residual, path)]
    assert [f.name for f in exported.proto.functions] == sorted({norm.op_type for norm in exported.norms})
    assert {o.domain for o in exported.proto.opset_import} == {"", "ai.ibnorm"}
    assert exported.opset == model.opset == {"llama": 23, "vit": 20}[model.family]


def test_initializers_are_called_as_in_the_state_dict(pair: tuple[ExportedModel, Path]) -> None:
    exported, checkpoint = pair
    state = models.load(checkpoint).module.state_dict()
    stored = {name.removesuffix(".T"): name for name in exported.weights if name.removesuffix(".T") in state}
    assert set(stored) == set(state)
    for name, as_stored in stored.items():
        expected = state[name].numpy()
        np.testing.assert_array_equal(exported.array(as_stored), expected.T if as_stored.endswith(".T") else expected)
    others = {n for n in exported.weights if n.removesuffix(".T") not in state and not n.startswith("ibnorm.")}
    assert all(exported.array(n).size <= 64 for n in others), "no weight hides under another name"


def test_names_are_ready_for_serving(exported_llama: ExportedModel, exported_vit: ExportedModel) -> None:
    assert [(t.name, t.dtype, t.shape) for t in exported_llama.inputs] == [
        ("input_ids", "int64", ("batch", "sequence")),
        ("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert [(t.name, t.dtype, t.shape) for t in exported_llama.outputs] == [
        ("logits", "fp32", ("batch", "sequence", 256))
    ]
    assert [(t.name, t.dtype, t.shape) for t in exported_vit.inputs] == [("pixel_values", "fp32", ("batch", 1, 8, 8))]
    assert [(t.name, t.dtype, t.shape) for t in exported_vit.outputs] == [("logits", "fp32", ("batch", 10))]


def test_the_file_describes_itself(pair: tuple[ExportedModel, Path]) -> None:
    exported, checkpoint = pair
    model = models.load(checkpoint)
    found = exported.require_metadata()
    assert (found.family, found.dtype, found.task, found.inlined) == (
        model.family,
        "fp32",
        "forward",
        False,
    )
    assert found.source_sha256 == model.source_sha256
    assert found.config == json.loads((checkpoint / "config.json").read_text())["ibnorm"]
    assert found.norms == {path: spec.to_config() for path, spec in model.norms.items()}
    assert found.versions["torch"] == torch.__version__
    text = exported.path.read_bytes()
    for trace in (str(checkpoint), str(Path.cwd()), "site-packages", "pkg.torch"):
        assert trace.encode() not in text, "where it was made does not show"


def test_two_exports_are_byte_identical(pair: tuple[ExportedModel, Path], tmp_path: Path) -> None:
    """In this process, and in another with another hash seed, folder and file name."""
    exported, checkpoint = pair
    code = (
        "import sys\nfrom ibnorm_export import models\nfrom ibnorm_export.exporter.export import export\n"
        f"export(models.load({str(checkpoint)!r}), sys.argv[1])\n"
    )
    other = tmp_path / "another name.onnx"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, cwd=tmp_path, env=environment)
    again = export(models.load(checkpoint), tmp_path / "again.onnx")
    assert again.path.read_bytes() == exported.path.read_bytes()
    assert other.read_bytes() == exported.path.read_bytes()


def test_batch_and_sequence_are_dynamic(exported_llama: ExportedModel, exported_vit: ExportedModel) -> None:
    llama, vit = OrtRunner(exported_llama.path, threads=1), OrtRunner(exported_vit.path, threads=1)
    for batch, sequence in ((1, 1), (1, 64), (5, 3), (2, 17)):
        ids = np.arange(batch * sequence).reshape(batch, sequence) % 256
        assert llama.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].shape == (
            batch,
            sequence,
            256,
        )
        assert vit.run({"pixel_values": np.zeros((batch, 1, 8, 8))})["logits"].shape == (batch, 10)


# ---- options ----


@pytest.mark.parametrize("opset", [18, 20, 23, 24])
def test_every_opset_verifies(checkpoint: Path, opset: int, tmp_path: Path) -> None:
    model = models.load(checkpoint)
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(opset=opset))
    assert exported.opset == opset
    assert {o.version for f in exported.proto.functions for o in f.opset_import if o.domain == ""} == {opset}
    report = verify(exported, model, options=VerifyOptions(samples=2))
    assert report, report.findings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions(opset=17), "opset is 17; it must be 18 to 26"),
        (ExportOptions(opset=27), "opset is 27"),
        (ExportOptions(opset=-1), "opset is -1"),
    ],
)
def test_an_illegal_option_is_named(vit_checkpoint: Path, tmp_path: Path, options: ExportOptions, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        export(models.load(vit_checkpoint), tmp_path / "m.onnx", options=options)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(("family", "dtype"), [("vit", DType.FP32), ("llama", DType.FP16)])
def test_an_inlined_file_needs_no_function(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, dtype: DType
) -> None:
    model = models.load(request.getfixturevalue(f"{family}_checkpoint"))
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(inline=True, dtype=dtype))
    assert not exported.proto.functions
    assert {n.domain for n in exported.proto.graph.node} == {""}
    assert {o.domain for o in exported.proto.opset_import} == {""}
    report = verify(exported, model)
    assert report, report.findings


@pytest.mark.parametrize(
    ("family", "dtype", "elem"),
    [("llama", DType.BF16, onnx.TensorProto.BFLOAT16), ("vit", DType.FP16, onnx.TensorProto.FLOAT16)],
)
def test_half_types(request: pytest.FixtureRequest, tmp_path: Path, family: str, dtype: DType, elem: int) -> None:
    model = models.load(request.getfixturevalue(f"{family}_checkpoint"))
    state = model.module.state_dict()
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(dtype=dtype))
    assert exported.dtype == exported.metadata.dtype == dtype.value
    assert {exported.weights[n].data_type for n in exported.weights if n.removesuffix(".T") in state} == {elem}
    (logits,) = exported.outputs
    assert logits.dtype == dtype.value
    known = {v.name: v.type.tensor_type.elem_type for v in exported.proto.graph.value_info}
    assert {known[n.output[0]] for n in exported.proto.graph.node if n.domain and n.output[0] in known} == {elem}


def test_layer_rules_and_no_affine(tmp_path: Path) -> None:
    """Norms of three kinds in one model; ones and zeros are shared, LayerNorm stays LayerNormalization."""
    config = NormConfig.from_config(
        {
            "compression": "S",
            "lambda": 4.0,
            "epsilon": 1e-5,
            "convention": "divide",
            "scale": False,
            "bias": False,
            "layers": [
                {"match": "vit.layers.0.*", "compression": "L", "scale": True, "bias": True},
                {"match": "*.layernorm_after", "norm": "layernorm", "scale": True, "bias": True},
            ],
        }
    )
    models.save(models.new_model(VIT, config), tmp_path / "c")
    model = models.load(tmp_path / "c")
    exported = export(model, tmp_path / "m.onnx")
    assert [(n.module, n.op_type, n.scale, n.bias) for n in exported.norms] == [
        (
            "vit.layers.0.layernorm_before",
            "IBNormL",
            "vit.layers.0.layernorm_before.weight",
            "vit.layers.0.layernorm_before.bias",
        ),
        ("vit.layers.1.layernorm_before", "SkipIBNormS", "ibnorm.ones.32", "ibnorm.zeros.32"),
        ("vit.layernorm", "IBNormS", "ibnorm.ones.32", "ibnorm.zeros.32"),
    ]
    assert exported.operators["LayerNormalization"] == 2
    assert sorted(f.name for f in exported.proto.functions) == ["IBNormL", "IBNormS", "SkipIBNormS"]
    report = verify(exported, model)
    assert report, report.findings


# ---- external data ----


@pytest.fixture(scope="module")
def built(vit_checkpoint: Path) -> ir.Model:
    """A model in memory, so that tests of writing need not trace it again."""
    return MODULE.build(models.load(vit_checkpoint), ExportOptions())


@pytest.fixture
def prebuilt(built: ir.Model, vit_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A checkpoint whose export has only the writing left to do."""
    monkeypatch.setattr(MODULE, "build", lambda *_, **__: built)
    return models.load(vit_checkpoint)


@pytest.fixture
def external(
    prebuilt: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ExportedModel, LoadedModel]:
    monkeypatch.setattr(MODULE, "EXTERNAL_ABOVE_BYTES", 1000)
    (tmp_path / "folder").mkdir()
    return export(prebuilt, tmp_path / "folder" / "m.onnx"), prebuilt


def test_external_data_is_one_file_beside(external: tuple[ExportedModel, LoadedModel]) -> None:
    exported, model = external
    assert left_in(exported.path.parent) == ["m.onnx", "m.onnx.data"]
    weights = sum(t.nbytes for t in model.module.state_dict().values())
    assert exported.size_bytes == sum(p.stat().st_size for p in exported.path.parent.iterdir()) > weights
    assert exported.path.stat().st_size < weights
    report = verify(exported, model)
    assert report, report.findings
    report = verify(exported, model, options=VerifyOptions(backend="reference", samples=1))
    assert report, report.findings
    moved = exported.path.parent.rename(exported.path.parent.parent / "moved") / "m.onnx"
    assert verify(ExportedModel(moved), model), "the pair may be moved together"


def test_external_data_in_half_precision(
    llama_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "EXTERNAL_ABOVE_BYTES", 1000)
    model = models.load(llama_checkpoint)
    exported = export(model, tmp_path / "m.onnx", options=ExportOptions(dtype=DType.BF16))
    report = verify(exported, model, options=VerifyOptions(samples=2))
    assert report, report.findings


def test_an_export_over_an_external_one_leaves_no_mixture(
    external: tuple[ExportedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the two files, there is no file under the target's name; afterwards both are new."""
    exported, model = external
    whole = Path.replace

    def stops_at_the_model(self: Path, target: Path) -> Path:
        if target == exported.path:
            raise KeyboardInterrupt
        return whole(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stops_at_the_model)
        with pytest.raises(KeyboardInterrupt):
            export(model, exported.path)
    assert left_in(exported.path.parent) == ["m.onnx.data"]
    assert verify(export(model, exported.path), model)
    monkeypatch.setattr(MODULE, "EXTERNAL_ABOVE_BYTES", 10**9)
    assert verify(export(model, exported.path), model), "small again"


def set_entry(key: str, value: str) -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_entry("location", "../outside"), "points outside"),
        (set_entry("location", "/etc/passwd"), "points outside"),
        (set_entry("location", ""), "points outside"),
        (set_entry("location", "link"), "points outside"),
        (set_entry("location", "elsewhere.data"), "elsewhere.data is missing"),
        (set_entry("location", "."), "is missing"),
        (set_entry("offset", "999999999"), "truncated"),
        (set_entry("offset", "-4"), "truncated|no valid place"),
        (set_entry("length", "999999999"), "truncated"),
        (set_entry("offset", "nought"), "no valid place"),
    ],
)
def test_hostile_external_data(
    external: tuple[ExportedModel, LoadedModel], change: Callable[[onnx.TensorProto], None], said: str
) -> None:
    path = external[0].path
    (path.parent.parent / "outside").write_bytes(bytes(10**6))
    (path.parent / "link").symlink_to(path.parent.parent / "outside")
    proto = onnx.load(path, load_external_data=False)
    change(next(t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match=said):
        ExportedModel(path)


def test_missing_and_truncated_external_data(external: tuple[ExportedModel, LoadedModel]) -> None:
    path = external[0].path
    data = path.with_name("m.onnx.data")
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ModelFileError, match=r"m\.onnx\.data is truncated"):
        ExportedModel(path)
    data.unlink()
    with pytest.raises(ModelFileError, match=r"m\.onnx\.data is missing"):
        ExportedModel(path)


def test_external_data_shorter_than_its_tensor(external: tuple[ExportedModel, LoadedModel]) -> None:
    """The length that the file claims is not what its shape needs."""
    path = external[0].path
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    set_entry("length", "4")(tensor)
    tensor.dims[0] *= 10**6
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError):
        verify(ExportedModel(path), external[1])


# ---- places that cannot be written, and interruptions ----


def test_a_missing_folder_and_a_folder_as_target(prebuilt: LoadedModel, tmp_path: Path) -> None:
    model = prebuilt
    with pytest.raises(ExportError, match="nowhere does not exist"):
        export(model, tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export(model, tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file"):
        export(model, tmp_path / "file" / "m.onnx")
    assert left_in(tmp_path) == ["file", "folder"]


def test_a_place_without_permission(prebuilt: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere, so say what the system would

        def forbidden(*_: object, **__: object) -> str:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("ibnorm_export.files.tempfile.mkdtemp", forbidden)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ExportError, match=r"m\.onnx: Permission denied"):
            export(prebuilt, tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(0o755)
    assert left_in(tmp_path) == []


def full_disk(model: Any, path: Any, **_: object) -> None:
    Path(path).write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(model: Any, path: Any, **_: object) -> None:
    Path(path).write_bytes(b"half of it")
    raise KeyboardInterrupt


def broken(model: Any, path: Any, **_: object) -> None:
    Path(path).write_bytes(b"half of it")
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize(
    ("save", "raised", "said"),
    [
        (full_disk, ExportError, "No space left on device"),
        (interrupted, KeyboardInterrupt, None),
        (broken, ZeroDivisionError, "planted"),
    ],
)
@pytest.mark.parametrize("old", [b"an older model", None], ids=["over an old file", "new"])
def test_a_failed_write_leaves_what_was_there(
    prebuilt: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Any,
    raised: type[BaseException],
    said: str | None,
    old: bytes | None,
) -> None:
    target = tmp_path / "m.onnx"
    if old is not None:
        target.write_bytes(old)
    monkeypatch.setattr("ibnorm_export.exporter.export.ir.save", save)
    with pytest.raises(raised, match=said):
        export(prebuilt, target)
    assert left_in(tmp_path) == ([] if old is None else ["m.onnx"])
    assert old is None or target.read_bytes() == old


@pytest.mark.parametrize("stage", ["tracing", "simplifying", "writing", "checking"])
def test_ctrl_c_at_any_stage_leaves_nothing(
    request: pytest.FixtureRequest, vit_checkpoint: Path, tmp_path: Path, stage: str
) -> None:
    if stage in ("writing", "checking"):
        request.getfixturevalue("prebuilt")

    def progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(models.load(vit_checkpoint), tmp_path / "m.onnx", progress=progress)
    assert left_in(tmp_path) == []


def test_an_invalid_result_is_not_kept(prebuilt: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("planted")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="does not make a valid model: planted"):
        export(prebuilt, tmp_path / "m.onnx")
    assert left_in(tmp_path) == []


def test_kill_9_leaves_no_file_under_the_target_name(vit_checkpoint: Path, tmp_path: Path) -> None:
    """The process is killed after it has written half of the bytes."""
    target = tmp_path / "m.onnx"
    code = (
        "import pathlib\n"
        "import onnx_ir\n"
        "from ibnorm_export import models\n"
        "from ibnorm_export.exporter.export import export\n"
        "save = onnx_ir.save\n"
        "def save_half(model, path, **options):\n"
        "    save(model, path, **options)\n"
        "    path = pathlib.Path(path)\n"
        "    path.write_bytes(path.read_bytes()[:1000])\n"
        "    hold()\n"
        "onnx_ir.save = save_half\n"
        f"export(models.load({str(vit_checkpoint)!r}), {str(target)!r})\n"
    )
    with held_process(code) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    model = models.load(vit_checkpoint)
    assert verify(export(model, target), model), "what the killed process left does not disturb the next export"


# ---- files that are not what they should be ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "truncated or is not an ONNX file"),
        (b"\x00" * 100, "not an ONNX file"),
        (b"PK\x03\x04 a zip, perhaps", "not an ONNX file"),
        (b"{}", "not an ONNX file"),
        (b"Das ist kein Modell.\n" * 50, "not an ONNX file"),
    ],
)
def test_not_onnx(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "m.onnx").write_bytes(text)
    with pytest.raises(ModelFileError, match=said):
        ExportedModel(tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_truncated(exported_vit: ExportedModel, tmp_path: Path, share: float) -> None:
    whole = exported_vit.path.read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelFileError, match="truncated or is not an ONNX file"):
        ExportedModel(tmp_path / "m.onnx")


def test_places_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        ExportedModel(tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="is a folder"):
        ExportedModel(tmp_path)


def test_a_file_of_another_tool(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, ["n"])], [value("y", 1, ["n"])]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    found = ExportedModel(tmp_path / "m.onnx")
    assert (found.metadata, found.norms, found.dtype) == (ModelMetadata.empty(), (), "fp32")
    with pytest.raises(ModelFileError, match="carries no ibnorm metadata"):
        found.require_metadata()


@pytest.mark.parametrize(
    ("key", "value", "said"), [("ibnorm.format", '"99"', "'99'"), ("ibnorm.format", "{", "not valid JSON")]
)
def test_metadata_of_another_format(
    exported_vit: ExportedModel, tmp_path: Path, key: str, value: str, said: str
) -> None:
    proto = onnx.load(exported_vit.path)
    next(p for p in proto.metadata_props if p.key == key).value = value
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=said):
        ExportedModel(tmp_path / "m.onnx").require_metadata()
