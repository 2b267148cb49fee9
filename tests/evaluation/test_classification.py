"""Accuracy, calibration and labels of classifiers, and every layout of labelled images."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ibnorm_export import EvaluationOptions, IBNormError, evaluate, load
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.evaluation.calibration import binned, calibration_error
from ibnorm_export.evaluation.classification import Labels
from ibnorm_export.evaluation.images import open_images
from ibnorm_export.evaluation.preprocessing import find_preprocessing
from ibnorm_export.evaluation.report import EvaluationReport
from ibnorm_export.evaluation.samples import ModelFacts
from tests.support.fake_candidates import FakeCandidate

pillow = pytest.importorskip("PIL.Image", reason="the extra `evaluate` is not installed")

CLASSES = ("ant", "bee", "cat")


def by_colour(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Class 0 for red, 1 for green, 2 for blue."""
    return images.mean(axis=(2, 3)) * 10.0


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pictures() -> list[tuple[str, bytes]]:
    """24 PNGs (class, bytes), of which the model takes 2 for another class."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(24):
        label = index % 3
        pixels = rng.integers(0, 40, (12, 9, 3)).astype(np.uint8)
        pixels[:, :, label if index > 1 else 2] += 120
        buffer = io.BytesIO()
        pillow.fromarray(pixels).save(buffer, format="PNG")
        found.append((CLASSES[label], buffer.getvalue()))
    return sorted(found, key=lambda pair: pair[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pictures: list[tuple[str, bytes]]) -> Path:
    root = tmp_path_factory.mktemp("images")
    for index, (name, content) in enumerate(pictures):
        (root / name).mkdir(exist_ok=True)
        (root / name / f"{index:03}.png").write_bytes(content)
    return root


def run(data: Path, processor: Path | None, *, classes: int = 3, **options: object) -> EvaluationReport:
    facts = ModelFacts(classes=classes, image=(3, 8, 8))
    candidate = FakeCandidate("colour", by_colour, facts=facts)
    wanted = EvaluationOptions(preprocessing=processor, **options)  # type: ignore[arg-type]  # options by name
    return evaluate(candidate, task="classification", data=data, options=wanted)


def top1(report: EvaluationReport) -> float:
    return report.candidates[0].metrics[0].value


def test_a_folder_for_each_class(folder: Path, processor: Path) -> None:
    report = run(folder, processor)
    assert top1(report) == pytest.approx(22 / 24)
    result = report.candidates[0]
    assert [(c.name, c.samples) for c in result.classes] == [(name, 8) for name in CLASSES]
    assert [(c.truth, c.answer, c.count) for c in result.confusions] == [("ant", "cat", 1), ("bee", "cat", 1)]
    assert "sorted by name" in report.notes[0]


def test_every_layout_gives_the_same_result(
    folder: Path, processor: Path, pictures: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    shard = tmp_path / "shards" / "00000.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        for index, (name, content) in enumerate(pictures):
            for ending, body in (("png", content), ("cls", str(CLASSES.index(name)).encode())):
                member = tarfile.TarInfo(f"{index:05}.{ending}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
    images = np.stack([np.asarray(pillow.open(io.BytesIO(content))) for _, content in pictures])
    labels = np.array([CLASSES.index(name) for name, _ in pictures])
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    expected = run(folder, processor).candidates[0].metrics
    assert run(shard.parent, processor).candidates[0].metrics == expected
    assert run(tmp_path / "images.npz", processor).candidates[0].metrics == expected
    arrow = pytest.importorskip("pyarrow", reason="the extra `evaluate` is not installed")
    import pyarrow.parquet

    structs = [{"bytes": content, "path": None} for _, content in pictures]
    table = arrow.table({"image": structs, "label": labels})
    features = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "images.parquet"
    )
    assert run(tmp_path / "images.parquet", processor).candidates[0].metrics == expected


def test_arrays_as_the_model_takes_them_need_no_preprocessing(tmp_path: Path) -> None:
    images = np.zeros((12, 3, 8, 8), dtype=np.float32)
    labels = np.arange(12) % 3
    images[np.arange(12), labels] = 1.0
    np.savez(tmp_path / "images.npz", x=images, y=labels)
    assert top1(run(tmp_path / "images.npz", None)) == 1.0


def test_an_exported_model_answers_like_its_checkpoint(
    exported_vit: ExportedModel, vit_checkpoint: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((40, 1, 8, 8)).astype(np.float32)
    model = load(vit_checkpoint)
    import torch

    with torch.inference_mode():
        logits = model.in_float64()(pixel_values=torch.from_numpy(images).double()).logits.numpy()
    labels = rng.integers(0, 10, 40)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    report = evaluate(exported_vit, task="classification", data=tmp_path / "images.npz", against=model)
    for candidate in report.candidates:
        assert candidate.metrics[0].value == pytest.approx((logits.argmax(-1) == labels).mean())
        top5 = np.argsort(-logits, axis=-1)[:, :5] == labels[:, None]
        assert candidate.metrics[1].value == pytest.approx(top5.any(-1).mean())


def test_a_limit_takes_images_of_all_classes(folder: Path, processor: Path) -> None:
    report = run(folder, processor, limit=6)
    assert [(c.name, c.samples) for c in report.candidates[0].classes] == [(name, 2) for name in CLASSES]


def test_unreadable_images_are_named_and_tolerated_up_to_a_share(folder: Path, processor: Path, tmp_path: Path) -> None:
    import shutil

    data = tmp_path / "images"
    shutil.copytree(folder, data)
    (data / "bee" / "empty.png").write_bytes(b"")
    (data / "cat" / "text.jpg").write_bytes(b"not an image")
    with pytest.raises(
        IBNormError, match=r"2 of 26 samples are unreadable.*bee/empty.png: it is empty.*--max-unreadable"
    ):
        run(data, processor)
    report = run(data, processor, max_unreadable=0.1)
    assert {name for name, _ in report.unreadable} == {"bee/empty.png", "cat/text.jpg"}
    assert report.candidates[0].samples == 24
    assert top1(report) == pytest.approx(22 / 24)
    assert "warning: bee/empty.png is unreadable" in str(report)


@pytest.mark.parametrize(
    ("names", "known", "classes", "expected"),
    [
        (("bee", "ant"), ("ant", "bee", "cat"), 3, {"bee": 1, "ant": 0}),
        (("0", "2", "10"), (), 11, {"0": 0, "2": 2, "10": 10}),
        (("n01", "n02"), ("tench", "goldfish"), 2, {"n01": 0, "n02": 1}),
    ],
)
def test_labels(names: tuple[str, ...], known: tuple[str, ...], classes: int, expected: dict[str, int]) -> None:
    labels = Labels(names, known, classes=classes)
    assert {name: labels.number(name, "here") for name in names} == expected


def test_labels_that_are_not_the_models_classes(folder: Path, processor: Path, tmp_path: Path) -> None:
    with pytest.raises(IBNormError, match="the data has 3 classes, among them 'ant'; the model has 10"):
        run(folder, processor, classes=10)
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 3, 8, 8), np.float32), labels=np.array([0, 1, 2, 7]))
    with pytest.raises(IBNormError, match=r"images.npz:3 has the label 7; the model has 3 classes \(0 to 2\)"):
        run(tmp_path / "images.npz", None)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_a_damaged_shard(tmp_path: Path, processor: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(IBNormError, match=r"is not a tar file|no sample|no labelled images"):
        run(tmp_path, processor)


def shard(pictures: list[tuple[str, bytes]], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]  # modes by parameter
        for index, (label, content) in enumerate(pictures):
            for ending, body in (("png", content), ("cls", str(CLASSES.index(label)).encode())):
                member = tarfile.TarInfo(f"{index:03}.{ending}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_shard_that_loses_samples_is_refused(
    pictures: list[tuple[str, bytes]], processor: Path, tmp_path: Path, mode: str, damage: str
) -> None:
    """Python's tarfile takes a file that is cut between two samples, or has a damaged header, for a shorter one."""
    whole = shard(pictures, "w")
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        place = archive.getmembers()[20].offset
    broken = whole[:place] if damage == "cut" else whole[:place] + b"#" * tarfile.BLOCKSIZE + whole[place + 512 :]
    pack = {"w": bytes, "w:gz": gzip.compress, "w:bz2": bz2.compress, "w:xz": lzma.compress}[mode]
    file = tmp_path / "0.tar"
    file.write_bytes(pack(broken))
    with pytest.raises(IBNormError, match="it is cut off, or damaged after its last readable member"):
        run(file, processor)
    file.write_bytes(shard(pictures, mode))
    assert run(file, processor).candidates[0].samples == len(pictures)
    if mode != "w":
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(IBNormError, match="is not a tar file, or is damaged"):
            run(file, processor)


