"""Verdicts of `evaluate` on simulated pairs, its overhead and memory, and its answers against those of other codes.

Simulation: pairs are drawn with no drop, with a drop at the limit, and with twice that, as many as `evaluate` states
that it needs. A verdict of "pass" at the limit or beyond is false. The answers are compared with those of lm-eval's own
model `hf` (extra lm-eval-test) and of a validation loop of timm and torchvision (PYTHONPATH=build/vision).
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from ibnorm_export import EvaluationOptions, IBNormSpec, export, load
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.evaluation.candidates import ModelCandidate, exported_candidate
from ibnorm_export.evaluation.choice import choice_task
from ibnorm_export.evaluation.classification import classification_task
from ibnorm_export.evaluation.evaluate import evaluate
from ibnorm_export.evaluation.perplexity import perplexity_task
from ibnorm_export.evaluation.samples import EvaluationTask
from ibnorm_export.evaluation.statistics import (
    POWER,
    bootstrap_ratio_interval,
    decide,
    paired_share_interval,
    pairs_needed,
    units_needed,
)
from ibnorm_export.progress import silent

#: Tokens of a window of the language model.
_WINDOW = 512

#: Turns of `evaluate` and of the runtime by itself.
_TURNS = 3

#: Number of windows from which the number that is needed is computed.
_PILOT = 20

#: The largest drop that passes, and the share of pairs of which exactly one is right.
LIMIT = 0.005
DIFFERING = 0.02

#: Relative spread of the loss difference of a window: heavy tails, as where a few windows contain all that changed.
SPREAD = 0.03

SCENARIOS = {"no drop": 0.0, "a drop at the limit": LIMIT, "twice the limit": 2.0 * LIMIT}

_Decider = Callable[[float, np.random.Generator, int], tuple[Decision, int]]


def decide_shares(drop: float, rng: np.random.Generator, trial: int) -> tuple[Decision, int]:
    """One verdict on top-1, on as many pairs as are stated to be needed."""
    differing = max(DIFFERING, drop)
    planned = drop if drop != LIMIT else 0.0
    samples = pairs_needed(differing, drop=planned, max_drop=LIMIT) or 0
    lost, gained, _ = rng.multinomial(samples, [(differing + drop) / 2, (differing - drop) / 2, 1.0 - differing])
    return decide(*paired_share_interval(int(lost), int(gained), samples=samples), max_drop=LIMIT), samples


def decide_perplexity(drop: float, rng: np.random.Generator, trial: int) -> tuple[Decision, int]:
    """One verdict on perplexity, on as many windows as are stated to be needed."""
    half = 1.959964 * SPREAD / math.sqrt(_PILOT)
    planned = drop if drop != LIMIT else 0.0
    samples = units_needed(_PILOT, drop=planned, low=planned - half, high=planned + half, max_drop=LIMIT) or 0
    tokens = rng.integers(200, 513, samples).astype(np.float64)
    noise = rng.standard_t(4, samples) * SPREAD / math.sqrt(2.0)  # Student's t with 4 degrees of freedom: variance 2
    _, low, high = bootstrap_ratio_interval((math.log1p(drop) + noise) * tokens, tokens, seed=trial)
    return decide(math.expm1(low), math.expm1(high), max_drop=LIMIT), samples


def verdict_rows(trials: int) -> Iterator[Row]:
    """The shares of verdicts in each scenario."""
    for name, decider in (("top-1", decide_shares), ("perplexity", decide_perplexity)):
        for scenario, drop in SCENARIOS.items():
            rng = np.random.default_rng(0)
            made = [decider(drop, rng, trial) for trial in range(trials)]
            verdicts = [decision for decision, _ in made]
            shares = {decision.value: verdicts.count(decision) / trials for decision in Decision}
            figures = {key: Figure(share) for key, share in shares.items()} | {"samples": Figure(made[0][1])}
            if drop == 0.0:
                targets = (Target("pass", POWER, at_least=True), Target("fail", 0.05))
            elif drop == LIMIT:
                targets = (Target("pass", 0.05), Target("fail", 0.05))
            else:
                targets = (Target("pass", 0.05), Target("fail", POWER, at_least=True))
            yield Row(f"{name}, {scenario}", figures, targets=targets, details={"trials": trials})


def _picture(rng: np.random.Generator) -> bytes:
    """A JPEG of 500 x 375 pixels, smooth as photographs are."""
    from PIL import Image

    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _classifier(folder: Path, size: str) -> tuple[ModelCandidate, EvaluationTask, Path]:
    from ibnorm_export.models.new_models import new_model, save

    checkpoint = folder / size
    save(new_model(size, IBNormSpec("T", 3.0, epsilon=1e-5)), checkpoint)
    (checkpoint / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "do_center_crop": true, '
        '"crop_size": {"height": 224, "width": 224}, "resample": 3}',
        encoding="utf-8",
    )
    exported = export(load(checkpoint), checkpoint / "model.onnx")
    data = folder / "images"
    rng = np.random.default_rng(0)
    for index in range(192):
        place = data / str(index % 8)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:03}.jpg").write_bytes(_picture(rng))
    options = EvaluationOptions()
    candidate = exported_candidate(exported, name=size, options=options)
    return candidate, classification_task([candidate], data, options=options), data


def _language_model(folder: Path, size: str) -> tuple[Path, ExportedModel]:
    """A checkpoint with a tokenizer, and its export, both made once."""
    from ibnorm_export.models.new_models import new_model, save

    checkpoint = folder / size
    if not checkpoint.exists():
        save(new_model(size, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)), checkpoint)
        write_large_tokenizer(checkpoint, 32_000)
        export(load(checkpoint), checkpoint / "model.onnx")
    return checkpoint, ExportedModel(checkpoint / "model.onnx")


def _texts() -> str:
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values())


def _reader(folder: Path, size: str) -> tuple[ModelCandidate, EvaluationTask, Path]:
    _, exported = _language_model(folder, size)
    data = folder / "text.txt"
    data.write_text(_texts()[:24_000], encoding="utf-8")
    options = EvaluationOptions(max_length=_WINDOW)
    candidate = exported_candidate(exported, name=size, options=options)
    task = perplexity_task([candidate], data, options=options, progress=silent)
    return candidate, task, data


def _chooser(folder: Path, size: str) -> tuple[ModelCandidate, EvaluationTask, Path]:
    """Questions of 150 bytes with four choices of 40 bytes, about as long as those of HellaSwag."""
    _, exported = _language_model(folder, size)
    data, text = folder / "questions.jsonl", _texts()
    lines = []
    for start in range(0, 64 * 400, 400):
        choices = [text[start + offset : start + offset + 40].strip() or "nothing" for offset in (150, 190, 230, 270)]
        lines.append(json.dumps({"question": text[start : start + 150], "choices": choices, "answer": 0}))
    data.write_text("\n".join(lines), encoding="utf-8")
    options = EvaluationOptions(max_length=_WINDOW)
    candidate = exported_candidate(exported, name=size, options=options)
    return candidate, choice_task([candidate], data, options=options), data


def write_large_tokenizer(folder: Path, size: int) -> None:
    """The tokenizer of bytes with further tokens that no text has, so that it fits the vocabulary of a model."""
    from tokenizers import Tokenizer

    write_byte_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<unused {index}>" for index in range(size - 256)])
    tokenizer.save(str(folder / "tokenizer.json"))


def overhead_row(
    name: str, candidate: ModelCandidate, task: EvaluationTask, *, data: Path, options: EvaluationOptions
) -> Row:
    """Time of `evaluate` after the model is open, over the time of the runtime on the same batches.

    The two take turns, and the median of the ratios counts, so that other work on the machine slows both.
    """
    samples = list(task.samples(0))
    batches = [samples[start : start + task.batch] for start in range(0, len(samples), task.batch)]
    task.answer(candidate, batches[0])  # opens the model
    ratios, owns = [], []
    for _ in range(_TURNS):
        before = candidate.seconds
        for batch in batches:
            task.answer(candidate, batch)
        owns.append(candidate.seconds - before)
        start = time.perf_counter()
        report = evaluate(candidate, task=task.name, data=data, options=options)
        ratios.append((time.perf_counter() - start) / owns[-1])
        assert report.candidates[0].samples == len(samples)
    figures = {
        "overhead": Figure(statistics.median(ratios) - 1.0),
        "runtime": Figure(statistics.median(owns), "s"),
        "samples": Figure(len(samples)),
    }
    turns = {"overhead of each turn": [round(ratio - 1.0, 4) for ratio in ratios]}
    return Row(f"{name}: evaluate over the runtime", figures, targets=(Target("overhead", 0.1),), details=turns)


#: Forms of data whose memory is measured; a folder has no ending.
_STORED = (
    *(("classification", suffix) for suffix in (".tar", ".npz", ".parquet", "")),
    *(("perplexity", suffix) for suffix in (".jsonl", ".parquet")),
)

#: Numbers of samples. Both are above 10,000, so that buffers of a fixed number of rows are full in both.
_COUNTS = (10_000, 40_000)

_MEMORY = """
import resource, sys
from benchmarks.suites.evaluation import run_for_memory
run_for_memory(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def run_for_memory(task: str, data: str) -> None:
    """Evaluate a rule in place of a model, so that the memory is that of `evaluate`."""
    from ibnorm_export.evaluation.samples import ModelFacts
    from tests.support.fake_candidates import FakeCandidate

    rule = {
        "classification": lambda images: images.mean(axis=(2, 3)),
        "perplexity": lambda tokens: np.zeros((len(tokens), 256), dtype=np.float32),
    }[task]
    folder = Path(data).parent
    facts = ModelFacts(classes=3, image=(3, 16, 16)) if task == "classification" else ModelFacts(vocabulary=256)
    candidate = FakeCandidate("rule", rule, facts=facts)
    options = EvaluationOptions(tokenizer=folder, preprocessing=folder, max_length=256, results=Path(data + ".results"))
    evaluate(candidate, task=task, data=data, options=options)


def memory_rows(folder: Path) -> Iterator[Row]:
    """Peak memory of a process on data of two sizes."""
    from PIL import Image

    write_byte_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}', encoding="utf-8"
    )
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 20, 20)).save(buffer, format="PNG")
    write = functools.partial(_write_data, picture=buffer.getvalue())
    for task, suffix in _STORED:
        peaks = {}
        for count in _COUNTS:
            data = folder / f"{task}-{count}{suffix}"
            write(data, task=task, count=count)
            command = [sys.executable, "-c", _MEMORY, task, str(data)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[count] = float(done.stdout)
        figures = {f"{count} samples": Figure(peak, "MiB") for count, peak in peaks.items()}
        few, many = _COUNTS
        figures["growth"] = Figure((peaks[many] - peaks[few]) / (many - few) * 1024, "KiB per sample")
        yield Row(f"{task}, {suffix or 'image folder'}: peak memory", figures, targets=(Target("growth", 1.0),))


def _write_data(path: Path, *, task: str, count: int, picture: bytes) -> None:
    """Write `count` equal samples in the form that the ending of the name states; without one, a folder of images."""
    text, suffix = "word " * 50, path.suffix
    if suffix == ".tar":
        _write_shard(path, picture, count)
    elif suffix == ".npz":
        np.savez(path, images=np.zeros((count, 32, 32, 3), dtype=np.uint8), labels=np.arange(count) % 3)
    elif suffix == ".jsonl":
        path.write_text(f"{json.dumps({'text': text})}\n" * count, encoding="utf-8")
    elif suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        numbers = range(count)
        columns = (
            {"text": [text for _ in numbers]}
            if task == "perplexity"
            else {"image": [{"bytes": picture, "path": f"{n}.png"} for n in numbers], "label": [n % 3 for n in numbers]}
        )
        parquet.write_table(pyarrow.table(columns), path, row_group_size=1_000, use_dictionary=False)
    else:
        for number in range(count):
            place = path / str(number % 3)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:06}.png").write_bytes(picture)


