"""Whole models in ONNX Runtime on the CPU: the fused norms beside the functions, and beside LayerNorm.

    python -m benchmarks.suites.model_cpu --json

Exported files, run in turns on one global pool of two threads: with the op library and without it (the file's own
functions), with the skip form (the default) and without. ViT-S/16 is exported for opset 23 too, whose Attention takes
the heads together, and races four LayerNorm models of the same size: the exported graph with its norms swapped for
LayerNormalization, and a graph written by hand around com.microsoft::Attention with packed query, key and value (the
fastest known), each with and without ONNX Runtime's SkipLayerNormalization fusion. The bar is on the fastest of the
four, for the export of opset 23; the export of the default opset stands beside it.

Physical limit: ViT-S/16 takes 9.2 GFLOP an image, LLaMA-60M 0.12 GFLOP a token; the norms move 25 times 8 bytes an
element and are under a tenth of either. A ratio to LayerNorm below 1 can only come from that tenth.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from torch import nn

from benchmarks import publish
from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.op import native
from ibnorm_export.op.spec import DOMAIN

THREADS = 2
ROUNDS = 61  # of a pass of up to 0.15 s; a quarter of them for a longer one
SPEC = IBNormSpec("L", 4.0)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """Time of one way over another: median over rounds of the ratio within a round, and the middle half."""

    case: str
    way: str
    over: str
    median: float
    p25: float
    p75: float
    ms: float
    over_ms: float
    bar: float | None = None

    def __bool__(self) -> bool:
        return self.bar is None or self.median <= self.bar

    def __str__(self) -> str:
        verdict = "      " if self.bar is None else "met   " if self else "MISSED"
        return (
            f"{verdict} {self.case}: {self.way} over {self.over}: "
            f"{self.median:.3f} ({self.p25:.3f} to {self.p75:.3f}), {self.ms} ms"
        )

    def to_json(self) -> dict[str, Any]:
        verdict = None if self.bar is None else "met" if self else "missed"
        return {**asdict(self), "verdict": verdict}


def session(model: Path | bytes, library: Path | None, skip_fusion: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=None if skip_fusion else ["SkipLayerNormFusion"],
    )


def swap_norms(path: Path) -> bytes:
    """The exported graph with LayerNormalization in the place of each IBNorm."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.domain == DOMAIN:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("epsilon", 1e-5))
            node.domain, node.op_type = "", "LayerNormalization"
    del model.functions[:]
    return model.SerializeToString()


class ByHand:
    """ViT with LayerNorm over com.microsoft::Attention, from the weights of a transformers ViT."""

    def __init__(self, vit: nn.Module) -> None:
        self._vit: Any = vit
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def _weight(self, name: str, value: torch.Tensor | Array) -> str:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        self._weights.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def _add(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op_type, inputs, [output], output, **attributes))
        return output

    def _norm(self, norm: Any, x: str, name: str) -> str:
        inputs = [x, self._weight(f"{name}.w", norm.weight), self._weight(f"{name}.b", norm.bias)]
        return self._add("LayerNormalization", inputs, name, axis=-1, epsilon=1e-5)

    def _linear(self, linear: Any, x: str, name: str) -> str:
        product = self._add("MatMul", [x, self._weight(f"{name}.w", linear.weight.T)], f"{name}.product")
        return self._add("Add", [product, self._weight(f"{name}.b", linear.bias)], name)

    def build(self) -> bytes:
        vit, config = self._vit.vit, self._vit.config
        hidden, patch = config.hidden_size, config.patch_size
        embeddings = vit.embeddings
        projection = embeddings.patch_embeddings.projection
        x = self._add(
            "Conv",
            ["pixel_values", self._weight("p.w", projection.weight), self._weight("p.b", projection.bias)],
            "p",
            strides=[patch, patch],
        )
        x = self._add("Reshape", [x, self._weight("shape", np.array([0, hidden, -1]))], "flat")
        x = self._add("Transpose", [x], "tokens", perm=[0, 2, 1])
        batch = self._add("Shape", ["pixel_values"], "batch", start=0, end=1)
        rest = self._weight("rest", np.array([1, hidden]))
        shape = self._add("Concat", [batch, rest], "cls.shape", axis=0)
        cls = self._add("Expand", [self._weight("cls.token", embeddings.cls_token), shape], "cls")
        x = self._add("Concat", [cls, x], "with_cls", axis=1)
        x = self._add("Add", [x, self._weight("positions", embeddings.position_embeddings)], "embedded")
        for i, layer in enumerate(vit.layers):
            attention = layer.attention
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            packed = [
                self._norm(layer.layernorm_before, x, f"{i}.before"),
                self._weight(f"{i}.qkv.w", torch.cat([p.weight.T for p in parts], dim=1)),
                self._weight(f"{i}.qkv.b", torch.cat([p.bias for p in parts])),
            ]
            heads = config.num_attention_heads
            seen = self._add("Attention", packed, f"{i}.attention", domain="com.microsoft", num_heads=heads)
            x = self._add("Add", [self._linear(attention.o_proj, seen, f"{i}.o"), x], f"{i}.residual")
            inner = self._linear(layer.mlp.fc1, self._norm(layer.layernorm_after, x, f"{i}.after"), f"{i}.fc1")
            inner = self._add("Gelu", [inner], f"{i}.gelu")
            x = self._add("Add", [self._linear(layer.mlp.fc2, inner, f"{i}.fc2"), x], f"{i}.out")
        first = self._weight("first", np.array(0))
        x = self._add("Gather", [self._norm(vit.layernorm, x, "norm"), first], "cls.out", axis=1)
        self._linear(self._vit.classifier, x, "logits")
        size = config.image_size
        info, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "vit",
            [info("pixel_values", kind, ["batch", config.num_channels, size, size])],
            [info("logits", kind, ["batch", config.num_labels])],
            self._weights,
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def race(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, Array]:
    """Seconds of every way in every round; ways take turns, forwards and backwards, each after an untimed pass."""
    for run in ways.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways) if index % 2 == 0 else reversed(ways):
            ways[name]()
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def row(case: str, times: dict[str, Array], way: str, over: str, bar: float | None = None) -> Row:
    p25, median, p75 = (round(float(p), 3) for p in np.percentile(times[way] / times[over], (25, 50, 75)))
    ms, over_ms = (round(1e3 * statistics.median(times[name]), 3) for name in (way, over))
    return Row(case, way, over, median, p25, p75, ms, over_ms, bar)


