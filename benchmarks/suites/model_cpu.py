"""Whole models in ONNX Runtime on the CPU: fused norms against functions, and against LayerNorm.

Exported files run in turns on one global pool of two threads: with the fused kernels and without them (the file's own
functions), with the skip form (the default) and without. ViT-S/16 is exported for ONNX Runtime (`--for ort`) too, which
sets opset 23, whose Attention takes the heads together. It runs against four LayerNorm models of the same size: the
exported graph with its norms replaced by LayerNormalization, and a graph written by hand around
com.microsoft::Attention with packed query, key and value (the fastest known), each with and without ONNX Runtime's
SkipLayerNormalization fusion. The target is on the fastest of the four, for the export for ONNX Runtime. The export for
every runtime, of opset 20, is recorded too.

Physical limit: ViT-S/16 takes 9.2 GFLOP an image, LLaMA-60M 0.12 GFLOP a token. The norms move 25 times 8 bytes an
element and are under a tenth of either. A ratio to LayerNorm below 1 can only come from that tenth. The rows "without
norms" give its size: a profile of the exported graph with ONNX Runtime's own norm (LayerNormalization, or RMSNorm for
LLaMA) shows the time of its norms and of the sums that the skip form takes over. If they took no time, the model would
still take `limit` of its time. With the same products and attention, no norm can reach a lower ratio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from torch import nn

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from benchmarks.turns import Times, compare, ms, share_threads, take_turns, timed
from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.random_inputs import draw_inputs
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.op import native
from ibnorm_export.op.spec import DOMAIN

THREADS = 2
ROUNDS = 61  # a quarter of them if one pass takes longer than LONG_S
LONG_S = 0.15
SIZES = {
    "vit-s16": ({"batch_size": 1}, {"batch_size": 8}),
    "llama-60m": tuple({"batch_size": 1, "sequence_length": length} for length in (1, 128, 512)),
}
SPEC = IBNormSpec("L", 4.0)
RMS_NORM = "SimplifiedLayerNormalization"
PROFILED = 12  # passes of a profile
Array = np.ndarray[Any, Any]


def session(model: Path | bytes, library: Path | None, *, skip_fusion: bool = True) -> ort.InferenceSession:
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


def swap_norms(path: Path, op_type: str = "LayerNormalization") -> bytes:
    """The exported graph with another norm in the place of each IBNorm."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.domain == DOMAIN:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("epsilon", 1e-5))
            node.domain, node.op_type = "", op_type
            if op_type == RMS_NORM:  # it has no bias
                del node.input[2:]
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


def row(case: str, times: Times, *, name: str, over: str, max_ratio: float | None = None) -> Row:
    """Time of `name` over `over`; `max_ratio` is the target."""
    figures = {**compare(times, name, over=over), "time": ms(times, name), "baseline": ms(times, over)}
    targets = () if max_ratio is None else (Target("time over baseline", max_ratio),)
    return Row(f"{case}: {name} over {over}", figures, targets=targets)


def layer_norm_sessions(preset: str, path: Path, *, inputs: dict[str, Array]) -> dict[str, ort.InferenceSession]:
    """The four LayerNorm models; both graphs are checked against PyTorch first."""
    stock = models.new_model(preset, SPEC)
    for name, _ in list(stock.named_modules()):
        if name.split(".")[-1].startswith("layernorm"):
            norm = nn.LayerNorm(stock.config.hidden_size, eps=1e-5)
            stock.set_submodule(name, norm)
    with torch.no_grad():
        expected = stock.eval()(torch.from_numpy(inputs["pixel_values"])).logits.numpy()
    sessions = {}
    for name, model in (("exported graph", swap_norms(path)), ("packed attention", ByHand(stock).build())):
        for fusion in (True, False):
            opened = session(model, None, skip_fusion=fusion)
            (found,) = opened.run(None, inputs)
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            if error > 1e-5:
                raise RuntimeError(f"LayerNorm, {name}: differs from PyTorch by {error:.1e}; it is another model")
            sessions[f"LayerNorm, {name}{'' if fusion else ', no SkipLayerNormalization'}"] = opened
    return sessions