def test_data_without_samples_is_refused(processor: Path, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(shard([], "w"))
    with pytest.raises(IBNormError, match="the data has no samples"):
        run(tmp_path, processor)


def test_damaged_pages_of_parquet_are_one_line(
    pictures: list[tuple[str, bytes]], processor: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `evaluate` is not installed")
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `evaluate` is not installed")
    file = tmp_path / "0.parquet"
    columns = {"image": [{"bytes": content} for _, content in pictures], "label": [0] * len(pictures)}
    parquet.write_table(pyarrow.table(columns), file, compression="none")
    content = bytearray(file.read_bytes())
    for place in range(4, len(content) // 3, 7):
        content[place] ^= 0x5A
    file.write_bytes(bytes(content))
    with pytest.raises(IBNormError, match="cannot be read") as caught:
        run(file, processor)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is .* values are divided by it, so it must be above 0"),
        ({"image_mean": [0.5, 0.5]}, "mean has 2 numbers, and images have 3 channels; it must have 1 or 3"),
    ],
)
def test_settings_that_no_image_survives(
    folder: Path, tmp_path: Path, settings: dict[str, list[float]], message: str
) -> None:
    config = {"size": {"height": 8, "width": 8}, **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(IBNormError, match=message):
        run(folder, tmp_path, max_unreadable=1.0)


def test_arrays_that_are_not_numbers_are_unreadable(tmp_path: Path) -> None:
    """Else both models give no answer to them, and the candidate passes."""
    images = np.zeros((4, 3, 8, 8), np.float32)
    images[2, 0, 0, 0] = np.nan
    np.savez(tmp_path / "images.npz", images=images, labels=np.zeros(4, int))
    report = run(tmp_path / "images.npz", None, max_unreadable=0.25)
    assert report.unreadable == (("images.npz:2", "it has values that are not finite numbers"),)
    with pytest.raises(IBNormError, match=r"1 of 4 samples are unreadable.*\(images.npz:2: it has values"):
        run(tmp_path / "images.npz", None)


def test_missing_data_and_preprocessing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(IBNormError, match="does not exist; nothing is downloaded: put there a folder"):
        run(tmp_path / "nowhere", None)
    with pytest.raises(IBNormError, match=r"no candidate has a preprocessor_config.json"):
        run(folder, None)


def test_calibration_error() -> None:
    """Two bins: 4 answers sure to 0.9 of which 2 are right, and 6 sure to 0.5 of which 3 are right."""
    confidence = np.array([0.9] * 4 + [0.5] * 6)
    correct = np.array([1.0, 1.0, 0.0, 0.0] + [1.0, 0.0] * 3)
    assert calibration_error(binned(confidence, correct).sum(axis=0), 10) == pytest.approx(0.4 * 0.4)


def test_an_npz_file_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((0, 3, 8, 8), np.float32), labels=np.zeros(0, int))
    with pytest.raises(IBNormError, match=r"images.npz has no images: its array images is empty; nothing is downl"):
        run(tmp_path / "images.npz", None)


def test_image_folders_are_the_classes_in_the_order_of_torchvision(tmp_path: Path) -> None:
    """Plain text order, as ImageFolder and `datasets` sort, and as models are trained. timm has another."""
    for name in ("c2", "c10", "Z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
    names = open_images(tmp_path).class_names
    assert names == ("Z", "c10", "c2")
    labels = Labels(names, (), classes=3)
    assert [labels.number(name, "here") for name in names] == [0, 1, 2]
    assert "timm's order of folders differs (c2 comes before Z)" in labels.note


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        (("Cat", "ant", "bee"), ("cat", "bee", "ant"), "3 classes, among them 'Cat'; the model has 3 .cat, bee, ant"),
        (("crane", "tench"), ("crane", "tench", "crane"), r"several classes with the name 'crane' \(0, 2\)"),
    ],
)
def test_names_that_do_not_show_the_class(names: tuple[str, ...], known: tuple[str, ...], message: str) -> None:
    """A misspelt name must not move every class, and a name of two classes must not stand for one of them."""
    with pytest.raises(IBNormError, match=message):
        Labels(names, known, classes=3)


