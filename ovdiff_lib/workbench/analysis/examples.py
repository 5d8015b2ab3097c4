"""Example images chosen by what their label maps show, so that figures of a data set are not picked by hand (Fig. 4, 6
and A.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.explain import activated
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import KINDS
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import Sample


def shown_labels(sample: Sample) -> list[int]:
    """The labels of the classes that an image shows, ascending; neither background nor what is ignored is one."""
    return [int(label) for label in np.unique(sample.labels) if label not in (0, IGNORE)]


def showing(samples: Iterable[Sample], asked: Iterable[int]) -> Sample:
    """The sample that shows the most of the labels ``asked``, of those the one that shows the fewest others, of those
    the one with the largest share of pixels of ``asked``; the first of equals. Raises ``InputError`` without
    samples."""
    wanted, best, place = set(map(int, asked)), None, (-1, 0, -1.0)
    for sample in samples:
        there = set(shown_labels(sample))
        rank = len(there & wanted), -len(there - wanted), float(np.isin(sample.labels, sorted(wanted)).mean())
        if best is None or rank > place:
            best, place = sample, rank
    if best is None:
        raise InputError("There is no image to choose from; give at least one.")
    return best


def side_by_side(samples: Sequence[Sample]) -> list[Sample]:
    """Images of two instances of a class, for data sets that never show two: the first two images of equal height that
    show that class alone, joined left to right. At most one a class, the ones nearest to a square first."""
    waiting: dict[tuple[int, int], Sample] = {}
    joined: dict[int, Sample] = {}
    for sample in samples:
        shown = shown_labels(sample)
        if len(shown) != 1 or shown[0] in joined:
            continue
        first = waiting.setdefault((shown[0], sample.image.shape[0]), sample)
        if first is not sample:
            joined[shown[0]] = Sample(f"{first.id} + {sample.id}", np.concatenate([first.image, sample.image], 1),
                                      np.concatenate([first.labels, sample.labels], 1))
    return sorted(joined.values(), key=lambda s: abs(np.log(s.image.shape[1] / s.image.shape[0])))


def plainest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The ``count`` images whose background varies least from a pixel to its right neighbour (mean absolute difference
    of grey values); images without background come last."""
    def roughness(sample: Sample) -> float:
        background = sample.labels == 0
        both = background[:, 1:] & background[:, :-1]
        steps = np.abs(np.diff(sample.image.astype(np.float64).mean(2), axis=1))
        return float(steps[both].mean()) if both.any() else np.inf

    return sorted(samples, key=roughness)[:count]


def fullest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The ``count`` images that show the most classes, of those the ones with the largest share of pixels that are not
    background."""
    return sorted(samples, key=lambda s: (-len(shown_labels(s)), float((s.labels == 0).mean())))[:count]


class Examples:
    """Which images of a data set explain best, found while they are segmented one after the other.

    ``classes``: class name -> (IoU, index) of the image whose pixels of that class are segmented best. ``kinds``: for
    each of :data:`~ovdiff_lib.types.KINDS` and for "background" -> (value, index, class name) of the image in which one
    prototype of that kind decided most of a class, weighted by the class's IoU. Of equals the first image stays.
    """

    def __init__(self) -> None:
        self.classes: dict[str, tuple[float, int]] = {}
        self.kinds: dict[str, tuple[float, int, str]] = {}

    def update(self, index: int, segmentation: Segmentation, target: np.ndarray) -> None:
        """Judge image number ``index``, segmented with its bank, by its true labels int (H, W)."""
        for label in [int(label) for label in np.unique(target) if label != IGNORE]:
            name, counted = segmentation.class_names[label], target != IGNORE
            found, true = (segmentation.labels == label) & counted, target == label
            iou = float((found & true).sum() / (found | true).sum())
            if label and iou > self.classes.get(name, (-1.0, 0))[0]:
                self.classes[name] = iou, index
            for kind in KINDS if label else ("background",):
                for prototype in activated(segmentation, name, 1, (kind,) if label else KINDS):
                    value = iou * float(prototype.pixels.sum() / (segmentation.labels == label).sum())
                    if value > self.kinds.get(kind, (-1.0, 0, ""))[0]:
                        self.kinds[kind] = value, index, name