def exports(preset: str, folder: Path) -> dict[str, ExportedModel]:
    """The files of one preset, by the end of their names."""
    checkpoint = folder / preset
    models.save(models.new_model(preset, SPEC), checkpoint)
    wanted = {"": ExportOptions(), ", no skip form": ExportOptions(fuse_skip=False)}
    if preset.startswith("vit"):
        wanted[", for ort"] = ExportOptions(runtime="ort")
    return {
        name: export(models.load(checkpoint), folder / f"{preset}-{index}.onnx", options=options)
        for index, (name, options) in enumerate(wanted.items())
    }


def rows_of(case: str, times: Times, *, files: Iterable[str]) -> Iterator[Row]:
    """The comparisons of one preset and size."""
    for name in files:
        yield row(case, times, name=f"IBNorm-L fused{name}", over=f"IBNorm-L function{name}")
    for kernels in ("fused", "function"):
        yield row(case, times, name=f"IBNorm-L {kernels}", over=f"IBNorm-L {kernels}, no skip form")
    baselines = [name for name in times if name.startswith("LayerNorm")]
    fastest = min(baselines, key=lambda name: float(np.median(times[name])), default=None)
    for name in baselines:
        yield row(case, times, name="IBNorm-L fused", over=name)
        yield row(case, times, name="IBNorm-L fused, for ort", over=name, max_ratio=0.9 if name == fastest else None)


def measure_preset(
    preset: str, sizes: Iterable[dict[str, int]], *, library: Path, rounds: int, folder: Path
) -> Iterator[Row]:
    """The rows of one preset."""
    files = exports(preset, folder)
    for size in sizes:
        inputs = draw_inputs(files[""], size)
        sessions = {
            f"IBNorm-L {kernels}{name}": session(file.path, library if kernels == "fused" else None)
            for kernels in ("fused", "function")
            for name, file in files.items()
        }
        if preset.startswith("vit"):
            sessions |= layer_norm_sessions(preset, files[", no skip form"].path, inputs=inputs)
        candidates = {name: timed(lambda s=s, x=inputs: s.run(None, x)) for name, s in sessions.items()}
        first = next(iter(candidates.values()))
        first()  # allocates
        times = take_turns(candidates, rounds=rounds if first() < LONG_S else -(-rounds // 4))
        case = f"{preset} {', '.join(f'{k} {v}' for k, v in size.items())}"
        yield from rows_of(case, times, files=files)
        norm = "LayerNormalization" if preset.startswith("vit") else RMS_NORM
        yield without_norms(case, swap_norms(files[", no skip form"].path, norm), inputs=inputs)


def kernel_times(model: bytes, inputs: dict[str, Array]) -> dict[tuple[str, str], float]:
    """Median time of each node of a model by name and op type, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3  # weights that only IBNorm has are left in the model
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        profiled = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            profiled.run(None, inputs)
        events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"], event["args"]["op_name"]].append(event["dur"])
    return {node: float(np.median(found)) for node, found in times.items()}


def without_norms(case: str, model: bytes, *, inputs: dict[str, Array]) -> Row:
    """The share of a model's time that is left without its norms and the sums before them."""
    graph = onnx.load_from_string(model).graph
    weights = {tensor.name for tensor in graph.initializer}
    sums = {node.name for node in graph.node if node.op_type == "Add" and not weights & set(node.input)}
    times = kernel_times(model, inputs)
    total = sum(times.values())
    norms = sum(time for (_, op_type), time in times.items() if "LayerNormalization" in op_type)
    added = sum(time for (name, _), time in times.items() if name.removesuffix("_kernel_time") in sums)
    kinds = ("MatMul", "FusedMatMul", "Gemm", "Conv", "Attention", "MultiHeadAttention")
    products = sum(time for (_, op_type), time in times.items() if op_type in kinds)
    figures = {
        "limit": Figure(1 - (norms + added) / total),
        "norms": Figure(norms / total),
        "sums": Figure(added / total),
        "products and attention": Figure(products / total),
        "time": Figure(total / 1000, "ms"),
    }
    return Row(f"{case}: without norms", figures)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Turns of each candidate (%(default)s).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure ViT-S/16 and LLaMA-60M."""
    library = native.ort_library()
    if library is None:
        raise Unavailable("the library of fused kernels is missing; run `make native`")
    share_threads(THREADS)
    report.facts |= {"threads": THREADS, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as name:
        for preset, sizes in SIZES.items():
            for row in measure_preset(preset, sizes, library=library, rounds=options.rounds, folder=Path(name)):
                report.add(row)
