"""Queries that an image does not show (Sec. 4.5, the "red car" of Fig. 6): are they segmented all the same?"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.analysis.examples import shown_labels
from ovdiff_lib.workbench.data.metrics import IGNORE, ConfusionMatrix
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.evaluation.measure import above
from ovdiff_lib.workbench.tables.intervals import Runs

RATES = {
    "absent classes segmented": ("segmented", "absent"),  # of all (image, queried class it does not show)
    "images with one": ("fooled", "images"),
    "pixels given to them": ("wrong", "pixels"),
    "shown classes missed": ("missed", "shown"),  # of all (image, queried class it shows): what a strict filter costs
}
"""What is counted, and of what it is a share."""


class AbsentTest:
    """Counts over images: of queried classes that are not there, how many were segmented; of those there, how many not.

    A class is segmented where it gets at least the share ``least`` of the pixels that are not ignored.
    """

    def __init__(self, least: float = 0.01) -> None:
        self.least, self.images = least, []

    counts = property(lambda self: sum(self.images, Counter()))

    def update(self, predicted: np.ndarray, target: np.ndarray, queried: Iterable[int]) -> None:
        """Count one image: ``target`` int (H, W), ``queried`` labels but 0, ``predicted`` int (H, W) of these and 0."""
        counted = target != IGNORE
        found, true = Counter(predicted[counted].tolist()), set(target[counted].tolist())
        absent, shown = set(queried) - true, set(queried) & true
        large = {label for label in queried if found[label] >= self.least * max(1, found.total())}
        self.images.append(Counter(
            images=1, fooled=bool(absent & large), absent=len(absent), segmented=len(absent & large), shown=len(shown),
            missed=len(shown - large), pixels=found.total(), wrong=sum(found[label] for label in absent)))

    def rates(self, dataset: str) -> dict[str, Runs]:
        """:data:`RATES`, in percent, with the counts by image; those of which nothing can be counted are left out."""
        counts = {name: [image[name] for image in self.images] for rate in RATES.values() for name in rate}
        return {rate: Runs.of_shares(f"{dataset}, {rate}", counts[part], counts[whole])
                for rate, (part, whole) in RATES.items() if any(counts[whole])}


Trial = tuple[Sample, tuple[int, ...]]
"""An image and the labels, ascending, that are asked of it."""


def one_absent_word(samples: Iterable[Sample], classes: int, seed: int = 0) -> list[Trial]:
    """For each image the labels it shows and one of the others of 1 to ``classes``, drawn by the image's id, the seed
    and the number of classes (Fig. 6). Raises ``InputError`` for an image that shows all classes."""
    trials = []
    for sample in samples:
        shown = shown_labels(sample)
        others = [label for label in range(1, classes + 1) if label not in shown]
        if not others:
            raise InputError(f"The image {sample.id} shows all {classes} classes, so no absent one can be asked.")
        digest = hashlib.sha256(f"{seed}:{classes}:{sample.id}".encode()).digest()
        word = others[int.from_bytes(digest[:8], "big") % len(others)]
        trials.append((sample, tuple(sorted([*shown, word]))))
    return trials


def absent_tests(methods: Mapping[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]],
                 askings: Mapping[str, Sequence[Trial]],
                 classes: int) -> dict[tuple[str, str], tuple[np.ndarray, AbsentTest]]:
    """Every method on every trial: (asking, method) -> the confusion matrix of each image, i64 (images, K, K), and what
    became of absent words. ``methods[name](image, asked)`` labels an image: 0 = background, i + 1 = ``asked[i]``.
    Trials at one place of the askings follow each other: methods that remember an image's features pay once."""
    tests = {(asking, name): ([], AbsentTest()) for asking in askings for name in methods}
    for place in tqdm(list(zip(*askings.values(), strict=True)), unit="image", mininterval=5):
        for asking, (sample, asked) in zip(askings, place, strict=True):
            for name, method in methods.items():
                labels = np.array([0, *asked])[method(sample.image, asked)]
                matrices, absent = tests[asking, name]
                matrices.append(ConfusionMatrix(classes + 1))
                matrices[-1].update(labels, sample.labels)
                absent.update(labels, sample.labels, asked)
    return {key: (np.stack([one.counts for one in matrices]), absent) for key, (matrices, absent) in tests.items()}


def search_threshold(score: Callable[[np.ndarray, tuple[int, ...]], np.ndarray], trials: Sequence[Trial], classes: int,
                     thresholds: Sequence[float]) -> tuple[float, float]:
    """The constant background score with the highest mIoU over trials, of equals the first, and that mIoU: with few
    words asked another one is best than with all. Chosen on the images it is measured on.

    ``score(image, asked)`` gives f32 (len(asked) + 1, H, W), whose row 0 is not read.
    """
    matrices = [ConfusionMatrix(classes + 1) for _ in thresholds]
    for sample, asked in trials:
        maps = np.array([0, *asked])[above(score(sample.image, asked), thresholds)]
        for matrix, labels in zip(matrices, maps, strict=True):
            matrix.update(labels, sample.labels)
    miou = [matrix.miou() for matrix in matrices]
    return float(thresholds[int(np.argmax(miou))]), max(miou)