def _write_shard(path: Path, picture: bytes, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for index in range(count):
            for ending, body in (("png", picture), ("cls", str(index % 3).encode())):
                member = tarfile.TarInfo(f"{index:06}.{ending}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))


def harness_row(folder: Path) -> Row:
    """Log-probabilities of 500 requests against lm-eval's own model around the checkpoint's module."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed: pip install 'ibnorm-export[lm-eval-test]'") from missing
    from transformers import AutoTokenizer

    from ibnorm_export.evaluation.harness import IBNormLM
    from ibnorm_export.exporter.text_folder import export_folder
    from tests.support.harness_requests import request_pairs, save_harness_checkpoint

    checkpoint = save_harness_checkpoint(folder / "harness")
    model = load(checkpoint, task="text-generation")
    export_folder(model, folder / "harness-exported")
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    theirs = HFLM(pretrained=model.module, tokenizer=tokenizer, max_length=64, batch_size=1, device="cpu")
    own = IBNormLM(str(folder / "harness-exported"), batch_size=8, tokenizer=str(checkpoint))
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index, metadata=("test", index, 1))
        for index, pair in enumerate(request_pairs())
    ]
    found, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (own, theirs))
    figures = {
        "largest difference": Figure(max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True))),
        "other answers": Figure(sum(a != b for (_, a), (_, b) in zip(found, expected, strict=True))),
        "requests": Figure(len(requests)),
    }
    targets = (Target("largest difference", 1e-4), Target("other answers", 0))
    return Row("log-probabilities against lm-eval's model hf", figures, targets=targets)


def validation_row(folder: Path) -> Row:
    """Predictions, top-1 and top-5 against timm's transform in a loop of torchvision's ImageFolder."""
    import torch

    from tests.support.validation_loop import make_validation, validation_loop

    try:
        make_validation(folder / "validation")
    except ModuleNotFoundError as missing:
        raise Unavailable(
            f"{missing.name} is not installed: make build/vision/.ready, PYTHONPATH=build/vision"
        ) from missing
    torch.manual_seed(0)
    predictions, top1, top5 = validation_loop(folder / "validation")
    options = EvaluationOptions(results=folder / "validation-results")
    report = evaluate(
        folder / "validation/model", task="classification", data=folder / "validation/val", options=options
    )
    journal = next((folder / "validation-results").glob("*.jsonl")).read_text(encoding="utf-8").splitlines()[1:]
    own = [int(json.loads(line)[2][1]) for line in journal]
    metrics = report.candidates[0].metrics
    figures = {
        "other predictions": Figure(sum(a != b for a, b in zip(own, predictions, strict=True))),
        "top-1 difference": Figure(round(metrics[0].value * len(own)) - top1),
        "top-5 difference": Figure(round(metrics[1].value * len(own)) - top5),
        "images": Figure(len(own)),
        "top-1": Figure(metrics[0].value),
    }
    targets = tuple(
        target
        for name in ("other predictions", "top-1 difference", "top-5 difference")
        for target in (Target(name, 0), Target(name, 0, at_least=True))
    )
    return Row("predictions against a validation loop of timm and torchvision", figures, targets=targets)


#: What the suite measures, in its order.
_PARTS = ("verdict", "harness", "validation", "memory", "overhead")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    parser.add_argument("--trials", type=int, default=300, help="Number of simulated evaluations (300).")
    parser.add_argument("--parts", default=",".join(_PARTS), help=f"What to measure ({','.join(_PARTS)}).")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure the parts that are named; of others, what the record has stays in it."""
    from tests.support import vision_operators  # torchvision asks for operators that a CPU build lacks

    assert vision_operators is not None
    parts = options.parts.split(",")
    before = [] if set(parts) >= set(_PARTS) else report.recorded_rows()
    with tempfile.TemporaryDirectory() as place:
        for row in _rows(parts, Path(place), trials=options.trials):
            report.add(row)
            names = {found.name for found in report.rows}
            report.recorded = [found for found in before if found["name"] not in names]
            report.save()


def _rows(parts: list[str], folder: Path, *, trials: int) -> Iterator[Row]:
    if "verdict" in parts:
        yield from verdict_rows(trials)
    if "harness" in parts:
        yield harness_row(folder)
    if "validation" in parts:
        yield validation_row(folder)
    if "memory" in parts:
        yield from memory_rows(folder)
    if "overhead" in parts:
        for make, size, settings in (
            (_classifier, "vit-s16", EvaluationOptions()),
            (_reader, "llama-60m", EvaluationOptions(max_length=_WINDOW)),
            (_chooser, "llama-60m", EvaluationOptions(max_length=_WINDOW)),
        ):
            candidate, task, data = make(folder, size)
            yield overhead_row(f"{size}, {task.name}", candidate, task, data=data, options=settings)
