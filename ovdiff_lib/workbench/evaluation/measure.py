"""The evaluation protocol (Sec. 4): predictions at the original resolution against label maps, of one method or of many at a time.

:func:`evaluate` measures one segmenter, :func:`measure` many methods on the same images, as the tables need: each image is read once,
methods that differ in one setting share the networks' features (:mod:`ovdiff_lib.workbench.evaluation.shared`), what was counted is kept,
and an interrupted run goes on. Resizing and windows belong to the segmenter (profile section ``matching``); label maps are never resized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib.categories import BACKGROUND, Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.metrics import IGNORE, ConfusionMatrix
from ovdiff_lib.workbench.data.predictions import SavedPredictions
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.results import Counts, ResultStore, code_digest

Predict = Callable[[np.ndarray], np.ndarray]
"""Image u8 (H, W, 3) -> labels int (H, W), 0 = background, i + 1 = category i of the data set's vocabulary."""

SAVE_EVERY = 20.0
"""Seconds between two writings of unfinished counts; what a killed run loses at most."""


@dataclass(frozen=True)
class EvaluationResult:
    """Quality on one data set: ``miou`` and ``iou`` f64 (K,) in [0, 1], by ``class_names``: "background" and the C categories, K = C + 1,
    or the categories alone where background is no class; ``confusion`` i64 (K, K), rows true, columns predicted; ``images`` how many were
    used; ``settings`` what the caller wants recorded with it."""

    dataset: str
    images: int
    class_names: tuple[str, ...]
    miou: float
    iou: np.ndarray
    confusion: np.ndarray
    settings: dict[str, Any]
    counts: Counts = field(repr=False)
    variant: int = 0

    def by_image(self) -> np.ndarray:
        """Confusion of each image, i64 (images, K, K), in the data set's order."""
        return self.counts.by_image(self.variant)


