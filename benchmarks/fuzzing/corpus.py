"""One good file for each reader of the suite `fuzz`."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.manifest import write_manifest
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.benchmark.baseline import Baseline, write_baseline
from ibnorm_export.exporter.export import export
from ibnorm_export.exporter.text_folder import export_folder
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint
from tests.support.strangers import GPT, LitGPT, LogNorm, save_nanogpt

__all__ = ["NORM", "make_corpus", "write_records", "write_text_files"]

#: What the norms of the training codes compute, as `import --norm` takes it.
NORM: Final = {"compression": "L", "lambda": 2.5, "epsilon": 1e-5, "convention": "multiply"}

_NANOGPT: Final = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 8,
    "bias": False,
    "vocab_size": 9,
    "dropout": 0.0,
}

_LITGPT: Final[dict[str, Any]] = {
    "name": "tiny",
    "hf_config": {},
    "block_size": 8,
    "n_layer": 1,
    "n_embd": 8,
    "n_head": 2,
    "n_query_groups": 1,
    "head_size": 4,
    "vocab_size": 9,
    "padded_vocab_size": 16,
    "intermediate_size": 8,
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-5,
    "parallel_residual": False,
    "shared_attention_norm": False,
    "rotary_percentage": 1.0,
    "rope_base": 5000,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "bias": False,
    "attn_bias": False,
    "sliding_window_size": None,
}

#: A chat template as tokenizers have them.
_TEMPLATE: Final = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}"
    "{% for m in messages %}{% if loop.index0 < 9 %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('too many') }}{% endif %}{% endfor %}"
)

_PREPROCESSOR: Final = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_center_crop": True,
    "crop_size": {"height": 6, "width": 6},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}

_CHAT: Final = {
    "model": "m",
    "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}],
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["a", "b"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "max_tokens": 4,
    "n": 1,
    "logit_bias": {},
    "user": "me",
}


def make_corpus(folder: Path) -> None:
    """Write one good file for each reader."""
    checkpoint = _write_models(folder)
    _write_weights(folder, checkpoint)
    _write_training_codes(folder)
    write_text_files(folder)
    write_records(folder)


def _write_models(folder: Path) -> Path:
    checkpoint = save_checkpoint(folder / "checkpoint", VIT, IBNormSpec("T", 3.0), seed=0)
    model = models.load(checkpoint)
    export(model, folder / "m.onnx")
    (folder / "m.plan").touch()
    inputs = model.sample(np.random.default_rng(0), 0)
    np.savez(folder / "in.npz", **inputs)  # type: ignore[arg-type]  # the stub takes a name for allow_pickle
    np.save(folder / "labels.npy", np.arange(5))
    language = save_checkpoint(folder / "language", LLAMA | {"num_hidden_layers": 1}, IBNormSpec("L", 4.0), seed=0)
    write_byte_tokenizer(language)
    export_folder(models.load(language, task="text-generation"), folder / "text")
    return checkpoint


def _write_weights(folder: Path, checkpoint: Path) -> None:
    state = models.load(checkpoint).module.state_dict()
    (folder / "sharded").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "sharded" / name.replace("model.", "part.")).write_bytes((checkpoint / name).read_bytes())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "part.safetensors")}
    _write_json(folder / "sharded" / "model.safetensors.index.json", index)
    torch.save({"model": state, "args": {"lr": 0.1, "steps": [1, 2]}, "epoch": 3}, folder / "m.pt")


def _write_training_codes(folder: Path) -> None:
    torch.manual_seed(0)
    (folder / "nanogpt").mkdir()
    gpt = GPT(_NANOGPT, lambda c: LogNorm(c.n_embd, 2.5, bias=c.bias))
    save_nanogpt(folder / "nanogpt" / "ckpt.pt", gpt, _NANOGPT)
    (folder / "litgpt").mkdir()
    lit = LitGPT(_LITGPT, LogNorm)
    torch.save({"model": lit.state_dict()}, folder / "litgpt" / "lit_model.pth")
    (folder / "litgpt" / "model_config.yaml").write_text(yaml.dump(_LITGPT))


def write_text_files(folder: Path) -> None:
    """Write the files of a tokenizer, a chat template and a request."""
    place = folder / "tokenizer"
    place.mkdir()
    write_byte_tokenizer(place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    _write_json(
        place / "tokenizer_config.json", config | {"chat_template": _TEMPLATE, "eos_token": {"content": "</s>"}}
    )
    _write_json(place / "generation_config.json", {"eos_token_id": [1, 2], "top_p": 0.9})
    decoder = {"session_options": {"custom_ops_library": "x.so"}}
    _write_json(place / "genai_config.json", {"model": {"eos_token_id": 1, "decoder": decoder}})
    (folder / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n"three"\n')
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(_png())
    _write_json(folder / "images" / "preprocessor_config.json", _PREPROCESSOR)
    (folder / "chat").mkdir()
    (folder / "chat" / "chat_template.jinja").write_text(_TEMPLATE)
    _write_json(folder / "chat.json", _CHAT)


def write_records(folder: Path) -> None:
    """Write a manifest, a baseline, the description of a plan, and a check.toml."""
    (folder / "repository").mkdir()
    (folder / "repository" / "a.txt").write_text("a")
    write_manifest(folder / "repository", {}, content={"models": ["m"]})
    baseline = Baseline(
        "m.onnx",
        "ort-cpu",
        inputs={"x": [1, 2]},
        threads=1,
        times_ms=(1.0, 1.1),
        reference_ms=(1.0, 1.0),
        environment={"processor": "p", "packages": {"onnxruntime": "1"}},
        precision="fp32",
        kernels="fused",
    )
    write_baseline(baseline, folder / "baseline.json")
    described = {
        "format": 1,
        "source": "m.onnx",
        "source_sha256": "0",
        "runtime": "tensorrt",
        "runtime_version": "10",
        "ibnorm_export": "0",
        "gpu": None,
        "compute_capabilities": ["sm_89"],
        "norm": "function",
        "why": "",
        "build_s": 1.0,
        "profiles": [
            {"name": "p", "ranges": [{"axis": "batch", "smallest": 1, "optimal": 1, "largest": 2, "profile": ""}]}
        ],
        "norms": [{"module": "m", "op_type": "IBNormL", "realised": "fused", "kernels": ["k"]}],
        "size_bytes": 1,
        "sha256": "0",
    }
    _write_json(folder / "m.plan.json", described)
    (folder / "check.toml").write_text(
        'format = 1\nresults = "r"\n[[export]]\nname = "a"\ncheckpoint = "c"\ndtype = "fp16"\n[export.parity]\n'
        'backends = ["ort-cpu"]\nsamples = 4\nmax_error = 1e-5\n[[export.latency]]\nmax_ms = 5.0\nthreads = 1\n'
        'batch = 1\nrounds = 20\n[[export.latency]]\nbaseline = "b.json"\nallow = ["runtime"]\nmax_ratio = 1.05\n'
    )


def _png() -> bytes:
    """A grey image of 4 x 4 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0abcd" * 4))
        + chunk(b"IEND", b"")
    )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))
