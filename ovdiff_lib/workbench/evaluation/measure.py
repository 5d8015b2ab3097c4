"""The evaluation protocol (Sec. 4): predictions at the original resolution against label maps, of one method or many.

:func:`evaluate` measures one segmenter, :func:`measure` many methods on the same images, as the tables need. Resizing
and windows belong to the segmenter (profile section ``matching``); label maps are never resized.
"""

import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib.categories import BACKGROUND, Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.metrics import ConfusionMatrix
from ovdiff_lib.workbench.data.samples import Dataset, Sample, SavedPredictions
from ovdiff_lib.workbench.evaluation.results import Counts, code_digest, stored

Predict = Callable[[np.ndarray], np.ndarray]
"""Image u8 (H, W, 3) -> labels int (H, W), 0 = background, i + 1 = category i of the data set's vocabulary."""

SAVE_EVERY = 60.0
"""Seconds between two writings of unfinished counts: a killed run loses no more."""


@dataclass(frozen=True)
class EvaluationResult:
    """What one of a method's label maps, number ``variant``, is worth on the images of a data set: ``confusion`` i64
    (K, K), rows true, columns predicted, by ``class_names`` (background first, where it is a class)."""

    dataset: str
    class_names: tuple[str, ...]
    confusion: np.ndarray
    counts: Counts = field(repr=False)
    variant: int = 0

    images = property(lambda self: len(self.counts))
    note = property(lambda self: self.counts.note)
    iou = cached_property(lambda self: ConfusionMatrix(len(self.confusion), counts=self.confusion).iou())
    """f64 (K,) in [0, 1]; nan for a class that occurs nowhere."""
    miou = cached_property(lambda self: ConfusionMatrix(len(self.confusion), counts=self.confusion).miou())

    def by_image(self) -> np.ndarray:
        """Confusion of each image, i64 (images, K, K), in the data set's order."""
        return self.counts.by_image(self.variant)


@dataclass(frozen=True)
class Method:
    """A way to label images, T = ``variants`` label maps each.

    ``key`` holds, as plain data, everything the labels depend on beside the data set and the code. ``prepare(dataset)``
    gives sample -> labels int (T, H, W) for the data set's vocabulary. ``build(dataset, category)`` builds one class in
    advance: methods build class by class, so that they can share what they have in common of it. ``prepare`` appends
    to ``notes`` what a footnote should say of the result.
    """

    key: dict[str, Any]
    prepare: Callable[[Dataset], Callable[[Sample], np.ndarray]]
    variants: int = 1
    build: Callable[[Dataset, Category], Any] | None = None
    notes: list[str] = field(default_factory=list)


def measure(methods: Mapping[str, Method], dataset: Dataset, *, folder: str | Path | None = None,
            limit: int | None = None, progress: bool = True) -> dict[str, tuple[EvaluationResult, ...]]:
    """T results for each method on the first ``limit`` images of ``dataset`` (default: all).

    With ``folder``, counts are kept there and taken up again, finished or not. Methods run side by side on each image,
    so that what they share is computed once. Raises ``InputError`` for an empty data set and labels that do not fit.
    """
    return measure_all([(methods, dataset)], folder=folder, limit=limit, progress=progress)[0]


def measure_all(studies: Sequence[tuple[Mapping[str, Method], Dataset]], *, folder: str | Path | None = None,
                limit: int | None = None, progress: bool = True) -> list[dict[str, tuple[EvaluationResult, ...]]]:
    """:func:`measure` for several data sets in one go: an image that they have in common has its turn in all of them
    at a time, as far as their images are in the order of their ids."""
    begun: list[tuple[Any, Dataset, dict[str, Counts]]] = [(*study, {}) for study in studies]
    with ExitStack() as ended:
        walks = [ended.enter_context(closing(_counting(*one, folder, limit, progress))) for one in begun]
        for _ in heapq.merge(*walks):
            pass
    return [{name: results_of(dataset, counts[name]) for name in methods} for methods, dataset, counts in begun]


def _counting(methods: Mapping[str, Method], dataset: Dataset, counts: dict[str, Counts], folder: str | Path | None,
              limit: int | None, progress: bool) -> Iterator[str]:
    """Fill ``counts``; the id of each image comes before it is counted."""
    total, classes = image_count(dataset, limit), len(dataset.vocabulary) + dataset.has_background
    for name, method in methods.items():
        shape, key = (method.variants, classes, classes), _key(method, dataset, total)
        counts[name] = Counts(shape) if folder is None else stored(folder, dataset.name, key, shape, total)
    known = {name: len(found) for name, found in counts.items()}
    pending = {name: method for name, method in methods.items() if known[name] < total}
    builders = [method.build for method in pending.values() if method.build]
    try:
        for category in tqdm(dataset.vocabulary, "building classes", disable=not progress or not builders):
            for build in builders:
                build(dataset, category)
        predictors = {name: method.prepare(dataset) for name, method in pending.items()}
        for name, method in pending.items():
            counts[name].note = " ".join(method.notes)
        label = dataset.name + f", {len(pending)} methods" * (len(pending) > 1)
        left, due = range(min(known.values(), default=total), total), time.monotonic() + SAVE_EVERY
        for index in tqdm(left, label, total, initial=left.start, unit="image", disable=not progress or not pending):
            yield dataset.ids[index]
            sample = dataset[index]
            for name in (name for name in pending if known[name] <= index):
                counts[name].add(np.stack([confusion(dataset, one, sample) for one in predictors[name](sample)]))
            if time.monotonic() >= due:
                for name in pending:
                    counts[name].save()
                due = time.monotonic() + SAVE_EVERY
    finally:
        for name in pending:
            counts[name].save()


