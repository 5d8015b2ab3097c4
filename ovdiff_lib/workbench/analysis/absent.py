"""Queries that an image does not show (Sec. 4.5, the "red car" of Fig. 6): how often are they segmented all the
same?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.analysis.examples import shown_labels
from ovdiff_lib.workbench.data.metrics import IGNORE, ConfusionMatrix
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.evaluation.measure import Sweep


class AbsentTest:
    """Counts over images, each with its queried classes: of those that the image does not show, how many were
    segmented, and of those that it shows, how many were not.

    A class counts as segmented where it gets at least the share ``least`` of the pixels that count (an image's ignored
    pixels do not). All rates are in [0, 1], nan without anything to count.
    """

    def __init__(self, least: float = 0.01) -> None:
        if not 0 < least <= 1:
            raise InputError(f"The least share of pixels is {least}; set it above 0 and at most 1.")
        self.least = least
        self.images = self.absent = self.segmented = self.shown = self.missed = self.fooled = 0
        self.pixels = self.wrong_pixels = 0

    def update(self, predicted: np.ndarray, target: np.ndarray, queried: Iterable[int]) -> None:
        """Count one image: ``predicted`` and ``target`` int (H, W), ``queried`` the labels (not 0) that were asked for.

        ``target`` also holds 0 and the ignored label. Raises ``InputError`` for different shapes, and for a prediction
        of a class that was not queried.
        """
        if predicted.shape != target.shape:
            raise InputError(f"The prediction has the shape {predicted.shape} and the label map {target.shape}; they must be "
                             "equal.")
        queried = set(map(int, queried))
        counted = target != IGNORE
        guess, true = predicted[counted], set(np.unique(target[counted]).tolist())
        found = dict(zip(*(values.tolist() for values in np.unique(guess, return_counts=True)), strict=True))
        extra = set(found) - queried - {0}
        if extra:
            raise InputError(f"The label {min(extra)} is predicted but was not queried; give all labels that were asked.")
        absent = queried - true
        segmented = [c for c in absent if found.get(c, 0) >= self.least * max(1, guess.size)]
        self.images += 1
        self.absent += len(absent)
        self.segmented += len(segmented)
        self.fooled += bool(segmented)
        self.shown += len(queried & true)
        self.missed += sum(found.get(c, 0) < self.least * guess.size for c in queried & true)
        self.pixels += guess.size
        self.wrong_pixels += sum(found.get(c, 0) for c in absent)

    @property
    def segmented_rate(self) -> float:
        """Of all (image, queried class it does not show), the share that was segmented."""
        return _ratio(self.segmented, self.absent)

    @property
    def fooled_rate(self) -> float:
        """The share of images in which at least one class was segmented that is not there."""
        return _ratio(self.fooled, self.images)

    @property
    def pixel_rate(self) -> float:
        """The share of pixels that went to classes that are not in their image."""
        return _ratio(self.wrong_pixels, self.pixels)

    @property
    def missed_rate(self) -> float:
        """Of all (image, queried class it shows), the share that was not segmented: what a strict filter costs."""
        return _ratio(self.missed, self.shown)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


Trial = tuple[Sample, tuple[int, ...]]
"""An image and the labels, ascending, that are asked of it."""


def one_absent_word(samples: Iterable[Sample], classes: int, seed: int = 0) -> list[Trial]:
    """For each image the labels it shows and one of the other labels 1 to ``classes``, drawn at random: the "red car"
    of Fig. 6.

    An image's word depends on its id, the seed and the number of classes alone. Raises ``InputError`` for an image that
    shows all classes.
    """
    trials = []
    for sample in samples:
        shown = shown_labels(sample)
        others = [label for label in range(1, classes + 1) if label not in shown]
        if not others:
            raise InputError(f"The image {sample.id} shows all {classes} classes, so no absent one can be asked; use more.")
        digest = hashlib.sha256(f"{seed}:{classes}:{sample.id}".encode()).digest()
        trials.append((sample, tuple(sorted([*shown, others[int.from_bytes(digest[:8], "big") % len(others)]]))))
    return trials


def absent_tests(methods: Mapping[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]],
                 askings: Mapping[str, Sequence[Trial]], classes: int,
                 progress: bool = True) -> dict[tuple[str, str], tuple[ConfusionMatrix, AbsentTest]]:
    """Every method on every trial: (asking, method) -> what it got right, over all ``classes``, and what became of
    absent words.

    ``methods[name](image, asked)`` labels an image: 0 = background, i + 1 = ``asked[i]``. The askings' trials at one
    place are done one after the other, so that methods that remember an image's features pay for it once; they must be
    equally many.
    """
    if len({len(trials) for trials in askings.values()}) != 1:
        raise InputError("The askings have different numbers of trials; ask each of the same images.")
    tests = {(asking, name): (ConfusionMatrix(classes + 1), AbsentTest()) for asking in askings for name in methods}
    places = list(zip(*askings.values(), strict=True))
    for place in tqdm(places, unit="image", mininterval=5, disable=not progress):
        for asking, (sample, asked) in zip(askings, place, strict=True):
            for name, method in methods.items():
                labels = np.array([0, *asked])[method(sample.image, asked)]
                matrix, absent = tests[asking, name]
                matrix.update(labels, sample.labels)
                absent.update(labels, sample.labels, asked)
    return tests


def search_threshold(score: Callable[[np.ndarray, tuple[int, ...]], np.ndarray], trials: Sequence[Trial], classes: int,
                     thresholds: Sequence[float]) -> tuple[float, float]:
    """The constant background score with the highest mIoU over trials, and that mIoU: with few words asked another one
    is best than with all (:func:`~ovdiff_lib.workbench.evaluation.measure.search_threshold`). The first of equals.

    ``score(image, asked)`` gives f32 (len(asked) + 1, H, W), whose row 0 is not read. Chosen on the images it is
    measured on.
    """
    if not trials or not thresholds:
        raise InputError("There are no trials or no thresholds to search over; give at least one of each.")
    counts = np.zeros((len(thresholds), classes + 1, classes + 1), np.int64)
    for sample, asked in trials:
        scores = score(sample.image, asked)[1:]
        counts += Sweep(scores.max(0), np.array(asked)[scores.argmax(0)], tuple(thresholds)).matrices(sample.labels, classes + 1)
    miou = [ConfusionMatrix.of(matrix).miou() for matrix in counts]
    return float(thresholds[int(np.argmax(miou))]), float(max(miou))
