"""The evaluation protocol (Sec. 4): predictions at the original resolution against a data set's label maps.

Resizing and windows belong to the segmenter (profile section ``matching``); label maps are never resized.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.evaluation.datasets import Dataset, Sample
from ovdiff_lib.evaluation.metrics import ConfusionMatrix
from ovdiff_lib.types import BACKGROUND

Predict = Callable[[np.ndarray], np.ndarray]
"""Image u8 (H, W, 3) -> labels int (H, W), 0 = background, i + 1 = category i of the data set's vocabulary."""

Score = Callable[[np.ndarray], np.ndarray]
"""Image u8 (H, W, 3) -> scores f32 (C + 1, H, W), row 0 the background."""


@dataclass(frozen=True)
class EvaluationResult:
    """Quality on one data set: ``miou`` and ``iou`` f64 (C + 1,) in [0, 1], by ``class_names`` ("background" first); ``confusion`` i64
    (C + 1, C + 1), rows true, columns predicted; ``images`` how many were used; ``settings`` what the caller wants recorded with it."""

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


def evaluate(predict: Predict, dataset: Dataset, limit: int | None = None, progress: bool = True,
             settings: dict[str, Any] | None = None) -> EvaluationResult:
    """Segment every image of ``dataset`` (the first ``limit`` of them) and compare with its label maps.

    ``predict`` is any segmenter's method: image u8 (H, W, 3) -> labels int (H, W) for ``dataset.vocabulary``. Raises ``InputError`` for an
    empty data set and for predictions of the wrong shape or range.
    """
    confusion = ConfusionMatrix(len(dataset.vocabulary) + 1)
    images = 0
    for sample in _samples(dataset, limit, progress):
        confusion.update(np.asarray(predict(sample.image)), sample.labels)
        images += 1
    return _result(dataset, images, confusion, settings or {})


def grid_search_threshold(score: Score, dataset: Dataset, thresholds: Sequence[float], limit: int | None = None, progress: bool = True,
                          settings: dict[str, Any] | None = None) -> ThresholdSearch:
    """Evaluate a method without a background model at every constant background threshold, scoring each image once.

    A pixel is its best category where that category's score exceeds the threshold, else background; row 0 of ``score``'s result is not
    used. Each result's settings hold its ``background_threshold``. The best of them was chosen on the images it is measured on: an
    optimistic number, to be reported as such.
    """
    if not thresholds:
        raise InputError("The list of thresholds is empty; give at least one.")
    matrices = [ConfusionMatrix(len(dataset.vocabulary) + 1) for _ in thresholds]
    images = 0
    for sample in _samples(dataset, limit, progress):
        foreground = np.asarray(score(sample.image))[1:]
        if len(foreground) != len(dataset.vocabulary):
            raise InputError(f"The method scores {len(foreground)} categories but the data set {dataset.name} has"
                             f" {len(dataset.vocabulary)}; score its vocabulary.")
        best, category = foreground.max(axis=0), foreground.argmax(axis=0) + 1
        for threshold, matrix in zip(thresholds, matrices, strict=True):
            matrix.update(np.where(best > threshold, category, 0), sample.labels)
        images += 1
    results = tuple(_result(dataset, images, matrix, {**(settings or {}), "background_threshold": float(threshold)})
                    for threshold, matrix in zip(thresholds, matrices, strict=True))
    return ThresholdSearch(tuple(float(t) for t in thresholds), results)


def _samples(dataset: Dataset, limit: int | None, progress: bool) -> Iterator[Sample]:
    if limit is not None and limit < 1:
        raise InputError(f"The limit of images is {limit}; it must be at least 1.")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total == 0:
        raise InputError(f"The data set {dataset.name} has no images; choose another split or folder.")
    yield from tqdm(itertools.islice(dataset, total), total=total, desc=dataset.name, unit="image", disable=not progress)


def _result(dataset: Dataset, images: int, confusion: ConfusionMatrix, settings: dict[str, Any]) -> EvaluationResult:
    names = (BACKGROUND, *dataset.vocabulary.names)
    return EvaluationResult(dataset.name, images, names, confusion.miou(), confusion.iou(), confusion.counts, settings)