def test_numbers_of_classes_hold_where_two_classes_have_one_name() -> None:
    """ImageNet has two classes "crane"."""
    labels = Labels(("crane", "tench", "crane"), ("crane", "tench", "crane"), classes=3)
    assert [labels.number(number, "here") for number in range(3)] == [0, 1, 2]
    assert [labels.name(number) for number in range(3)] == ["crane (0)", "tench", "crane (2)"]
    with pytest.raises(IBNormError, match="has the label -1"):
        labels.number(-1, "here")


def test_names_of_the_data_are_matched_with_those_of_the_model() -> None:
    labels = Labels(("bee", "ant"), ("ant", "bee", "cat"), classes=3)
    assert [labels.number(number, "here") for number in range(2)] == [1, 0]


def test_results_do_not_outlive_the_classes_that_labels_meant(folder: Path, processor: Path, tmp_path: Path) -> None:
    """Alone, the file takes the folders in their order; beside a checkpoint, its names decide."""
    rules = {"file": by_colour, "checkpoint": lambda images: by_colour(images)[:, ::-1]}
    named = ModelFacts(classes=3, image=(3, 8, 8), class_names=CLASSES[::-1])
    candidates = {name: FakeCandidate(name, rule, facts=named) for name, rule in rules.items()}
    candidates["file"].facts = ModelFacts(classes=3, image=(3, 8, 8))
    options = EvaluationOptions(preprocessing=processor, results=tmp_path)
    first = evaluate(candidates["file"], task="classification", data=folder, options=options)
    assert top1(first) == pytest.approx(22 / 24)
    both = evaluate(
        candidates["file"], task="classification", data=folder, against=candidates["checkpoint"], options=options
    )
    assert [c.metrics[0].value for c in both.candidates] == [pytest.approx(22 / 24), pytest.approx(8 / 24)]
    assert both.candidates[1].cached == 0


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"class_names": ("bee", "ant", "cat")}, "class 0 is 'ant' in one, and 'bee' in two; evaluate them one by one"),
        ({"classes": 4}, "different numbers of classes: 3 in one and 4 in two"),
    ],
)
def test_candidates_of_different_classes_are_refused(
    folder: Path, processor: Path, facts: dict[str, object], message: str
) -> None:
    stated = {"classes": 3, "class_names": CLASSES, "image": (3, 8, 8)}
    one, two = ModelFacts(**stated), ModelFacts(**{**stated, **facts})  # type: ignore[arg-type]  # facts by name
    candidates = [FakeCandidate("one", by_colour, facts=one), FakeCandidate("two", by_colour, facts=two)]
    options = EvaluationOptions(preprocessing=processor)
    with pytest.raises(IBNormError, match=message):
        evaluate(candidates, task="classification", data=folder, options=options)


def test_bytes_whose_channels_come_first_are_refused(processor: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 3, 8, 8), np.uint8), labels=np.zeros(4, int))
    with pytest.raises(IBNormError, match=r"images have shape \(4, 3, 8, 8\) and dtype uint8; they must be uint8"):
        run(tmp_path / "images.npz", processor)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (
            {"image_processor_type": "EfficientNetImageProcessor"},
            "image_processor_type is 'EfficientNetImageProcessor'",
        ),
        ({"image_processor_type": "PoolFormerImageProcessorFast"}, "image_processor_type is 'PoolFormer"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
    ],
)
def test_processors_with_further_steps_are_refused(tmp_path: Path, settings: dict[str, object], what: str) -> None:
    config = {"size": {"height": 8, "width": 8}, **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(IBNormError, match=f"{what}.*takes further steps: give prepared images in an .npz file"):
        find_preprocessing(tmp_path)


def test_data_without_a_readable_sample_is_refused(processor: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
    with pytest.raises(
        IBNormError, match=r"no sample could be read, so there is nothing to evaluate; ant/0.png: it is"
    ):
        run(tmp_path, processor, max_unreadable=1.0)
