"""The evaluation protocol (Sec. 4): predictions at the original resolution against a data set's label maps.

Resizing and windows belong to the segmenter (profile section ``matching``); label maps are never resized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib import __version__
from ovdiff_lib.categories import BACKGROUND
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.metrics import IGNORE, ConfusionMatrix
from ovdiff_lib.workbench.data.predictions import SavedPredictions
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.resume import Progress

Predict = Callable[[np.ndarray], np.ndarray]
"""Image u8 (H, W, 3) -> labels int (H, W), 0 = background, i + 1 = category i of the data set's vocabulary."""

Score = Callable[[np.ndarray], np.ndarray]
"""Image u8 (H, W, 3) -> scores f32 (C + 1, H, W), row 0 the background."""


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
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThresholdSearch:
    """Results for each constant background threshold; ``best`` has the highest mIoU (the first of equals)."""

    thresholds: tuple[float, ...]
    results: tuple[EvaluationResult, ...]

    @property
    def best_index(self) -> int:
        return int(np.argmax([r.miou for r in self.results]))

    @property
    def best_threshold(self) -> float:
        return self.thresholds[self.best_index]

    @property
    def best(self) -> EvaluationResult:
        return self.results[self.best_index]


def foreground_labels(scores: np.ndarray) -> np.ndarray:
    """Scores f32 (C + 1, H, W) -> labels i64 (H, W) in 1 to C: the best category of each pixel, background (row 0) out of the running."""
    return scores[1:].argmax(axis=0) + 1


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


def evaluate(predict: Predict | SavedPredictions, dataset: Dataset, limit: int | None = None, progress: bool = True,
             settings: dict[str, Any] | None = None, *, resume: str | Path | None = None) -> EvaluationResult:
    """Segment every image of ``dataset`` (the first ``limit`` of them) and compare with its label maps.

    ``predict`` is any segmenter's method: image u8 (H, W, 3) -> labels int (H, W) for ``dataset.vocabulary``; or
    :func:`~ovdiff_lib.workbench.data.predictions.predictions_from` a folder. Where the data set has no background, no pixel that counts may
    be 0. With ``resume``, a folder, the state is kept there while the evaluation runs, and one that was interrupted goes on with
    the next image, to the same result; ``settings`` must then hold all that the predictions depend on. Raises ``InputError`` for an empty
    data set and for predictions of the wrong shape or range.
    """
    total = image_count(dataset, limit)
    saved = isinstance(predict, SavedPredictions)
    if saved:
        predict.check(dataset.ids[:total])
    matrix = empty_matrix(dataset)
    state, kept = (0, matrix.counts), None
    if resume is not None:
        kept = Progress(resume, dataset.name, _key(dataset, total, settings))
        state = kept.load(matrix.classes, total)
    matrix.counts = state[1].copy()
    try:
        for done, sample in _samples(dataset, total, progress, state[0]):
            count_sample(matrix, dataset, predict(sample) if saved else predict(sample.image), sample)
            if kept is not None:
                # One assignment, so that an interruption finds the count and the matrix in step.
                state = done, matrix.counts.copy()
                kept.save(*state)
    except BaseException:
        if kept is not None:
            kept.save(*state, now=True)
        raise
    if kept is not None:
        kept.remove()
    return result_of(dataset, total, matrix, settings or {})


def grid_search_threshold(score: Score, dataset: Dataset, thresholds: Sequence[float], limit: int | None = None, progress: bool = True,
                          settings: dict[str, Any] | None = None) -> ThresholdSearch:
    """Evaluate a method without a background model at every constant background threshold, scoring each image once.

    A pixel is its best category where that category's score exceeds the threshold, else background; row 0 of ``score``'s result is not
    used. Each result's settings hold its ``background_threshold``. The best of them was chosen on the images it is measured on: an
    optimistic number, to be reported as such.
    """
    if not thresholds:
        raise InputError("The list of thresholds is empty; give at least one.")
    if not dataset.has_background:
        raise InputError(f"The data set {dataset.name} has no background, so there is no threshold to search; use evaluate.")
    total = image_count(dataset, limit)
    matrices = [empty_matrix(dataset) for _ in thresholds]
    for _, sample in _samples(dataset, total, progress):
        foreground = np.asarray(score(sample.image))[1:]
        if len(foreground) != len(dataset.vocabulary):
            raise InputError(f"The method scores {len(foreground)} categories but the data set {dataset.name} has"
                             f" {len(dataset.vocabulary)}; score its vocabulary.")
        best, category = foreground.max(axis=0), foreground.argmax(axis=0) + 1
        for threshold, matrix in zip(thresholds, matrices, strict=True):
            count_sample(matrix, dataset, np.where(best > threshold, category, 0), sample)
    results = tuple(result_of(dataset, total, matrix, {**(settings or {}), "background_threshold": float(threshold)})
                    for threshold, matrix in zip(thresholds, matrices, strict=True))
    return ThresholdSearch(tuple(float(t) for t in thresholds), results)


def image_count(dataset: Dataset, limit: int | None) -> int:
    """How many images of the data set are evaluated, all or the first ``limit``. Raises ``InputError`` if there is none."""
    if limit is not None and limit < 1:
        raise InputError(f"The limit of images is {limit}; it must be at least 1.")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total == 0:
        raise InputError(f"The data set {dataset.name} has no images; choose another split or folder.")
    return total


def _samples(dataset: Dataset, total: int, progress: bool, start: int = 0) -> Iterator[tuple[int, Sample]]:
    """(images done with this one, sample) from the image number ``start`` on."""
    for index in tqdm(range(start, total), initial=start, total=total, desc=dataset.name, unit="image", disable=not progress):
        yield index + 1, dataset[index]


def empty_matrix(dataset: Dataset) -> ConfusionMatrix:
    """A confusion matrix of zeros for the classes of the data set, background among them where it is one."""
    return ConfusionMatrix(len(dataset.vocabulary) + dataset.has_background)


def count_sample(matrix: ConfusionMatrix, dataset: Dataset, predicted: np.ndarray, sample: Sample) -> None:
    """Add one image's ``predicted`` labels int (H, W) to the matrix, whose row 0 is category 0 where the data set has no background."""
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


def _key(dataset: Dataset, total: int, settings: dict[str, Any] | None) -> dict[str, Any]:
    """All that an evaluation's state depends on."""
    if not settings:
        raise InputError("An evaluation that can be resumed needs its settings, to be told from others; pass settings={...}.")
    categories = [[c.name, c.prompt, c.kind] for c in dataset.vocabulary]
    return {"data set": dataset.name, "background": dataset.has_background, "categories": categories, "ids": list(dataset.ids[:total]),
            "settings": settings, "version": __version__}


def result_of(dataset: Dataset, images: int, confusion: ConfusionMatrix, settings: dict[str, Any]) -> EvaluationResult:
    """The result of a data set's confusion matrix, summed over ``images`` images."""
    names = (*((BACKGROUND,) if dataset.has_background else ()), *dataset.vocabulary.names)
    return EvaluationResult(dataset.name, images, names, confusion.miou(), confusion.iou(), confusion.counts, settings)
