"""A stranger's path: their training code and their norm class, then only commands, to a served model.

The training codes are in `examples/`. They import nothing of ibnorm-export. Each command runs in its own process, as a
person types it; the exported file is compared with their own classes in float64, in plain ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, limited
from ibnorm_export.serving.triton.binary import find_triton
from tests.support.running_server import command, running

__all__ = ["add_options", "measure"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT = "The import statement"

#: The largest relative difference of an fp32 file from the stranger's own classes in float64.
LIMIT = 2e-6

#: Compares gpt.onnx with model.py, with neither this package nor its kernels.
GPT_TRUTH = """
import json, pickle
import numpy as np, onnxruntime, torch
from model import GPT, GPTConfig

checkpoint = torch.load("out/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**checkpoint["model_args"]))
model.load_state_dict(checkpoint["model"])
model.double().eval()
session = onnxruntime.InferenceSession("gpt.onnx", providers=["CPUExecutionProvider"])
rng, worst = np.random.default_rng(0), 0.0
for batch, length in ((1, 128), (3, 65), (2, 1)):
    ids = rng.integers(0, checkpoint["model_args"]["vocab_size"], (batch, length))
    (got,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    with torch.no_grad():
        want = model(torch.from_numpy(ids))[0].numpy()
    worst = max(worst, float(np.linalg.norm(got - want) / np.linalg.norm(want)))
print(json.dumps(worst))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--seconds", type=float, default=120.0, help="Time for the training.")
    parser.add_argument("--text", type=Path, help="Text to train on (Python's own help texts).")


class Commands:
    """Runs commands in one folder, and reports each as a row."""

    def __init__(self, folder: Path, report: Report) -> None:
        self._folder = folder
        self._report = report

    def python(self, name: str, *arguments: object) -> str:
        """Run a script of the stranger."""
        return self._run(name, [sys.executable, *map(str, arguments)])

    def ibnorm(self, *arguments: object) -> str:
        """Run `ibnorm-export`."""
        return self._run(f"ibnorm-export {shlex.join(map(str, arguments))}", command(*arguments))

    def _run(self, name: str, words: list[str]) -> str:
        began = time.perf_counter()
        done = subprocess.run(words, cwd=self._folder, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        self._report.add(
            Row(
                name,
                {"time": Figure(seconds, "s"), "exit code": Figure(done.returncode)},
                targets=(Target("exit code", 0),),
                details={"output": done.stdout[-4000:], "error": done.stderr[-2000:]},
                note=(done.stdout.strip().splitlines() or [""])[-1][:120],
            )
        )
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout


def _next_token(endpoint: str, model: str, ids: list[int]) -> int:
    """The most likely token after a prompt, from a server that speaks KServe's protocol."""
    tensors = [
        {"name": name, "shape": [1, len(ids)], "datatype": "INT64", "data": values}
        for name, values in (("input_ids", ids), ("attention_mask", [1] * len(ids)))
    ]
    request = urllib.request.Request(
        f"http://{endpoint}/v2/models/{model}/infer",
        data=json.dumps({"inputs": tensors}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    (logits,) = (output for output in found["outputs"] if output["name"] == "logits")
    last = logits["data"][-logits["shape"][-1] :]
    return int(max(range(len(last)), key=last.__getitem__))


def gpt(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """A GPT in the way of nanoGPT: train, import, export, verify, generate, serve."""
    for file in (EXAMPLES / "nanogpt_like").glob("*.py"):
        shutil.copy(file, folder)
    text = folder / "text.txt"
    if options.text is None:
        text.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    else:
        shutil.copy(options.text, text)
    run = Commands(folder, report)
    run.python("train the GPT", "train.py", "--text", text, "--seconds", options.seconds)
    run.ibnorm("import", "out/ckpt.pt", "-o", "gpt", "--norm-class", "model:IBNorm", "--tokenizer", "out/meta.pkl")
    run.ibnorm("export", "gpt", "-o", "gpt.onnx")
    truth = float(json.loads(run.python("run gpt.onnx and model.py", "-c", GPT_TRUTH)))
    report.add(limited("gpt.onnx against the stranger's own classes", truth, at_most=LIMIT, note="relative, float64"))
    run.ibnorm("export", "gpt", "-o", "gpt-text", "--task", "text-generation")
    run.ibnorm("verify", "gpt-text", "gpt")
    run.ibnorm("generate", "gpt-text", "--prompt", PROMPT, "--max-new-tokens", 60, "--temperature", 0.8, "--seed", 1)
    generated = run.ibnorm("generate", "gpt-text", "--prompt", PROMPT, "--max-new-tokens", 1, "--temperature", 0)
    vocabulary: dict[str, int] = json.loads((folder / "gpt" / "tokenizer.json").read_text())["model"]["vocab"]
    expected = vocabulary[generated.rstrip("\n")[len(PROMPT)]]
    began = time.perf_counter()
    with running(folder / "gpt.onnx") as server:
        served = _next_token(server.http, "gpt", [vocabulary[character] for character in PROMPT])
        seconds = time.perf_counter() - began
    report.add(
        Row(
            "ibnorm-export serve gpt.onnx",
            {
                "time to the first answer": Figure(seconds, "s"),
                "same token as generate": Figure(int(served == expected)),
            },
            targets=(Target("same token as generate", 1, at_least=True),),
            note="in Triton",
        )
    )


#: Compares vit.onnx with vit.py, with neither this package nor its kernels.
VIT_TRUTH = """
import json
import numpy as np, onnxruntime, torch
import vit

model = vit.build()
checkpoint = torch.load("last.pth.tar", weights_only=False)  # the file of this suite
model.load_state_dict(checkpoint["state_dict"])
model.double().eval()
session = onnxruntime.InferenceSession("vit.onnx", providers=["CPUExecutionProvider"])
rng, worst = np.random.default_rng(0), 0.0
for batch in (1, 2, 9):
    images = rng.standard_normal((batch, 1, 8, 8)).astype(np.float32)
    (got,) = session.run(None, {session.get_inputs()[0].name: images})
    with torch.no_grad():
        want = model(torch.from_numpy(images).double()).numpy()
    worst = max(worst, float(np.linalg.norm(got - want) / np.linalg.norm(want)))
print(json.dumps(worst))
"""


def vit(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """A ViT in the way of timm, through `--model` alone: train, export, verify."""
    for file in (EXAMPLES / "timm_like").glob("*.py"):
        shutil.copy(file, folder)
    run = Commands(folder, report)
    run.python("train the ViT", "train_vit.py", "--seconds", min(options.seconds, 60))
    model = ("--model", "vit:build")
    run.ibnorm("export", "last.pth.tar", "-o", "vit.onnx", *model, "--inputs", "example.npz")
    truth = float(json.loads(run.python("run vit.onnx and vit.py", "-c", VIT_TRUTH)))
    report.add(limited("vit.onnx against the stranger's own classes", truth, at_most=LIMIT, note="relative, float64"))
    run.ibnorm("verify", "vit.onnx", "last.pth.tar", *model)


def measure(options: argparse.Namespace, report: Report) -> None:
    """Walk the path in a folder that is deleted afterwards."""
    find_triton()  # a missing server is reported before the training
    with tempfile.TemporaryDirectory() as folder:
        gpt(Path(folder), options, report)
        vit(Path(folder), options, report)