def evaluate(predict: Predict | SavedPredictions, dataset: Dataset, limit: int | None = None, progress: bool = True, *,
             folder: str | Path | None = None, key: dict[str, Any] | None = None) -> EvaluationResult:
    """Segment every image of ``dataset`` (the first ``limit`` of them) and compare with its label maps.

    ``predict`` is any segmenter's method, or predictions on disk. Where the data set has no background, no pixel that
    counts may be 0. With ``folder`` and ``key``, all that the labels depend on beside data set and code, an evaluation
    that was interrupted goes on where it stopped. Raises as :func:`measure`.
    """
    saved = isinstance(predict, SavedPredictions)
    if saved:
        predict.check(dataset.ids[:image_count(dataset, limit)])
    method = Method(key or {}, lambda _: lambda sample: np.stack([predict(sample if saved else sample.image)]))
    return measure({"": method}, dataset, folder=folder, limit=limit, progress=progress)[""][0]


# ------------------------------------------------------------------ what one image counts

def confusion(dataset: Dataset, predicted: np.ndarray, sample: Sample) -> np.ndarray:
    """Pixel counts i64 (K, K) of one image's ``predicted`` labels int (H, W); row 0 is category 0 where the data set
    has no background. ``InputError`` names the image for labels that do not fit."""
    matrix = ConfusionMatrix(len(dataset.vocabulary) + 1)
    try:
        matrix.update(np.asarray(predicted), sample.labels)
        if not dataset.has_background and (matrix.counts[0].any() or matrix.counts[:, 0].any()):
            raise InputError("Pixels are predicted as background, which is no class; give the best category.")
    except InputError as error:
        raise InputError(f"Image {sample.id} of {dataset.name}: {error}") from None
    first = 0 if dataset.has_background else 1
    return matrix.counts[first:, first:]


def image_count(dataset: Dataset, limit: int | None) -> int:
    """How many images are evaluated, all or the first ``limit``. Raises ``InputError`` if there is none."""
    if limit is not None and limit < 1:
        raise InputError(f"The limit of images is {limit}; it must be at least 1.")
    if len(dataset) == 0:
        raise InputError(f"The data set {dataset.name} has no images; choose another split or folder.")
    return min(limit or len(dataset), len(dataset))


def results_of(dataset: Dataset, counts: Counts) -> tuple[EvaluationResult, ...]:
    """The results of the T label maps that were counted."""
    names = (*((BACKGROUND,) if dataset.has_background else ()), *dataset.vocabulary.names)
    return tuple(EvaluationResult(dataset.name, names, confusion, counts, variant)
                 for variant, confusion in enumerate(counts.total()))


def _key(method: Method, dataset: Dataset, total: int) -> dict[str, Any]:
    categories = [[c.name, c.prompt, c.kind] for c in dataset.vocabulary]
    return {"method": method.key, "data set": dataset.name, "folder": str(getattr(dataset, "folder", "")),
            "split": getattr(dataset, "split", ""), "categories": categories,
            "background": dataset.has_background, "ids": list(dataset.ids[:total]), "code": code_digest()}


# ------------------------------------------------------------------ OVDiff as a segmenter of a data set

def for_dataset(ovdiff, dataset: Dataset):
    """The OVDiff that builds and segments for ``dataset``: where background is no class its score is a constant, which
    decides nothing, since row 0 of the scores is not read."""
    return ovdiff if dataset.has_background else ovdiff.replaced({"matching.background_threshold": 0.0})


def label_predictor(ovdiff, bank: PrototypeBank, dataset: Dataset) -> Predict:
    """OVDiff with ``bank`` as ``dataset`` wants its labels: where background is no class, without background prototypes
    and with every pixel's best category (App. A.3)."""
    if dataset.has_background:
        return lambda image: ovdiff.segment(image, bank).labels
    ovdiff, foreground = for_dataset(ovdiff, dataset), bank.without_background()
    return lambda image: foreground_labels(ovdiff.segment(image, foreground).scores)


def foreground_labels(scores: np.ndarray) -> np.ndarray:
    """Scores f32 (C + 1, H, W) -> labels i16 (H, W) in 1 to C: each pixel's best category, background (row 0) out."""
    return scores[1:].argmax(axis=0).astype(np.int16) + 1


def above(scores: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Scores f32 (C + 1, H, W) -> labels i16 (T, H, W), a map for each constant background score: each pixel's best
    category where that exceeds the threshold, else 0. Row 0 of the scores is not read."""
    exceeds = scores[1:].max(0) > np.array(thresholds)[:, None, None]
    return np.where(exceeds, foreground_labels(scores), 0)
