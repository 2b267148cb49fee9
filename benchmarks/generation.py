"""LLaMA-60M with random weights in fp32: IBNorm-L beside the RMSNorm model that GenAI's own builder makes.

    python benchmarks/generation.py --json

Runs alternate (ours, theirs, ours, ...) on two threads each; a value is the median of the paired ratios of time,
`upper` its one-sided 95% bound (bootstrap). A decode run is the mean of 8 steps of one token behind a warm
one, so that the other session's threads have stopped spinning.

Physical limit of a decode step: every weight but the embedding is read once; the bandwidth of reading is measured in
the same run, by two threads summing 512 MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers
from onnxruntime_genai.models.builders.llama import LlamaModel

from ibnorm_export import IBNormSpec, models, native
from ibnorm_export.artifact import ExportedModel
from ibnorm_export.environment import environment
from ibnorm_export.export import ExportOptions
from ibnorm_export.folder import export_folder
from ibnorm_export.genai_export import export_genai
from ibnorm_export.quantize import Quantization
from ibnorm_export.runners.base import Kernels
from ibnorm_export.runners.genai_runner import GenaiModel
from ibnorm_export.tokens import write_byte_tokenizer

THREADS = 2
STEPS = 8
Run = Callable[[], float]


class Text(Protocol):
    def feed(self, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> object: ...


@dataclass(frozen=True)
class Row:
    """One comparison; a second bound on `upper`, where the bar has one, suffices too."""

    case: str
    measure: str
    value: float
    bar: float
    ours_ms: float
    theirs_ms: float
    upper: float | None = None
    upper_bar: float | None = None
    at_most: bool = True

    def __bool__(self) -> bool:
        if self.upper is not None and self.upper_bar is not None and self.upper <= self.upper_bar:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": "met" if self else "missed"}


class PortableText:
    """The portable form with its cache on I/O binding: each `present` is bound as the next `past`."""

    def __init__(self, exported: ExportedModel, library: Path | None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        if library is not None:
            options.register_custom_ops_library(str(library))
        self._session = ort.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._length = 0
        self._past = {
            i.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32))
            for i in self._session.get_inputs()
            if i.name.startswith("past")
        }

    def feed(self, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> object:
        binding, total = self._binding, self._length + len(tokens)
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        binding.bind_cpu_input("input_ids", tokens[None])
        binding.bind_cpu_input("position_ids", np.arange(self._length, total)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
        names = [o.name for o in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        values = dict(zip(names, binding.get_outputs(), strict=True))
        self._past = {name: values[name.replace("past_key_values", "present")] for name in self._past}
        self._length = total
        return values["logits"]


def paired(ours: Run, theirs: Run, repeats: int) -> tuple[float, float, float, float]:
    """Median ratio, its upper 95% bound, and both median times in milliseconds."""
    times = np.array([(ours(), theirs()) for _ in range(repeats + 1)][1:])
    ratios = times[:, 0] / times[:, 1]
    drawn = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    upper = float(np.quantile(np.median(drawn, axis=1), 0.95))
    ours_ms, theirs_ms = (round(float(t) * 1e3, 3) for t in np.median(times, axis=0))
    return round(float(np.median(ratios)), 4), round(upper, 4), ours_ms, theirs_ms


def first_token(start: Callable[[], Text], context: int) -> Run:
    tokens = np.random.default_rng(1).integers(0, 255, context)

    def run() -> float:
        text = start()
        begin = time.perf_counter()
        text.feed(tokens)
        return time.perf_counter() - begin

    return run


def decode(start: Callable[[], Text], context: int) -> Run:
    text = start()
    text.feed(np.random.default_rng(1).integers(0, 255, context))
    token = np.array([65])

    def run() -> float:
        text.feed(token)
        begin = time.perf_counter()
        for _ in range(STEPS):
            text.feed(token)
        return (time.perf_counter() - begin) / STEPS

    return run


def genai(folder: Path) -> Callable[[], Text]:
    file = folder / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = THREADS
    file.write_text(json.dumps(config), encoding="utf-8")
    model = GenaiModel(folder)
    return lambda: model.start(2000)


def build_rms(config: dict[str, Any], folder: Path) -> None:
    """GenAI's builder, as it is, on transformers' LLaMA of the same shape."""
    source, cache = folder / "checkpoint", folder / "cache"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(source)
    read = transformers.LlamaConfig.from_pretrained(source)
    read._name_or_path = str(source)
    fp32 = ir.DataType.FLOAT
    builder = LlamaModel(read, fp32, fp32, "cpu", str(cache), {"hf_token": False, "hf_remote": False})
    builder.make_model(str(source))
    ir.save(builder.model, folder / "model.onnx", external_data="model.onnx.data")
    builder.make_genai_config(read, {}, str(folder))


def read_bandwidth() -> float:
    """Bytes per second of two threads that sum 512 MB; the best of 15."""
    torch.set_num_threads(THREADS)
    values = torch.ones(1 << 27)
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - begin)
    return values.nbytes / min(times)


def measure(folder: Path, repeats: int) -> list[Row]:
    checkpoint = folder / "checkpoint"
    models.save(models.new_model("llama-60m", IBNormSpec("L", 4.0, 1e-5, bias=False)), checkpoint)
    write_byte_tokenizer(checkpoint)

    def load() -> Any:
        return models.load(checkpoint, task="text-generation")

    loaded = load()
    config = {k: v for k, v in loaded.module.config.to_dict().items() if k not in ("ibnorm", "dtype", "architectures")}
    embedding = config["vocab_size"] * config["hidden_size"]
    read = 4 * (sum(p.numel() for p in loaded.module.parameters()) - embedding)
    export_genai(load(), folder / "library", kernels=Kernels.FUSED)
    export_genai(load(), folder / "function", kernels=Kernels.FUNCTION)
    export_genai(load(), folder / "int4", ExportOptions(quantization=Quantization(4, 32, 8)), Kernels.FUSED)
    portable = export_folder(load(), folder / "portable")
    (folder / "rms").mkdir()
    build_rms(config, folder / "rms")
    forms = {name: genai(folder / name) for name in ("library", "function", "int4", "rms")}
    forms["portable"] = lambda: PortableText(portable, native.ort_library())

    def row(name: str, case: str, run: Callable[..., Run], context: int, *bars: float, against: str = "rms") -> Row:
        runs = run(forms[name], context), run(forms[against], context)
        value, upper, ours, theirs = paired(*runs, repeats if run is decode else max(5, repeats // 2))
        print(f"{case}, {context}: {value:.3f} ({upper:.3f}) of {theirs:.2f} ms", file=sys.stderr, flush=True)
        return Row(f"{case} {context}", f"time over {against}", value, bars[0], ours, theirs, upper, *bars[1:])

    rows = []
    for context in (128, 1500):
        rows.append(row("library", "ort-genai with library, decode at context", decode, context, 1.0, 1.03))
        rows.append(row("function", "ort-genai function only, decode at context", decode, context, 1.05))
    rows.append(row("portable", "portable, dynamic cache, decode at context", decode, 1500, 1.35))
    rows.append(row("int4", "int4, decode at context", decode, 128, 0.45, against="library"))
    for context in (128, 512, 1500):
        rows.append(row("library", "ort-genai with library, first token at", first_token, context, 1.0, 1.03))
        rows.append(row("function", "ort-genai function only, first token at", first_token, context, 1.05))
    reading, step = read_bandwidth(), rows[0].ours_ms / 1e3
    fraction = round(read / step / reading, 3)
    floor_ms = round(read / reading * 1e3, 3)
    case = "ort-genai with library, decode at context 128"
    rows.append(Row(case, "bandwidth over read bandwidth", fraction, 0.85, rows[0].ours_ms, floor_ms, at_most=False))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--record", type=Path, help="write the JSON here too")
    parser.add_argument("--repeats", type=int, default=30, help="pairs of decode runs; half as many of first tokens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.repeats)
    report = {
        "benchmark": "generation",
        "threads": THREADS,
        "repeats": options.repeats,
        "environment": environment(),
        "limit": "a decode step reads every weight but the embedding once: time >= bytes / read bandwidth",
        "rows": [row.to_json() for row in rows],
        "verdict": "met" if all(rows) else "missed",
    }
    text = json.dumps(report, indent=2)
    if options.record:
        options.record.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        for row in rows:
            sign = "<=" if row.at_most else ">="
            print(f"{'met   ' if row else 'MISSED'} {row.case:48} {row.measure} {row.value:.3f} ({sign} {row.bar:.2f})")
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
