"""The truth in place of parts of OVDiff, as label maps tell it: the classes that an image shows, scenes with their
masks in place of drawings, and a classifier that is right in every cell of the feature grid."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.library.own import own_support
from ovdiff_lib.matching.pamr import pamr
from ovdiff_lib.matching.windows import scales
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.analysis.examples import shown_labels
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import for_dataset, foreground_labels

Label = Callable[[Sample], np.ndarray]
"""Sample -> labels int (H, W)."""

LEAST = 0.01
"""A scene serves as support of a class that covers at least this share of its pixels."""


def among_shown(ovdiff: OVDiff, bank: PrototypeBank, dataset: Dataset) -> Label:
    """OVDiff with ``bank``, of which it keeps of each image the classes that its label map shows; background stays."""
    bank = bank if dataset.has_background else bank.without_background()
    bank = ovdiff.stuff_filter(bank) if ovdiff.profile.filters.stuff else bank
    matcher = for_dataset(ovdiff, dataset).matcher

    def scores(sample: Sample, shown: list[int]) -> np.ndarray:
        return next(matcher.scores([(sample.image, bank.restrict(label - 1 for label in shown))]))[0]

    return _best(scores, dataset)


def true_cells(ovdiff: OVDiff, dataset: Dataset) -> Label:
    """What a perfect classifier of cells reaches: in each window every cell of each extractor's grid gives 1 to the
    class that has most of its pixels and 0 to the others. Windows are averaged, and the map refined, as cosines are."""
    matching = ovdiff.profile.matching

    @cache
    def grids(side: int) -> list[tuple[int, int]]:
        blank = np.zeros((1, side, side, 3), np.uint8), np.zeros(1, np.int64)
        return [tuple(extractor(*blank).shape[1:3]) for extractor in ovdiff.extractors.values()]

    @undisturbed()
    def scores(sample: Sample, shown: list[int]) -> np.ndarray:
        image = resize_short_side(sample.image, matching.short_side, matching.resample, matching.long_side)
        classes = np.array([0, *shown])  # what is ignored counts for none of them
        masks = torch.from_numpy(sample.labels == classes[:, None, None]).float()
        shares = F.adaptive_avg_pool2d(masks, image.shape[:2])
        total, placed = torch.zeros_like(shares), sorted(scales(image.shape[:2], matching))
        for side, boxes in placed:
            places = [np.s_[:, top : top + height, left : left + width] for top, left, height, width in boxes]
            cover = torch.zeros_like(total[:1])  # how many windows of the scale lie over each pixel
            for place in places:
                cover[place] += 1
            for place in places:
                for grid in grids(side):
                    most, best = F.adaptive_avg_pool2d(shares[place], grid).max(0)
                    cells = F.one_hot(best, len(classes)).movedim(-1, 0) * (most > 0).float()
                    enlarged = F.interpolate(cells[None], shares[place].shape[1:], mode="bilinear")[0]
                    total[place] += enlarged * (1 / (cover[place] * len(placed)))
        total /= len(ovdiff.extractors)
        if matching.refine == "pamr":
            total = pamr(image, total, matching.pamr_iterations, matching.pamr_dilations)
        return F.interpolate(total[None], sample.labels.shape, mode="bilinear")[0].numpy()

    return _best(scores, dataset)


def _best(scores: Callable[[Sample, list[int]], np.ndarray], dataset: Dataset) -> Label:
    """The best of the classes that a sample shows, by their scores f32 (C + 1, H, W); 0 where it shows none."""
    def label(sample: Sample) -> np.ndarray:
        shown = shown_labels(sample)
        if not shown:
            return np.zeros(sample.labels.shape, np.int64)
        found = scores(sample, shown)
        return np.array([0, *shown])[found.argmax(0) if dataset.has_background else foreground_labels(found)]

    return label


# ------------------------------------------------------------------ true support

def scenes_of(training: Dataset, size: int) -> list[list[int]]:
    """For each class the first ``size`` scenes of ``training`` that show it (:data:`LEAST`), or as many as there are.
    ``InputError`` names the classes that no scene shows."""
    names, chosen = training.vocabulary.names, [[] for _ in training.vocabulary]
    for index in range(len(training)):
        labels = training.labels(index)
        shares = np.bincount(labels.ravel(), minlength=256)[1 : len(names) + 1] / labels.size
        for c in np.flatnonzero(shares >= LEAST):
            chosen[c] += [index] if len(chosen[c]) < size else []
        if min(map(len, chosen)) == size:
            break
    if lacking := [name for name, of_class in zip(names, chosen, strict=True) if not of_class]:
        raise InputError(f"No image of {training.name} ({training.split}) shows {', '.join(lacking)} on {LEAST:.0%} of "
                         "its pixels; choose another --support-split.")
    return chosen


def true_bank(ovdiff: OVDiff, vocabulary: Vocabulary, training: Dataset, chosen: Sequence[Sequence[int]]
              ) -> PrototypeBank:
    """The bank whose support images are the ``chosen`` scenes: true masks, the rest background but what is ignored."""
    made = []
    for label, (category, indices) in enumerate(zip(vocabulary, chosen, strict=True), 1):
        samples = [training[index] for index in indices]
        objects = [sample.labels == label for sample in samples]
        around = [~np.isin(sample.labels, (label, IGNORE)) for sample in samples]
        pictures = zip((sample.image for sample in samples), objects, around, strict=True)
        made.append(ovdiff.prototypes(*own_support(category, pictures, ovdiff)))
    return PrototypeBank(vocabulary, {name: tuple(one[name] for one in made) for name in made[0]})
