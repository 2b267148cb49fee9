"""Classification: how many images a model recognises, and how sure it is of its answers."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.errors import IBNormError, listed, quoted, shortened
from ibnorm_export.evaluation.calibration import binned, calibration_curve, calibration_error
from ibnorm_export.evaluation.images import ImageData, RawImage, open_images
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.evaluation.preprocessing import PROCESSOR_FILE, Preprocessing, find_preprocessing
from ibnorm_export.evaluation.report import ClassResult, Comparison, Confusion, Metric
from ibnorm_export.evaluation.samples import Candidate, Measurement, PerSampleResult, ResultTable, Sample
from ibnorm_export.evaluation.shares import compare_shares, share_metric
from ibnorm_export.evaluation.statistics import bootstrap_interval
from ibnorm_export.files import sha256_of
from ibnorm_export.json_text import json_text
from ibnorm_export.usable_cores import usable_cores

__all__ = ["Classification", "classification_task"]

_BATCH: Final = 16
_TOP: Final = 5

#: Threads that decode images, and wrong answers that a report lists.
_DECODERS: Final = 4
_CONFUSIONS: Final = 30

#: The answer of a model whose outputs are not numbers.
_NONE: Final = "not a number"


def _by_numbers(name: str) -> list[tuple[int, int, str]]:
    """The key by which timm sorts the folders of classes: numbers in names by their value, letters without case."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


