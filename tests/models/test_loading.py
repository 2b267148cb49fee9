"""Checkpoints: what is read, what is rejected and with which message, and the float64 reference."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import erf

from ibnorm_export import IBNormSpec, models
from ibnorm_export.errors import CheckpointError
from ibnorm_export.models import LoadedModel
from ibnorm_export.op import reference
from ibnorm_export.verifier.checkpoint.coverage import measure_coverage
from tests.support.checkpoints import LLAMA


@pytest.fixture
def copy(llama_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(llama_checkpoint, tmp_path / "copy"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def assert_rejected(path: Path, *expected: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        models.load(path)
    for words in expected:
        assert words in str(raised.value)


def test_paths(tmp_path: Path) -> None:
    assert_rejected(tmp_path / "nowhere", "nowhere does not exist")
    assert_rejected(tmp_path, "has no config.json")
    (tmp_path / "w.safetensors").touch()
    assert_rejected(tmp_path / "w.safetensors", "--model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**49}, "num_hidden_layers is 1000"),
        ({"num_hidden_layers": 2000}, "num_hidden_layers is 2000, but the weight files have only"),
        ({"num_labels": 10**18}, "num_labels is 1000000000000000000, but the weight files have only"),
        ({"vocab_size": 10**9}, "describes a model of 64,000,0"),
        ({"intermediate_size": 10**9}, "parameters, but its weight files have only"),
    ],
)
def test_a_configuration_far_larger_than_the_weights(copy: Path, settings: dict[str, int], message: str) -> None:
    """Nothing is built that the weights could not fill: it would take all time or memory that there is."""
    change_config(copy, lambda config: config.update(settings))
    assert_rejected(copy, str(copy / "config.json"), message)


@pytest.mark.parametrize("text", ["{", "", "[1]", '"x"', "[" * 100_000])
def test_config_that_is_not_an_object(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    assert_rejected(copy, "JSON")


def test_the_message_about_a_missing_section_shows_an_example(copy: Path) -> None:
    change_config(copy, lambda c: c.pop("ibnorm"))
    assert_rejected(copy, "has no ibnorm section", '"convention": "divide"')


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("compression", "Q", "'Q'"),
        ("convention", "upwards", "'upwards'"),
        ("convention", None, "None"),
        ("lambda", 0, "lambda is 0.0"),
        ("lambda", -2.0, "lambda is -2.0"),
        ("lambda", float("nan"), "lambda is nan"),
        ("epsilon", -1e-5, "epsilon"),
        ("grouping", "diagonal", "diagonal"),
        ("grouping", "batch", "compressed_mean"),
        ("typo", 1, "typo"),
    ],
)
def test_illegal_sections(copy: Path, key: str, value: object, expected: str) -> None:
    change_config(copy, lambda c: c["ibnorm"].__setitem__(key, value))
    assert_rejected(copy, expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model_type", "mamba", "'mamba'"),
        ("hidden_size", "many", "hidden_size"),
        ("num_attention_heads", 0, "cannot build"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "has a quantization_config"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "dynamic"),
    ],
)
def test_illegal_settings(copy: Path, key: str, value: object, expected: str) -> None:
    change_config(copy, lambda c: c.__setitem__(key, value))
    assert_rejected(copy, expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("image_size", [8], "image_size [8]; it must be a number of pixels or [height, width]"),
        ("image_size", [8, 8, 8], "image_size [8, 8, 8]"),
        ("image_size", -8, "image_size -8"),
        ("image_size", None, "image_size None"),
        ("patch_size", [4], "transformers cannot build a vit"),
    ],
)
def test_illegal_settings_of_a_vit(
    vit_checkpoint: Path, tmp_path: Path, key: str, value: object, expected: str
) -> None:
    folder = Path(shutil.copytree(vit_checkpoint, tmp_path / "copy"))
    change_config(folder, lambda c: c.__setitem__(key, value))
    assert_rejected(folder, expected)


def test_weights_that_do_not_fit_are_named(copy: Path) -> None:
    down = "model.layers.0.mlp.down_proj.weight"

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["surplus.weight"] = weights.pop("model.norm.weight")
        weights[down] = weights[down][:, :3].contiguous()

    change_weights(copy, change)
    assert_rejected(copy, "1 missing (model.norm.weight)", "surplus.weight", f"{down}: file (32, 3), model (32, 64)")


def test_nan_in_weights_is_a_warning(copy: Path) -> None:
    change_weights(copy, lambda w: w["model.norm.weight"].fill_(torch.nan))
    (warning,) = models.load(copy).warnings
    assert "model.norm.weight" in warning


def test_truncated_and_foreign_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for text in (whole[:-100], whole[:50], b"", b"\xff" * 64, b"\x00" * 8):
        file.write_bytes(text)
        assert_rejected(copy, "truncated or is not safetensors")
    file.unlink()
    (copy / "pytorch_model.bin").touch()
    assert_rejected(copy, "pytorch_model.bin is empty")


def test_shards(llama_checkpoint: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: weights[n] for n in members}, copy / file, {"format": "pt"})
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, m in parts.items() for n in m}}))
    whole, sharded = models.load(llama_checkpoint).module.state_dict(), models.load(copy).module.state_dict()
    assert all(torch.equal(whole[n], sharded[n]) for n in whole)
    (copy / "b.safetensors").unlink()
    assert_rejected(copy, "names b.safetensors, which is missing")
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    assert_rejected(copy, "points outside its folder")
    index.write_text("[]")
    assert_rejected(copy, "is not an index")


def test_tied_embeddings_and_bfloat16(tmp_path: Path) -> None:
    model = models.new_model({**LLAMA, "tie_word_embeddings": True}, IBNormSpec("L", bias=False)).bfloat16()
    models.save(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = models.load(tmp_path / "tied").module
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_old_weight_names_of_vit_are_accepted(vit_checkpoint: Path) -> None:
    assert any("encoder.layer.0" in n for n in load_file(vit_checkpoint / "model.safetensors")), "what users have"
    assert set(models.load(vit_checkpoint).norms) == {
        *(f"vit.layers.{i}.layernorm_{w}" for i in (0, 1) for w in ("before", "after")),
        "vit.layernorm",
    }


def test_saving_is_atomic_and_replaces_only_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.new_model(LLAMA, IBNormSpec("L", bias=False))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        models.save(model, tmp_path / "mine")
    models.save(model, tmp_path / "c")
    before = (tmp_path / "c" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left"):
        models.save(model, tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "mine"]


# ---- the reference: PyTorch in float64 against a forward pass in NumPy that shares no code with it ----


def weights_of(model: LoadedModel) -> dict[str, np.ndarray]:
    return {name: t.double().numpy() for name, t in model.module.state_dict().items()}


def norm(x: np.ndarray, model: LoadedModel, w: dict[str, np.ndarray], path: str) -> np.ndarray:
    return reference.ibnorm(x, w.get(f"{path}.weight"), bias=w.get(f"{path}.bias"), spec=model.norms[path])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def heads(x: np.ndarray, count: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def llama_forward(model: LoadedModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    w, config = weights_of(model), model.module.config
    sequence = ids.shape[1]
    x = w["model.embed_tokens.weight"][ids]
    size = config.hidden_size // config.num_attention_heads
    frequency = 10000.0 ** -(np.arange(0, size, 2) / size)
    angle = np.tile(np.arange(sequence)[:, None] * frequency, 2)
    sees = np.tril(np.ones((sequence, sequence), bool)) & (mask[:, None, None, :] != 0)

    def rotate(v: np.ndarray) -> np.ndarray:
        half = np.concatenate((-v[..., size // 2 :], v[..., : size // 2]), -1)
        return v * np.cos(angle) + half * np.sin(angle)

    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        h = norm(x, model, w, f"{at}.input_layernorm")
        q = rotate(heads(h @ w[f"{at}.self_attn.q_proj.weight"].T, config.num_attention_heads))
        k = rotate(heads(h @ w[f"{at}.self_attn.k_proj.weight"].T, config.num_key_value_heads))
        v = heads(h @ w[f"{at}.self_attn.v_proj.weight"].T, config.num_key_value_heads)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat(groups, 1), v.repeat(groups, 1)
        score = np.where(sees, q @ k.swapaxes(-1, -2) / np.sqrt(size), -1e30)
        mixed = (softmax(score) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + mixed @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, model, w, f"{at}.post_attention_layernorm")
        gate = h @ w[f"{at}.mlp.gate_proj.weight"].T
        up = h @ w[f"{at}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, model, w, "model.norm") @ w["lm_head.weight"].T


def vit_forward(model: LoadedModel, pixels: np.ndarray) -> np.ndarray:
    w, config = weights_of(model), model.module.config
    p, batch = config.patch_size, len(pixels)
    side = config.image_size // p
    patches = pixels.reshape(batch, -1, side, p, side, p).transpose(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    kernel = w["vit.embeddings.patch_embeddings.projection.weight"]
    x = patches @ kernel.reshape(len(kernel), -1).T + w["vit.embeddings.patch_embeddings.projection.bias"]
    first = np.broadcast_to(w["vit.embeddings.cls_token"], (batch, 1, x.shape[-1]))
    x = np.concatenate((first, x), 1) + w["vit.embeddings.position_embeddings"]

    def linear(h: np.ndarray, path: str) -> np.ndarray:
        return h @ w[f"{path}.weight"].T + w[f"{path}.bias"]

    for i in range(config.num_hidden_layers):
        at = f"vit.layers.{i}"
        h = norm(x, model, w, f"{at}.layernorm_before")
        q, k, v = (heads(linear(h, f"{at}.attention.{n}_proj"), config.num_attention_heads) for n in "qkv")
        mixed = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{at}.attention.o_proj")
        h = linear(norm(x, model, w, f"{at}.layernorm_after"), f"{at}.mlp.fc1")
        x = x + linear(0.5 * h * (1 + erf(h / np.sqrt(2))), f"{at}.mlp.fc2")
    return linear(norm(x, model, w, "vit.layernorm")[:, 0], "classifier")


@pytest.mark.parametrize("index", range(4))
def test_the_reference_is_float64_throughout(checkpoint: Path, index: int) -> None:
    model = models.load(checkpoint)
    inputs = model.sample(np.random.default_rng(index), index)
    truth = model.in_float64()
    tensors = [torch.from_numpy(a).double() if a.dtype == np.float32 else torch.from_numpy(a) for a in inputs.values()]
    with torch.no_grad():
        (got,) = (t.numpy() for t in model.entry(truth)(*tensors))
    if model.family == "llama":
        expected = llama_forward(model, inputs["input_ids"], inputs["attention_mask"])
        seen = inputs["attention_mask"] != 0
        got, expected = got[seen], expected[seen]
    else:
        expected = vit_forward(model, inputs["pixel_values"].astype(np.float64))
    assert np.linalg.norm(got - expected) <= 1e-12 * np.linalg.norm(expected)
    assert measure_coverage(model, truth, inputs=inputs).narrow_operators == frozenset()


def test_coverage_names_operators_that_are_not_float64(llama_checkpoint: Path) -> None:
    model = models.load(llama_checkpoint)
    inputs = model.sample(np.random.default_rng(0), 0)
    partly_float32 = model.in_dtype(torch.float64)
    table = torch.ones(3, dtype=torch.float32)

    def write(*_: object) -> None:
        table.mul_(2.0)

    partly_float32.register_forward_pre_hook(write)
    found = measure_coverage(model, partly_float32, inputs=inputs)
    assert found.narrow_operators
    assert set(found.norms) == set(model.norms)
    assert found.weights == set(model.module.state_dict())


def test_transformers_is_only_imported_where_it_is_needed(llama_checkpoint: Path) -> None:
    """It takes seconds: no model of the user's own code needs it, and no family needs the model of another."""
    code = (
        "import sys\n"
        "from ibnorm_export import models\n"
        "assert 'transformers' not in sys.modules\n"
        f"models.load({str(llama_checkpoint)!r})\n"
        "others = {'vit', 'gpt2', 'resnet'} & {name.split('.')[2] for name in sys.modules if name.startswith("
        "'transformers.models.') and '.modeling_' in name}\n"
        "assert not others, others\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