def layer_norm_ways(preset: str, path: Path, inputs: dict[str, Array]) -> dict[str, ort.InferenceSession]:
    """The four LayerNorm models; both graphs are checked against PyTorch first."""
    stock = models.new_model(preset, SPEC)
    for name, _ in list(stock.named_modules()):
        if name.split(".")[-1].startswith("layernorm"):
            norm = nn.LayerNorm(stock.config.hidden_size, eps=1e-5)
            stock.set_submodule(name, norm)
    with torch.no_grad():
        expected = stock.eval()(torch.from_numpy(inputs["pixel_values"])).logits.numpy()
    ways = {}
    for name, model in (("exported graph", swap_norms(path)), ("packed attention", ByHand(stock).build())):
        for fusion in (True, False):
            opened = session(model, None, fusion)
            (found,) = opened.run(None, inputs)
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            if error > 1e-5:
                raise SystemExit(
                    f"model_cpu: LayerNorm, {name}: off from PyTorch by {error:.1e}; it is not the same model"
                )
            ways[f"LayerNorm, {name}{'' if fusion else ', no SkipLayerNormalization'}"] = opened
    return ways


def measure(preset: str, sizes: list[dict[str, int]], library: Path, rounds: int, folder: Path) -> list[Row]:
    checkpoint = folder / preset
    models.save(models.new_model(preset, SPEC), checkpoint)
    wanted = {"": ExportOptions(), ", no skip form": ExportOptions(fuse_skip=False)}
    if preset.startswith("vit"):
        wanted[", opset 23"] = ExportOptions(opset=23)
    files = {
        name: export(models.load(checkpoint), folder / f"{preset}-{index}.onnx", options=options)
        for index, (name, options) in enumerate(wanted.items())
    }
    rows = []
    for size in sizes:
        case = f"{preset} {', '.join(f'{k} {v}' for k, v in size.items())}"
        inputs = draw_inputs(ExportedModel(files[""].path), size)
        sessions = {
            f"IBNorm-L {kernels}{name}": session(file.path, library if fused else None)
            for kernels, fused in (("fused", True), ("function", False))
            for name, file in files.items()
        }
        if preset.startswith("vit"):
            sessions |= layer_norm_ways(preset, files[", no skip form"].path, inputs)
        ways = {name: lambda s=s, x=inputs: s.run(None, x) for name, s in sessions.items()}
        start = time.perf_counter()
        next(iter(ways.values()))()
        short = time.perf_counter() - start < 0.15
        times = race(ways, rounds if short else -(-rounds // 4))
        rows += [row(case, times, f"IBNorm-L fused{name}", f"IBNorm-L function{name}") for name in files]
        for kernels in ("fused", "function"):
            rows.append(row(case, times, f"IBNorm-L {kernels}", f"IBNorm-L {kernels}, no skip form"))
        normal = [name for name in times if name.startswith("LayerNorm")]
        fastest = min(normal, key=lambda name: statistics.median(times[name]), default=None)
        for name in normal:
            rows.append(row(case, times, "IBNorm-L fused", name))
            rows.append(row(case, times, "IBNorm-L fused, opset 23", name, 1.0 if name == fastest else None))
    return rows


def main() -> int:
    parser = publish.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    library = native.ort_library()
    if library is None:
        print("model_cpu: the op library is missing; run `make native`", file=sys.stderr)
        return 3
    ort.set_global_thread_pool_sizes(THREADS, 1)
    torch.set_num_threads(THREADS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for preset, sizes in (
            ("vit-s16", [{"batch": 1}, {"batch": 8}]),
            ("llama-60m", [{"batch": 1, "sequence": 128}, {"batch": 1, "sequence": 512}]),
        ):
            rows += measure(preset, sizes, library, options.rounds, Path(folder))
    content = {"threads": THREADS, "rounds": options.rounds, "rows": [r.to_json() for r in rows]}
    return publish.publish("model_cpu", content, all(rows), rows, options)


if __name__ == "__main__":
    sys.exit(main())