class Labels:
    """From the labels of the data to the classes of the model.

    Names that the model knows are looked up. Names that are numbers are the numbers of classes. Else the names in their
    order are the classes, provided that there are as many; this is how image folders are read for training.

    Args:
        names: names of the classes of the data, in the order of their numbers; empty if it states none.
        known: names of the classes of the model; empty if it has none.
        classes: number of classes of the model; 0 if that is unknown.

    Raises:
        IBNormError: the names are not the classes of the model.
    """

    def __init__(self, names: Sequence[str], known: Sequence[str], *, classes: int) -> None:
        self.classes = classes
        self.note = ""
        self._known = tuple(known)
        self._places: dict[str, list[int]] = {}
        for place, name in enumerate(known):
            self._places.setdefault(name, []).append(place)
        self._order = self._classes_of(tuple(names))
        self._numbers = dict(zip(names, self._order, strict=True))

    @property
    def settings(self) -> str:
        """Hash of which class each label is, and of the names that answers have."""
        return sha256_of(json_text([self._known, self._order, self._numbers]).encode())

    def _classes_of(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The class of each name of the data."""
        if names == self._known:  # also with a name that several classes have
            return tuple(range(len(names)))
        if all(name in self._places for name in names):
            return tuple(self._place(name) for name in names)
        if all(name.isdecimal() and (not self.classes or int(name) < self.classes) for name in names):
            return tuple(map(int, names))
        as_many = len(names) == self.classes or not self.classes
        moved = any(place not in self._places.get(name, [place]) for place, name in enumerate(names))
        if not as_many or moved:
            strange = next(name for name in names if name not in self._places)
            shown = f" ({', '.join(self._known[:3])}, ...)" if self._known else ""
            raise IBNormError(
                f"the data has {len(names)} classes, among them {quoted(strange)}; the model has "
                f"{self.classes or len(self._known)}{shown}: name the folders like the model's classes or by their "
                "numbers, or give data of this model's classes"
            )
        if list(names) != sorted(names):
            self.note = (
                f"the {len(names)} classes of the data, in its order, are taken for classes 0 to {len(names) - 1}"
            )
            return tuple(range(len(names)))
        self.note = f"the {len(names)} class folders, sorted by name, are taken for classes 0 to {len(names) - 1}"
        if (other := sorted(names, key=_by_numbers)) != list(names):
            own, timms = next(pair for pair in zip(names, other, strict=True) if pair[0] != pair[1])
            self.note += (
                f"; timm's order of folders differs ({timms} comes before {own}): if the model was trained in that "
                "order, rename the folders to the numbers of the classes"
            )
        return tuple(range(len(names)))

    def _place(self, name: str) -> int:
        """The only class of a name.

        Raises:
            IBNormError: there are several.
        """
        first, *others = self._places[name]
        if others:
            raise IBNormError(
                f"the model has several classes with the name {quoted(name)} ({listed([first, *others])}): name the "
                "classes of the data by their numbers"
            )
        return first

    def number(self, label: int | str, where: str) -> int:
        """Number of the class of a label.

        Raises:
            IBNormError: the model has no such class.
        """
        found: int | None
        if isinstance(label, int) and self._order:
            found = self._order[label] if 0 <= label < len(self._order) else None
        elif isinstance(label, int):
            found = label
        elif label in self._numbers:
            found = self._numbers[label]
        else:
            found = self._place(label) if label in self._places else None
        if found is None or found < 0 or (self.classes and found >= self.classes):
            raise IBNormError(
                f"{where} has the label {quoted(label)}; the model has {self.classes} classes (0 to {self.classes - 1})"
            )
        return found

    def name(self, number: int) -> str:
        """Name of a class, or its number; both if several classes have the name."""
        if 0 <= number < len(self._known):
            name = self._known[number]
            return name if len(self._places[name]) == 1 else f"{name} ({number})"
        names = {index: name for name, index in self._numbers.items()}
        return names.get(number, str(number))


class Classification:
    """The task "classification"; see `EvaluationTask`. A sample is an image.

    Args:
        data: the images.
        labels: which class of the model each label is.
        preprocessing: how images are prepared; None if they are as the model takes them.
        image: shape that the model takes (channels, height, width).
        batch: images that a candidate is asked about at a time.
        limit: number of images; None takes all.
        seed: seed of the bootstrap.
    """

    name = "classification"
    columns = ("label", "prediction", "correct", "top5", "confidence", "loss")

    def __init__(
        self,
        data: ImageData,
        labels: Labels,
        *,
        preprocessing: Preprocessing | None,
        image: tuple[int, ...],
        batch: int = _BATCH,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self._data = data
        self._labels = labels
        self._seed = seed
        self._preprocessing = preprocessing
        self._image = image
        self._limit = limit
        self.batch = batch
        self.total = min(data.total, limit or data.total)
        self.notes: tuple[str, ...] = (labels.note,) if labels.note else ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What results depend on."""
        steps = None if self._preprocessing is None else dict(self._preprocessing.settings)
        return {
            "task": self.name,
            "batch": self.batch,
            "limit": self._limit,
            "preprocessing": steps,
            "labels": self._labels.settings,
        }

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the images from number `start` on.

        Threads decode those of a batch together, and rest while a model runs: on the same cores each would slow the
        other by more than decoding takes.
        """
        images = self._chosen(start)
        with ThreadPoolExecutor(min(_DECODERS, usable_cores())) as pool:
            while batch := list(itertools.islice(images, self.batch)):
                yield from pool.map(self._prepare, batch)

    def _chosen(self, start: int) -> Iterator[RawImage]:
        """The images to take: with a limit and a known number, evenly spaced, because data is sorted by class."""
        if self._limit is None or not self._data.total or self._limit >= self._data.total:
            yield from itertools.islice(self._data.images(start), None if self._limit is None else self._limit - start)
            return
        wanted = [index * self._data.total // self._limit for index in range(start, self._limit)]
        chosen = set(wanted)
        if wanted:
            for index, raw in enumerate(self._data.images(wanted[0]), wanted[0]):
                if index in chosen:
                    yield raw
                if index >= wanted[-1]:
                    return

    def _prepare(self, raw: RawImage) -> Sample:
        label = self._labels.number(raw.label, raw.name)
        try:
            picture = raw.load()
            if self._preprocessing is None:
                pixels = np.asarray(picture, dtype=np.float32)
            else:
                pixels = self._preprocessing.apply(picture, self._image[0] if self._image else 3)
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError, ArithmeticError) as error:
            return Sample(raw.name, unreadable=shortened(str(error) or type(error).__name__))
        if self._image and pixels.shape != self._image:
            source = "the .npz file" if self._preprocessing is None else self._preprocessing.source
            raise IBNormError(
                f"{raw.name}: {source} makes images of shape {pixels.shape}; the model takes {self._image}: give "
                "the settings of this model with --preprocessing"
            )
        return Sample(raw.name, pixels, truth=label)

    def answer(self, candidate: Candidate, samples: Sequence[Sample]) -> Sequence[PerSampleResult]:
        """Ask a candidate about images, and return a result for each.

        Raises:
            IBNormError: the candidate has other classes than the labels.
        """
        logits = candidate.classify(np.stack([sample.content for sample in samples]))
        labels = np.array([sample.truth for sample in samples])
        if int(labels.max()) >= logits.shape[1]:
            raise IBNormError(f"{candidate.name} has {logits.shape[1]} classes; the data has a label {labels.max()}")
        return [self._result(sample, row) for sample, row in zip(samples, logits.astype(np.float64), strict=True)]

    def _result(self, sample: Sample, logits: NDArray[np.float64]) -> PerSampleResult:
        label = int(sample.truth)
        if not np.isfinite(logits).all():
            values = (float(label), -1.0, 0.0, 0.0, 0.0, float("inf"))
            return PerSampleResult(sample.name, _NONE, values=values)
        prediction = int(logits.argmax())
        shifted = logits - logits.max()
        log_sum = float(np.log(np.exp(shifted).sum()))
        own = float(logits[label])
        before = int((logits > own).sum() + (logits[:label] == own).sum())  # of equal logits, the first one wins
        values = (
            float(label),
            float(prediction),
            float(prediction == label),
            float(before < _TOP),
            float(np.exp(-log_sum)),
            log_sum - float(shifted[label]),
        )
        return PerSampleResult(sample.name, self._labels.name(prediction), values=values)

    def truth(self, result: PerSampleResult) -> str:
        """Name of the right class."""
        return self._labels.name(int(result.values[0])) if result.values else ""

    def measure(self, table: ResultTable) -> Measurement:
        """Top-1, top-5 and calibration error, accuracy by class, and the most frequent wrong answers."""
        samples, correct, confidence = len(table), table["correct"], table["confidence"]
        metrics = [
            share_metric("top-1", correct),
            share_metric("top-5", table["top5"]),
        ]
        if samples:
            gaps = binned(confidence, correct)
            value = float(calibration_error(gaps.sum(axis=0), samples))
            low, high = bootstrap_interval(gaps, lambda sums: calibration_error(sums, samples), seed=self._seed)
            # resamples add noise to the error of each bin, which raises it; the interval must contain the value
            metrics.append(Metric("calibration error", value, low=min(low, value), high=max(high, value), share=True))
        return Measurement(
            tuple(metrics),
            curves={"calibration": calibration_curve(confidence, correct)},
            classes=tuple(self._classes(table)),
            confusions=tuple(self._confusions(table)),
        )

    def _classes(self, table: ResultTable) -> Iterator[ClassResult]:
        labels = table["label"].astype(np.int64)
        counts = np.bincount(labels)
        hits = np.bincount(labels, weights=table["correct"])
        for number in np.flatnonzero(counts):
            yield ClassResult(self._labels.name(int(number)), int(counts[number]), float(hits[number] / counts[number]))

    def _confusions(self, table: ResultTable) -> Iterator[Confusion]:
        wrong = table["correct"] == 0.0
        pairs = zip(table["label"][wrong].astype(int), table["prediction"][wrong].astype(int), strict=True)
        for (label, prediction), count in Counter(pairs).most_common(_CONFUSIONS):
            answer = self._labels.name(prediction) if prediction >= 0 else _NONE
            yield Confusion(self._labels.name(label), answer, count)

    def compare(self, table: ResultTable, reference: ResultTable, *, max_drop: float) -> tuple[Comparison, ...]:
        """Drops of top-1, which decides, and top-5, and the increase of the calibration error."""
        top1 = compare_shares("drop of top-1", table["correct"], reference=reference["correct"], max_drop=max_drop)
        top5 = compare_shares("drop of top-5", table["top5"], reference=reference["top5"], max_drop=None)
        return top1, top5, _compare_calibration(table, reference, seed=self._seed)


def _compare_calibration(table: ResultTable, reference: ResultTable, *, seed: int) -> Comparison:
    samples = len(table)
    own = binned(table["confidence"], table["correct"])
    both = np.concatenate([own, binned(reference["confidence"], reference["correct"])], axis=1)
    width = own.shape[1]

    def increase(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        difference: NDArray[np.float64] = calibration_error(sums[..., :width], samples) - calibration_error(
            sums[..., width:], samples
        )
        return difference

    low, high = bootstrap_interval(both, increase, seed=seed)
    return Comparison(
        "increase of calibration error",
        float(increase(both.sum(axis=0))),
        low=low,
        high=high,
        samples=samples,
        method="paired bootstrap, percentiles",
    )


def _find_preprocessing(candidates: Sequence[Candidate], folder: Path | None, data: ImageData) -> Preprocessing | None:
    """The settings of the options or of the first candidate that has some; those of candidates must agree.

    Raises:
        IBNormError: there are none, or two candidates have different ones.
    """
    if data.prepared:
        return None
    if folder is not None:
        found = find_preprocessing(folder)
        if found is None:
            raise IBNormError(f"{folder} has neither {PROCESSOR_FILE} nor a config.json of timm with pretrained_cfg")
        return found
    folders = [c.facts.folder for c in candidates if c.facts.folder is not None]
    stated = [found for place in folders if (found := find_preprocessing(place)) is not None]
    if not stated:
        raise IBNormError(
            f"no candidate has a {PROCESSOR_FILE}, so it is not known how images are prepared; copy it into the "
            "checkpoint, or name its folder with --preprocessing"
        )
    for other in stated[1:]:
        if other.settings != stated[0].settings:
            raise IBNormError(
                f"{other.source} prepares images in another way than {stated[0].source}; name the right one with "
                "--preprocessing"
            )
    return stated[0]


def classification_task(
    candidates: Sequence[Candidate], data: str | Path, *, options: EvaluationOptions
) -> Classification:
    """Make the task for candidates that all see the same images.

    Raises:
        IBNormError: there are no images, or the labels are not the model's classes, or the preprocessing is not known.
    """
    images = open_images(data)
    facts = [candidate.facts for candidate in candidates]
    _check_same_classes(candidates)
    known = next((f.class_names for f in facts if f.class_names), ())
    classes = next((f.classes for f in facts if f.classes), len(known))
    shapes = {f.image for f in facts if f.image}
    if len(shapes) > 1:
        raise IBNormError(f"the candidates take images of different shapes: {sorted(shapes)}; evaluate them one by one")
    return Classification(
        images,
        Labels(images.class_names, known, classes=classes),
        preprocessing=_find_preprocessing(candidates, options.preprocessing, images),
        image=next(iter(shapes), ()),
        batch=options.batch or _BATCH,
        limit=options.limit,
        seed=options.seed,
    )


def _check_same_classes(candidates: Sequence[Candidate]) -> None:
    """Refuse candidates that answer in different classes: one of them would be scored by the other's.

    Raises:
        IBNormError: the number or the names of their classes differ.
    """
    stated = [(c.name, c.facts.class_names) for c in candidates if c.facts.class_names]
    for name, names in stated[1:]:
        first, others = stated[0]
        if names != others:
            pairs = itertools.zip_longest(others, names, fillvalue="missing")
            place, (own, other) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
            raise IBNormError(
                f"the candidates have different classes: class {place} is {quoted(own)} in {first}, and "
                f"{quoted(other)} in {name}; evaluate them one by one, or correct id2label in config.json"
            )
    counts = {c.facts.classes: c.name for c in candidates if c.facts.classes}
    if len(counts) > 1:
        told = " and ".join(f"{number} in {name}" for number, name in counts.items())
        raise IBNormError(f"the candidates have different numbers of classes: {told}; evaluate them one by one")