@dataclass(frozen=True)
class Sweep:
    """T label maps of one image, one for each of ``thresholds`` (ascending): a pixel has its ``category`` i64 (H, W), from 1, where
    ``best`` f32 (H, W) exceeds the threshold, else 0. They are counted from one histogram; ``maps()`` makes them."""

    best: np.ndarray
    category: np.ndarray
    thresholds: tuple[float, ...]

    @classmethod
    def of(cls, scores: np.ndarray, thresholds: Sequence[float]) -> Sweep:
        """Of scores f32 (C + 1, H, W), whose row 0, the background's, is not read."""
        return cls(scores[1:].max(0), scores[1:].argmax(0) + 1, tuple(thresholds))

    def maps(self) -> np.ndarray:
        """i64 (T, H, W)."""
        return np.where(self.best > np.array(self.thresholds)[:, None, None], self.category, 0)

    def counts(self, dataset: Dataset, sample: Sample) -> np.ndarray:
        """Confusion of each map, i64 (T, K, K), as :func:`confusion` counts it. Where the data set has no background all maps are that
        of the categories."""
        whole = confusion(dataset, self.category, sample)
        return self.matrices(sample.labels, len(whole)) if dataset.has_background else np.repeat(whole[None], len(self.thresholds), 0)

    def matrices(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Confusion of each map with ``labels`` u8 (H, W) of ``classes`` classes, background among them: i64 (T, classes, classes)."""
        seen, steps = labels != IGNORE, len(self.thresholds)
        # How many thresholds lie below a pixel's score: map t shows the pixels that pass more than t.
        passed = np.searchsorted(self.thresholds, self.best[seen], side="left")
        cells = (passed * classes + labels[seen]) * classes + self.category[seen]
        passing = np.bincount(cells, minlength=(steps + 1) * classes**2).reshape(steps + 1, classes, classes)
        shown = passing[:0:-1].cumsum(0)[::-1]
        shown[:, :, 0] += passing.sum((0, 2)) - shown.sum(2)
        return shown


@dataclass(frozen=True)
class Method:
    """A way to label images, T = ``variants`` label maps each.

    ``key`` holds, as plain data, everything the labels depend on beside the data set and the code. ``prepare(dataset)`` does what is needed
    before the first image and gives sample -> labels int (T, H, W) for the data set's vocabulary, or a :class:`Sweep` over T thresholds.
    ``build(dataset, category)`` builds one class in advance: methods build class by class, so that they can share what they have in
    common of it.
    """

    key: dict[str, Any]
    prepare: Callable[[Dataset], Callable[[Sample], np.ndarray | Sweep]]
    variants: int = 1
    build: Callable[[Dataset, Category], Any] | None = None


def measure(methods: Mapping[str, Method], dataset: Dataset, *, folder: str | Path | None = None, limit: int | None = None,
            progress: bool = True) -> dict[str, tuple[EvaluationResult, ...]]:
    """T results for each method on the first ``limit`` images of ``dataset`` (default: all).

    With ``folder``, counts found there are taken, and counts are kept there, finished or not. Methods run side by side on each image, in
    the order given, so that what they share is computed once. Raises ``InputError`` for an empty data set and for labels of a wrong
    shape or range.
    """
    total, classes = image_count(dataset, limit), len(dataset.vocabulary) + dataset.has_background
    store = ResultStore(folder) if folder is not None else None
    keys = {name: _key(method, dataset, total) for name, method in methods.items()}
    shapes = {name: (method.variants, classes, classes) for name, method in methods.items()}
    counts = {name: store.load(dataset.name, keys[name], shapes[name], total) if store else Counts(shapes[name]) for name in methods}
    pending = {name: method for name, method in methods.items() if len(counts[name]) < total}

    def save() -> None:
        for name in pending:
            if store and len(counts[name]):
                store.save(dataset.name, keys[name], counts[name])

    try:
        if pending:
            _count(pending, dataset, total, counts, save, progress)
    finally:
        save()
    return {name: results_of(dataset, counts[name], method.key) for name, method in methods.items()}


def _count(pending: dict[str, Method], dataset: Dataset, total: int, counts: dict[str, Counts], save: Callable[[], None],
           progress: bool) -> None:
    builders = [method.build for method in pending.values() if method.build]
    for category in tqdm(dataset.vocabulary, desc="building classes", unit="class", disable=not progress or not builders):
        for build in builders:
            build(dataset, category)
    predictors = {name: method.prepare(dataset) for name, method in pending.items()}
    first, saved, label = min(len(counts[name]) for name in pending), time.monotonic(), f"{dataset.name}, {len(pending)} methods"
    for index in tqdm(range(first, total), initial=first, total=total, desc=label.removesuffix(", 1 methods"), unit="image",
                      disable=not progress):
        sample = dataset[index]
        for name, method in pending.items():
            if len(counts[name]) <= index:
                counts[name].add(counted(predictors[name](sample), method.variants, dataset, sample))
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()


def evaluate(predict: Predict | SavedPredictions, dataset: Dataset, limit: int | None = None, progress: bool = True,
             settings: dict[str, Any] | None = None, *, resume: str | Path | None = None) -> EvaluationResult:
    """Segment every image of ``dataset`` (the first ``limit`` of them) and compare with its label maps.

    ``predict`` is any segmenter's method: image u8 (H, W, 3) -> labels int (H, W) for ``dataset.vocabulary``; or
    :func:`~ovdiff_lib.workbench.data.predictions.predictions_from` a folder. Where the data set has no background, no pixel that counts may
    be 0. With ``resume``, a folder, the counts are kept there, and an evaluation that was interrupted goes on with the next image, to the
    same result; ``settings`` must then hold all that the predictions depend on. Raises ``InputError`` for an empty data set and for
    predictions of the wrong shape or range.
    """
    if isinstance(predict, SavedPredictions):
        predict.check(dataset.ids[:image_count(dataset, limit)])
    if resume is not None and not settings:
        raise InputError("An evaluation that can be resumed needs its settings, to be told from others; pass settings={...}.")

    def labels(sample: Sample) -> np.ndarray:
        return np.asarray(predict(sample if isinstance(predict, SavedPredictions) else sample.image))[None]

    method = Method(settings or {}, lambda dataset: labels)
    return measure({"": method}, dataset, folder=resume, limit=limit, progress=progress)[""][0]


def search_threshold(score: Callable[[np.ndarray], np.ndarray], dataset: Dataset, thresholds: Sequence[float], limit: int | None = None,
                     progress: bool = True) -> dict[float, EvaluationResult]:
    """The result of a method without a background model at every constant background threshold, scoring each image once.

    ``score`` maps an image u8 (H, W, 3) to f32 (C + 1, H, W), row 0 unused. A pixel is its best category where that category's score
    exceeds the threshold, else background. The best threshold, :func:`best_of`, was chosen on the images it is measured on: an
    optimistic number, to be reported as such.
    """
    if not len(thresholds):
        raise InputError("The list of thresholds is empty; give at least one.")
    if not dataset.has_background:
        raise InputError(f"The data set {dataset.name} has no background, so there is no threshold to search; use evaluate.")
    tried = tuple(sorted(map(float, thresholds)))

    def sweep(sample: Sample) -> Sweep:
        scores = np.asarray(score(sample.image))
        if len(scores) - 1 != len(dataset.vocabulary):
            raise InputError(f"The method scores {len(scores) - 1} categories but the data set {dataset.name} has"
                             f" {len(dataset.vocabulary)}; score its vocabulary.")
        return Sweep.of(scores, tried)

    found = measure({"": Method({}, lambda dataset: sweep, len(tried))}, dataset, limit=limit, progress=progress)[""]
    return dict(zip(tried, found, strict=True))


def best_of(found: Mapping[float, EvaluationResult]) -> tuple[float, EvaluationResult]:
    """The threshold of the highest mIoU, of equals the lowest, and its result."""
    return max(found.items(), key=lambda pair: (pair[1].miou, -pair[0]))


# ------------------------------------------------------------------ what one image counts

def confusion(dataset: Dataset, predicted: np.ndarray, sample: Sample) -> np.ndarray:
    """Pixel counts i64 (K, K) of one image's ``predicted`` labels int (H, W); row 0 is category 0 where the data set has no background.
    ``InputError`` names the image for labels that do not fit."""
    matrix = ConfusionMatrix(len(dataset.vocabulary) + dataset.has_background)
    predicted, target = np.asarray(predicted), sample.labels
    try:
        if not dataset.has_background:
            if predicted.shape == target.shape and (predicted[target != IGNORE] == 0).any():
                raise InputError("Pixels are predicted as background, which the data set does not have; give the best category.")
            # Wider first: u8 labels would wrap.
            predicted = predicted.astype(np.int64) - 1 if np.issubdtype(predicted.dtype, np.integer) else predicted
            target = np.where(target == IGNORE, IGNORE, target.astype(np.int64) - 1)
        matrix.update(predicted, target)
    except InputError as error:
        raise InputError(f"Image {sample.id} of {dataset.name}: {error}") from None
    return matrix.counts


def counted(made: np.ndarray | Sweep, variants: int, dataset: Dataset, sample: Sample) -> np.ndarray:
    """Pixel counts i64 (T, K, K) of what a method made of an image."""
    if isinstance(made, Sweep):
        return made.counts(dataset, sample)
    made = np.asarray(made)
    if len(made) != variants:
        raise InputError(f"A method made labels of shape {made.shape}; they must be ({variants}, H, W).")
    return np.stack([confusion(dataset, one, sample) for one in made])


def image_count(dataset: Dataset, limit: int | None) -> int:
    """How many images of the data set are evaluated, all or the first ``limit``. Raises ``InputError`` if there is none."""
    if limit is not None and limit < 1:
        raise InputError(f"The limit of images is {limit}; it must be at least 1.")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total == 0:
        raise InputError(f"The data set {dataset.name} has no images; choose another split or folder.")
    return total


def results_of(dataset: Dataset, counts: Counts, settings: dict[str, Any]) -> tuple[EvaluationResult, ...]:
    """The results of the T label maps that were counted."""
    names = (*((BACKGROUND,) if dataset.has_background else ()), *dataset.vocabulary.names)
    matrices = [ConfusionMatrix.of(total) for total in counts.total()]
    return tuple(EvaluationResult(dataset.name, len(counts), names, matrix.miou(), matrix.iou(), matrix.counts, settings, counts, variant)
                 for variant, matrix in enumerate(matrices))


def _key(method: Method, dataset: Dataset, total: int) -> dict[str, Any]:
    categories = [[c.name, c.prompt, c.kind] for c in dataset.vocabulary]
    return {"method": method.key, "data set": dataset.name, "folder": str(getattr(dataset, "folder", "")),
            "split": getattr(dataset, "split", ""), "categories": categories,
            "background": dataset.has_background, "ids": list(dataset.ids[:total]), "code": code_digest()}


# ------------------------------------------------------------------ OVDiff as a segmenter of a data set

def for_dataset(ovdiff, dataset: Dataset):
    """The OVDiff that builds and segments for ``dataset``: the given one, but where background is no class none that demands a score of it.

    A profile without background prototypes and without ``matching.background_threshold`` then gets a threshold, which decides nothing:
    row 0 of the scores, the background's, is not read.
    """
    profile = ovdiff.profile
    if dataset.has_background or profile.prototypes.background or profile.matching.background_threshold is not None:
        return ovdiff
    return ovdiff.replaced({"matching.background_threshold": 0.0})


def label_predictor(ovdiff, bank: PrototypeBank, dataset: Dataset) -> Predict:
    """OVDiff with the prototypes ``bank`` as ``dataset`` wants its labels.

    Where background is no class, background prototypes are not used and every pixel goes to its best category (App. A.3).
    """
    if dataset.has_background:
        return lambda image: ovdiff.segment(image, bank).labels
    ovdiff, foreground = for_dataset(ovdiff, dataset), bank.without_background()
    return lambda image: foreground_labels(ovdiff.segment(image, foreground).scores)


def foreground_labels(scores: np.ndarray) -> np.ndarray:
    """Scores f32 (C + 1, H, W) -> labels i64 (H, W) in 1 to C: the best category of each pixel, background (row 0) out of the running."""
    return scores[1:].argmax(axis=0) + 1
