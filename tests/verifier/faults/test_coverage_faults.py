"""Faults that show only on long sequences, large batches, the last slots of a cache, rare ids or large values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.verifier.options import InputCoverage
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint
from tests.support.planting import Change, plant

LONG_LLAMA = {**LLAMA, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 640, "vocab_size": 128}
NUMERIC = VerifyOptions(static=False, samples=2)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ExportedModel, LoadedModel]]:
    folder = tmp_path_factory.mktemp("right")
    llama = save_checkpoint(folder / "llama", LONG_LLAMA, IBNormSpec("L", bias=False), seed=0)
    vit = save_checkpoint(folder / "vit", VIT, IBNormSpec("T"), seed=0)
    made = {}
    for name, checkpoint, task in (
        ("llama", llama, Task.FORWARD),
        ("decoder", llama, Task.TEXT_GENERATION),
        ("vit", vit, Task.FORWARD),
    ):
        model = models.load(checkpoint, task=task)
        made[name] = export(model, folder / f"{name}.onnx"), model
    model = models.load(llama, task=Task.TEXT_GENERATION)
    made["one row"] = export(model, folder / "one.onnx", options=ExportOptions(shape={"batch_size": 1})), model
    return made


# ---- how the faults are planted ----


def add_first(proto: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    for index, node in enumerate(nodes):
        proto.graph.node.insert(index, node)


def constant(proto: onnx.ModelProto, name: str, value: object) -> str:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return name


def read_instead(proto: onnx.ModelProto, name: str, other: str) -> None:
    """Every node that reads `name` reads `other`; call it before the nodes that compute `other` are added."""
    for node in proto.graph.node:
        for position, read in enumerate(node.input):
            if read == name:
                node.input[position] = other


def size_above(proto: onnx.ModelProto, name: str, *, axis: int, limit: int) -> list[onnx.NodeProto]:
    """Nodes that compute the bool "above": the size of an axis of an input is above the limit."""
    make = onnx.helper.make_node
    constant(proto, "limit", np.array([limit], np.int64))
    return [
        make("Shape", [name], ["size"], "size", start=axis, end=axis + 1),
        make("Greater", ["size", "limit"], ["above"], "above"),
    ]


def change_output(proto: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """The nodes read "before" and write logits."""
    for node in proto.graph.node:
        for position, written in enumerate(node.output):
            if written == "logits":
                node.output[position] = "before"
    proto.graph.node.extend(nodes)


def clip_input(name: str, low: object, high: object) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        read_instead(proto, name, "clipped")
        bounds = [constant(proto, "low", low), constant(proto, "high", high)]
        add_first(proto, onnx.helper.make_node("Clip", [name, *bounds], ["clipped"], "clip"))

    return change


def negate_beyond_600(proto: onnx.ModelProto) -> None:
    make, info = onnx.helper.make_node, onnx.helper.make_empty_tensor_value_info
    branches = {
        name: onnx.helper.make_graph([make(op, ["before"], [f"{name}/logits"])], name, [], [info(f"{name}/logits")])
        for name, op in (("then_branch", "Neg"), ("else_branch", "Identity"))
    }
    nodes = size_above(proto, "input_ids", axis=1, limit=600)
    change_output(proto, *nodes, make("If", ["above"], ["logits"], "if", **branches))


def ignore_padding_of_a_pattern(proto: onnx.ModelProto) -> None:
    """Padding is ignored in rows whose first and third token are masked, and the second and fourth are not."""
    read_instead(proto, "attention_mask", "mask")
    make = onnx.helper.make_node
    nodes = [make("Cast", ["attention_mask"], ["seen"], "seen", to=onnx.TensorProto.BOOL)]
    constant(proto, "often", np.array([1, 4], np.int64))
    nodes.append(make("Tile", ["seen", "often"], ["again"], "again"))  # a short row has four places, too
    found = ""
    for place, wanted in enumerate((False, True, False, True)):
        constant(proto, f"place{place}", np.array([place], np.int64))
        nodes.append(make("Gather", ["again", f"place{place}"], [f"token{place}"], f"token{place}", axis=1))
        nodes.append(make("Identity" if wanted else "Not", [f"token{place}"], [f"fits{place}"], f"fits{place}"))
        nodes.append(make("And", [found or f"fits{place}", f"fits{place}"], [f"so_far{place}"], f"so_far{place}"))
        found = f"so_far{place}"
    nodes.append(make("Or", ["seen", found], ["all_seen"], "all_seen"))
    nodes.append(make("Cast", ["all_seen"], ["mask"], "mask", to=onnx.TensorProto.INT64))
    add_first(proto, *nodes)


def ignore_padding(proto: onnx.ModelProto) -> None:
    read_instead(proto, "attention_mask", "mask")
    make, one = onnx.helper.make_node, onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
    size = make("Shape", ["attention_mask"], ["size"], "size")
    add_first(proto, size, make("ConstantOfShape", ["size"], ["mask"], "mask", value=one))


def nan_above_8_rows(name: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        constant(proto, "nan", np.float32(np.nan))
        nodes = size_above(proto, name, axis=0, limit=8)
        change_output(proto, *nodes, onnx.helper.make_node("Where", ["above", "nan", "before"], ["logits"], "nan"))

    return change


def ignore_padding_above_3_rows(proto: onnx.ModelProto) -> None:
    read_instead(proto, "attention_mask", "mask")
    make = onnx.helper.make_node
    nodes = size_above(proto, "attention_mask", axis=0, limit=3)
    add_first(
        proto,
        *nodes,
        make("Cast", ["above"], ["ones"], "ones", to=onnx.TensorProto.INT64),
        make("Max", ["attention_mask", "ones"], ["mask"], "mask"),
    )


def change_causal_mask(proto: onnx.ModelProto, *, window: bool) -> None:
    """Tokens beyond 100 also see the next one; or all see only a window of 64 tokens."""
    node = next(n for n in proto.graph.node if n.op_type == "LessOrEqual")
    make, place = onnx.helper.make_node, list(proto.graph.node).index(node)
    key, query = node.input
    if window:
        constant(proto, "window", np.int64(64))
        allowed, node.output[0] = node.output[0], "causal"
        nodes = [
            make("Sub", [query, key], ["distance"], "distance"),
            make("Less", ["distance", "window"], ["near"], "near"),
            make("And", ["causal", "near"], [allowed], "windowed"),
        ]
        for index, made in enumerate(nodes):
            proto.graph.node.insert(place + 1 + index, made)
        return
    constant(proto, "hundred", np.int64(100))
    nodes = [
        make("Greater", [query, "hundred"], ["late"], "late"),
        make("Cast", ["late"], ["one"], "one", to=onnx.TensorProto.INT64),
        make("Add", [query, "one"], ["next"], "next"),
    ]
    node.input[1] = "next"
    for index, made in enumerate(nodes):
        proto.graph.node.insert(place + index, made)


def double_cache_from_slot_60(proto: onnx.ModelProto) -> None:
    name, make = "past_key_values.0.value", onnx.helper.make_node
    read_instead(proto, name, "doubled")
    for label, value in (("zero", [0]), ("sixty", [60]), ("end", [2**31]), ("two", [2])):
        constant(proto, label, np.array(value, np.int64))
    constant(proto, "factor", np.float32(2))
    add_first(
        proto,
        make("Slice", [name, "zero", "sixty", "two"], ["early"], "early"),
        make("Slice", [name, "sixty", "end", "two"], ["late"], "late"),
        make("Mul", ["late", "factor"], ["twice"], "twice"),
        make("Concat", ["early", "twice"], ["doubled"], "doubled", axis=2),
    )


FAULTS: dict[str, tuple[str, Change, str]] = {
    "logits negated beyond 600 tokens": ("llama", negate_beyond_600, "the longest sequence"),
    "a mask off by one beyond 100": ("llama", lambda p: change_causal_mask(p, window=False), "much padding"),
    "a sliding window of 64": ("llama", lambda p: change_causal_mask(p, window=True), "the longest sequence"),
    "padding ignored above 3 rows": ("llama", ignore_padding_above_3_rows, "a large batch"),
    "padding ignored for a pattern": ("llama", ignore_padding_of_a_pattern, "a large batch"),
    "padding ignored for a pattern, with a cache": ("decoder", ignore_padding_of_a_pattern, "a large batch"),
    "padding ignored in a file of one row": ("one row", ignore_padding, "a large batch"),
    "NaN above 8 rows": ("llama", nan_above_8_rows("input_ids"), "a large batch"),
    "the last id clipped": ("llama", clip_input("input_ids", np.int64(0), np.int64(126)), ""),
    "positions stop at 100": ("decoder", clip_input("position_ids", np.int64(0), np.int64(100)), "the longest prompt"),
    "a cached row doubled from slot 60": ("decoder", double_cache_from_slot_60, "the last slot of the cache"),
    "images clipped at 6": ("vit", clip_input("pixel_values", np.float32(-6), np.float32(6)), "large values"),
    "images clipped at 40": ("vit", clip_input("pixel_values", np.float32(-40), np.float32(40)), "large values"),
    "NaN above 8 images": ("vit", nan_above_8_rows("pixel_values"), "a large batch"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_outside_ordinary_samples_is_found(
    name: str, right: dict[str, tuple[ExportedModel, LoadedModel]], tmp_path: Path
) -> None:
    base, change, covers = FAULTS[name]
    exported, model = right[base]
    planted = plant(exported, tmp_path, change)
    report = verify(planted, model, options=NUMERIC)
    assert not report
    assert any(covers in str(finding) for finding in report.findings), report.findings
    if covers:
        ordinary = verify(planted, model, options=VerifyOptions(static=False, samples=2, coverage=InputCoverage.FAST))
        assert ordinary, "only the covering inputs find it"
        assert ordinary.numeric is not None
        assert any("coverage is fast" in left_out for left_out in ordinary.numeric.not_run)


@pytest.mark.parametrize("base", ["llama", "decoder", "vit"])
def test_the_right_file_passes_and_the_report_says_what_ran(
    base: str, right: dict[str, tuple[ExportedModel, LoadedModel]]
) -> None:
    report = verify(*right[base], options=NUMERIC)
    assert report, report.findings
    assert report.numeric is not None
    ran = "; ".join(report.numeric.ran)
    assert report.numeric.not_run == ()
    wanted = {
        "llama": (
            "batch 1, 2, 3, 33",
            "640 tokens (the longest is 640)",
            "128 of 128 token ids",
            "padding: left, right",
        ),
        "decoder": ("a past of 0, 5, 12, 19, 639 tokens", "slots of the cache up to 640", "128 of 128 token ids"),
        "vit": ("batch 1, 2, 9", "pixel_values from -", "to 852"),
    }[base]
    for words in wanted:
        assert words in ran
    assert "what ran: batch" in str(report)
