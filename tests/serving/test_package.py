"""The repository that `package` writes, read with Triton's own message type and compared with the ONNX file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import BackendUnavailable, ExportError, IBNormError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.op import native
from ibnorm_export.serving.triton.config import TritonLimits
from ibnorm_export.serving.triton.options import PackagedNorms, PackageOptions, RepositoryFormat, TritonBackend
from ibnorm_export.serving.triton.repository import package


def read_config(folder: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())


def check_against_onnx(folder: Path) -> model_config_pb2.ModelConfig:
    """Compare names, types and dims of a config with the file that it serves."""
    config = read_config(folder)
    assert config.name == folder.name
    graph = onnx.load(folder / "1" / config.default_model_filename, load_external_data=False).graph
    skipped = 1 if config.max_batch_size else 0
    weights = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in weights]
    for told, found in ((config.input, values), (config.output, graph.output)):
        assert [item.name for item in told] == [value.name for value in found]
        for item, value in zip(told, found, strict=True):
            tensor = value.type.tensor_type
            name = model_config_pb2.DataType.Name(item.data_type).removeprefix("TYPE_")
            assert triton_to_np_dtype(name) == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            dims = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
            assert list(item.dims) == dims[skipped:]
            assert not skipped or dims[0] == -1
    return config


@pytest.mark.parametrize("form", ["genai", "static"])
def test_a_text_folder_becomes_a_model_of_one_step(
    form: str, llama_checkpoint: Path, noise: Path, tmp_path: Path
) -> None:
    """The client keeps the cache as tensors: every axis except batch and lengths has a fixed size."""
    if form == "genai":
        exported = ExportedModel(noise)
    else:
        model = models.load(llama_checkpoint, task="text-generation")
        exported = export_folder(model, tmp_path / form, options=ExportOptions(cache="static"))
    made = package(exported, tmp_path / "repository", options=PackageOptions(variant=PackagedNorms.PORTABLE))
    config = check_against_onnx(made.path / made.models[0])
    caches = [item for item in config.input if item.name.startswith("past_key_values.")]
    assert caches
    assert all(item.dims[-1] > 0 for item in caches)
    readme = (made.path / "README.md").read_text(encoding="utf-8")
    if form == "static":  # TensorScatter
        assert "tritonserver:26.07-py3" in made.start
        assert "needs ONNX Runtime 1.25 or later, which containers have from 26.07 on" in readme
    else:
        assert "No container up to 26.07 has it (1.27.0)" in readme


@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_config_agrees_with_the_model(
    name: str, dtype: DType, exported: dict[str, ExportedModel], tmp_path: Path
) -> None:
    model = exported[f"{name}-{dtype.value}"]
    limits = TritonLimits(max_batch=4, max_queue=16, queue_timeout_ms=500, queue_delay_us=70, instances=3)
    made = package(model, tmp_path / "repository", options=PackageOptions(variant=PackagedNorms.BOTH, limits=limits))
    assert made.models == (name, f"{name}-portable")
    for variant in made.models:
        config = check_against_onnx(made.path / variant)
        assert config.max_batch_size == 4
        policy = config.dynamic_batching.default_queue_policy
        assert (policy.max_queue_size, policy.default_timeout_microseconds) == (16, 500_000)
        assert policy.timeout_action == policy.REJECT
        assert config.dynamic_batching.max_queue_delay_microseconds == 70
        assert [(group.count, group.kind) for group in config.instance_group] == [(3, 2)]  # KIND_CPU
        assert TritonLimits().instances == 2, "with one and a queue limit, Triton 2.51 stands still between two batches"
        library = list(config.model_operations.op_library_filename)
        assert library == ([f"/models/{name}/libibnorm_ort.so"] if variant == name else [])
        assert (made.path / variant / "libibnorm_ort.so").exists() == bool(library)
        warmup = config.model_warmup[0]
        assert warmup.batch_size == 1
        assert set(warmup.inputs) == {tensor.name for tensor in model.inputs}
        for tensor in config.input:
            given = warmup.inputs[tensor.name]
            data = made.path / variant / "warmup" / given.input_data_file
            kind = triton_to_np_dtype(model_config_pb2.DataType.Name(given.data_type).removeprefix("TYPE_"))
            assert data.stat().st_size == np.prod(given.dims) * np.dtype(kind).itemsize


def test_manifest_names_every_file(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "repository", options=PackageOptions(variant=PackagedNorms.FUSED))
    manifest = json.loads((made.path / "manifest.json").read_text())
    on_disk = {str(f.relative_to(made.path)) for f in made.path.rglob("*") if f.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((made.path / name).read_bytes()).hexdigest() == entry["sha256"]
    schema = native.availability().schema
    assert manifest["libraries"] == {"vit/libibnorm_ort.so": {"machine": "x86_64", "schema": schema}}


def test_external_data_is_copied(llama_checkpoint: Path, tmp_path: Path) -> None:
    exported = export_folder(models.load(llama_checkpoint, task="text-generation"), tmp_path / "llama")
    proto = onnx.load(exported.path)
    onnx.save(proto, exported.path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    made = package(ExportedModel(tmp_path / "llama"), tmp_path / "repository")
    assert made.models == ("llama",)
    config = check_against_onnx(made.path / "llama")
    assert {tuple(t.dims) for t in config.input if t.name.startswith("past")} == {(2, -1, 8)}
    assert onnx.load(made.path / "llama" / "1" / "model.onnx") == onnx.load(exported.path)
    assert (made.path / "llama" / "1" / "weights.bin").is_file()


def test_your_own_inputs_for_the_warm_up(exported_vit: ExportedModel, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).standard_normal((2, 1, 8, 8), dtype=np.float32)
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(warmup={"pixel_values": pixels}))
    assert (made.path / "vit" / "warmup" / "0.bin").read_bytes() == pixels[:1].tobytes()


def test_no_batching_if_the_first_axes_differ(exported_vit: ExportedModel, tmp_path: Path) -> None:
    proto = onnx.load(exported_vit.path)
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    onnx.save(proto, tmp_path / "vit.onnx")
    made = package(ExportedModel(tmp_path / "vit.onnx"), tmp_path / "r")
    config = check_against_onnx(made.path / "vit")
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 1, 8, 8]


def test_kserve(exported_vit: ExportedModel, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="transformers brings pyyaml; without it there is nothing to parse with")
    options = PackageOptions(
        RepositoryFormat.KSERVE, name="Digits_1", variant=PackagedNorms.FUSED, storage_uri="s3://bucket/digits"
    )
    made = package(exported_vit, tmp_path / "r", options=options)
    service = yaml.safe_load((made.path / "inferenceservice.yaml").read_text())
    assert service["metadata"]["name"] == "digits-1"
    served = service["spec"]["predictor"]["model"]
    assert served["modelFormat"] == {"name": "triton"}
    assert served["storageUri"] == "s3://bucket/digits"
    library = list(read_config(made.path / "Digits_1").model_operations.op_library_filename)
    assert library == ["/mnt/models/Digits_1/libibnorm_ort.so"]
    assert "--model-repository=/mnt/models" in (made.path / "README.md").read_text()


def test_bf16_is_refused_with_a_remedy(llama_checkpoint: Path, tmp_path: Path) -> None:
    model = export(models.load(llama_checkpoint), tmp_path / "llama.onnx", options=ExportOptions(dtype=DType.BF16))
    with pytest.raises(ExportError, match=r"logits is bf16.*--dtype fp16 or fp32"):
        package(model, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def write_plan(folder: Path, model: ExportedModel, **changes: object) -> Path:
    """Write a plan with a description like that of `build-engine`; its bytes are never read."""
    plan = folder / "vit.plan"
    plan.write_bytes(b"plan")
    description = {
        "source": model.path.name,
        "source_sha256": hashlib.sha256(model.path.read_bytes()).hexdigest(),
        "runtime": "tensorrt",
        "runtime_version": "10.14",
        "gpu": None,
        "compute_capabilities": "the runtime's default",
        "profiles": [
            {"name": "default", "ranges": [{"axis": "batch_size", "smallest": 1, "optimal": 1, "largest": 3}]}
        ],
        "norm": "function",
        "why": "as requested",
        "norms": [],
        "build_s": 1.0,
        "size_bytes": 4,
        "sha256": hashlib.sha256(b"plan").hexdigest(),
        **changes,
    }
    (folder / "vit.plan.json").write_text(json.dumps(description))
    return plan


def test_tensorrt(exported_vit: ExportedModel, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, exported_vit)
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(backend=TritonBackend.TENSORRT, plan=plan))
    config = read_config(made.path / "vit")
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("tensorrt", "model.plan", 3)
    assert config.instance_group[0].kind == 1  # KIND_GPU
    assert (made.path / "vit" / "1" / "model.plan").read_bytes() == b"plan"
    assert "--gpus=all" in made.start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "tensorrt-rtx"}, "Triton does not run"),
        ({"sha256": "0"}, "is not the engine that"),
        ({"source_sha256": "0"}, "was built from a different file"),
    ],
)
def test_plans_that_cannot_be_served(
    changes: dict[str, object], message: str, exported_vit: ExportedModel, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, exported_vit, **changes)
    with pytest.raises(ExportError, match=message):
        package(exported_vit, tmp_path / "r", options=PackageOptions(backend=TritonBackend.TENSORRT, plan=plan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../other"}, "name is"),
        ({"name": "12"}, "name is"),
        ({"name": ""}, "name is"),
        ({"mount": "models"}, "absolute path on the server"),
        ({"mount": "/models/../etc"}, "absolute path on the server"),
        ({"backend": TritonBackend.TENSORRT}, "belong together"),
        ({"plan": Path("x.plan")}, "belong together"),
        ({"storage_uri": 's3://a"b'}, "must have no quotes"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        PackageOptions(**options)  # type: ignore[arg-type]  # wrong on purpose


def test_limits_out_of_range() -> None:
    with pytest.raises(ExportError, match="max_queue is 0; it must be at least 1"):
        TritonLimits(max_queue=0)


def test_other_files_in_the_folder_are_not_replaced(exported_vit: ExportedModel, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ExportError, match=r"has no manifest\.json"):
        package(exported_vit, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    first = package(exported_vit, tmp_path / "r", options=PackageOptions(name="a"))
    package(exported_vit, first.path, options=PackageOptions(name="b"))
    assert sorted(f.name for f in first.path.iterdir() if f.is_dir()) == ["b"]
    assert not [f for f in tmp_path.iterdir() if f.name.endswith(".partial")]


def test_an_edited_config_is_not_replaced(exported_vit: ExportedModel, tmp_path: Path) -> None:
    made = package(exported_vit, tmp_path / "r", options=PackageOptions(name="a"))
    config = made.path / "a" / "config.pbtxt"
    edited = config.read_text() + "# tuned\n"
    config.write_text(edited)
    with pytest.raises(ExportError, match=r"a/config\.pbtxt was edited after packaging"):
        package(exported_vit, tmp_path / "r", options=PackageOptions(name="a"))
    assert config.read_text() == edited
    config.unlink()
    package(exported_vit, tmp_path / "r", options=PackageOptions(name="a"))
    assert config.read_text() + "# tuned\n" == edited


def test_fused_kernels_need_the_library(
    exported_vit: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = native.NativeLibrary(None, problem="not here", remedy="build it")
    monkeypatch.setattr(native, "availability", lambda: gone)
    with pytest.raises(BackendUnavailable, match="not here; build it; or package with --variant portable"):
        package(exported_vit, tmp_path / "r", options=PackageOptions(variant=PackagedNorms.FUSED))
    made = package(exported_vit, tmp_path / "r")
    assert made.manifest["models"] == {"vit": "portable"}


def test_fused_kernels_need_norms(exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path) -> None:
    plain = export(models.load(vit_checkpoint), tmp_path / "vit.onnx", options=ExportOptions(inline=True))
    with pytest.raises(IBNormError, match="no IBNorm node"):
        package(plain, tmp_path / "r", options=PackageOptions(variant=PackagedNorms.FUSED))
    assert package(plain, tmp_path / "r").manifest["models"] == {"vit": "portable"}
