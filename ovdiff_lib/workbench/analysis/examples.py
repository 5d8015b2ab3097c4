"""Example images chosen by what their label maps show, so that figures are not picked by hand (Fig. 4, 6 and A.1)."""

from collections.abc import Iterable, Sequence

import numpy as np

from ovdiff_lib.explain import activated
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import KINDS
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import Sample


def shown_labels(sample: Sample) -> list[int]:
    """The labels of the classes that an image shows, ascending; neither background nor what is ignored is one."""
    return np.setdiff1d(sample.labels, (0, IGNORE)).tolist()


def showing(samples: Iterable[Sample], asked: Iterable[int]) -> Sample:
    """The first sample that shows most of the labels ``asked``, then fewest others, then most pixels of them."""
    wanted = set(map(int, asked))

    def rank(sample: Sample) -> tuple[int, int, float]:
        there = set(shown_labels(sample))
        return len(there & wanted), -len(there - wanted), float(np.isin(sample.labels, sorted(wanted)).mean())

    return max(samples, key=rank)


def side_by_side(samples: Sequence[Sample]) -> list[Sample]:
    """Images of two instances of a class, for data sets that never show two: the first two images of equal height that
    show that class alone, joined left to right. At most one a class, the ones nearest to a square first."""
    waiting: dict[tuple[int, int], Sample] = {}
    joined: dict[int, Sample] = {}
    for sample, shown in ((sample, shown_labels(sample)) for sample in samples):
        if len(shown) == 1 and shown[0] not in joined:
            first = waiting.setdefault((shown[0], sample.image.shape[0]), sample)
            if first is not sample:
                joined[shown[0]] = Sample(f"{first.id} + {sample.id}", np.concatenate([first.image, sample.image], 1),
                                          np.concatenate([first.labels, sample.labels], 1))
    return sorted(joined.values(), key=lambda s: abs(np.log(s.image.shape[1] / s.image.shape[0])))


def plainest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The ``count`` images whose background's grey varies least from pixel to pixel; those without one come last."""
    def roughness(sample: Sample) -> float:
        background = sample.labels == 0
        both = background[:, 1:] & background[:, :-1]
        steps = np.abs(np.diff(sample.image.astype(np.float64).mean(2), axis=1))
        return float(steps[both].mean()) if both.any() else np.inf

    return sorted(samples, key=roughness)[:count]


def fullest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The ``count`` images that show the most classes, then the least background."""
    return sorted(samples, key=lambda s: (-len(shown_labels(s)), float((s.labels == 0).mean())))[:count]


class Examples:
    """Which images of a data set explain best, found while they are segmented one after the other; the first of equals.

    ``classes``: class name -> (IoU, index) of the image whose pixels of that class are segmented best. ``kinds``: for
    each of :data:`~ovdiff_lib.types.KINDS` and for "background" -> (value, index, class name) of the image in which one
    prototype of that kind decided most of a class, weighted by the class's IoU.
    """

    def __init__(self) -> None:
        self.classes: dict[str, tuple[float, int]] = {}
        self.kinds: dict[str, tuple[float, int, str]] = {}

    def update(self, index: int, segmentation: Segmentation, target: np.ndarray) -> None:
        """Judge image number ``index``, segmented with its bank, by its true labels int (H, W)."""
        for label in np.setdiff1d(target, [IGNORE]).tolist():
            name, labelled = segmentation.class_names[label], segmentation.labels == label
            found, true = labelled & (target != IGNORE), target == label
            iou = float((found & true).sum() / (found | true).sum())
            if label and iou > self.classes.get(name, (-1.0, 0))[0]:
                self.classes[name] = iou, index
            for kind in KINDS if label else ("background",):
                for prototype in activated(segmentation, name, 1, (kind,) if label else KINDS):
                    value = iou * float(prototype.pixels.sum() / labelled.sum())
                    if value > self.kinds.get(kind, (-1.0, 0, ""))[0]:
                        self.kinds[kind] = value, index, name
