"""The ladder: where the points of the method are lost. The truth takes the place of one part after the other.

What a user cannot have, a label map tells: true image labels in place of the category filter, scenes with their true
masks in place of drawings, and a classifier that is right in every cell of the feature grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.code import code_digest
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.keys import check_profile, of_labels
from ovdiff_lib.library.own import own_support
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.matching.windows import scales, window_seeds
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.types import PrototypeBank, Prototypes
from ovdiff_lib.workbench.analysis.examples import shown_labels
from ovdiff_lib.workbench.data.datasets import DATASETS, load_dataset
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import (
    Method,
    for_dataset,
    foreground_labels,
    image_count,
    label_predictor,
    measure,
)
from ovdiff_lib.workbench.tables.intervals import Runs, interval
from ovdiff_lib.workbench.tables.tables import Cell

Label = Callable[[Sample], np.ndarray]
"""Sample -> labels int (H, W)."""

RUNGS = {"as shipped": ("drawn", "filter"), "true image labels": ("drawn", "true"),
         "true support": ("true", "filter"), "true support and image labels": ("true", "true"),
         "no category filter": ("drawn", "all"), "true support, no category filter": ("true", "all"),
         "true cells": ("true cells", "true")}
"""The rungs: where the prototypes come from, and who says which classes an image can hold."""

COLUMNS = {"mIoU": "none", "mIoU, PAMR": "pamr"}
"""Each rung is measured with every ``matching.refine``."""

LEAST = 0.01
"""A scene serves as support of a class that covers at least this share of its pixels."""


@dataclass(frozen=True)
class Ladder:
    """What was measured: ``miou[column][rung]`` in percent, on ``images`` images, how many true scenes the support set
    of each class holds, and what each mIoU was counted from."""

    miou: dict[str, dict[str, float]]
    images: int
    scenes: tuple[int, ...]
    runs: dict[str, dict[str, Runs]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def amount(self) -> str:
        """How many true scenes a class has: "4 to 9", or "5"."""
        return " to ".join(map(str, sorted({min(self.scenes), max(self.scenes)})))

    def lost(self, column: str) -> dict[str, float]:
        """The points that each part costs; they sum to what "as shipped" lacks to 100.

        What support and filter cost depends on which of them is made true first, and is the mean of both orders.
        "features and matching" is what is left when both are true, to a classifier that errs in no cell; "feature grid"
        is what that one lacks: cells and windows are coarser than the label maps.
        """
        return _lost(self.miou[column])

    def table(self) -> dict[str, dict[str, float]]:
        """By column and row: the rungs, and below them what each part costs."""
        return {column: rungs | {f"lost by {part}": points for part, points in self.lost(column).items()}
                for column, rungs in self.miou.items()}

    def cells(self) -> list[Cell]:
        """:meth:`table` as cells, with their intervals."""
        made = []
        for column, runs in self.runs.items():
            made += [Cell.miou(rung, column, one) for rung, one in runs.items()]
            draws = _lost({rung: one.draws for rung, one in runs.items()})
            for part, points in self.lost(column).items():
                low, high = interval(draws[part]) if self.images > 1 else (None, None)
                made.append(Cell(f"lost by {part}", column, points, low=low, high=high))
        return made

    def __str__(self) -> str:
        """What each part costs, in a sentence."""
        lost = self.lost("mIoU")
        costs = ", ".join(f"{part} {points:.1f}" for part, points in lost.items())
        return (f"Of the {sum(lost.values()):.1f} points that OVDiff without PAMR lacks to 100, these parts cost: "
                f"{costs} (true support: {self.amount} scenes a class).")


def _lost(miou: Mapping[str, Any]) -> dict[str, Any]:
    """:meth:`Ladder.lost` of mIoU by rung, numbers or arrays."""
    base, labels, support, both, *_, cells = miou.values()
    return {"drawings and masks": (support - base + both - labels) / 2,
            "category filter": (labels - base + both - support) / 2,
            "features and matching": cells - both, "feature grid": 100 - cells}


def ladder(ovdiff: OVDiff, dataset: Dataset, training: Dataset, *, folder: str | Path | None = None,
           limit: int | None = None, progress: bool = True) -> Ladder:
    """Measure every rung (:data:`RUNGS`) on the first ``limit`` images of ``dataset``, with the scenes of
    ``training``, the same classes on other images, as true support sets.

    ``folder`` as for :func:`~ovdiff_lib.workbench.evaluation.measure.measure`. The rungs share networks where those of
    ``ovdiff`` do. Raises ``InputError`` where ``training`` is what is measured, or lacks a class.
    """
    if (training.folder, training.split) == (dataset.folder, dataset.split):
        raise InputError(f"The split {dataset.split!r} is measured, so its scenes cannot be support; choose another.")
    check_profile(ovdiff.profile)
    images, chosen = image_count(dataset, limit), scenes_of(training, ovdiff.profile.support.size)
    origin = [training.name, training.split, str(training.folder), [[training.ids[i] for i in one] for one in chosen]]
    builder = for_dataset(ovdiff, dataset)
    banks = {"drawn": cache(lambda: builder.build(dataset.vocabulary)),
             "true": cache(lambda: true_bank(builder, dataset.vocabulary, training, chosen))}
    methods = {}
    for column, refine in COLUMNS.items():
        for rung, (source, classes) in RUNGS.items():
            off = {"filters.category": False} if classes != "filter" else {}
            one = ovdiff.replaced({"matching.refine": refine, **off})
            key = {"ladder": rung, "support": origin if source == "true" else [], **of_labels(one.profile),
                   "ladder's code": code_digest(__name__)}
            prepare = partial(_prepare, one, banks.get(source), classes)
            methods[column, rung] = Method(key, prepare)
    found = measure(methods, dataset, folder=folder, limit=limit, progress=progress)
    miou = {column: {rung: 100 * found[column, rung][0].miou for rung in RUNGS} for column in COLUMNS}
    runs = {column: {rung: Runs.of(dataset.name, [found[column, rung][0].by_image()]) for rung in RUNGS}
            for column in COLUMNS}
    return Ladder(miou, images, tuple(map(len, chosen)), runs)


def _prepare(ovdiff: OVDiff, bank: Callable[[], PrototypeBank] | None, classes: str, dataset: Dataset) -> Label:
    """How a rung labels the images of ``dataset``; without a bank, by true cells."""
    if classes == "true":
        label = true_cells(ovdiff, dataset) if bank is None else among_shown(ovdiff, bank(), dataset)
        return lambda sample: label(sample)[None]
    predict = label_predictor(ovdiff, bank(), dataset)
    return lambda sample: predict(sample.image)[None]


# ------------------------------------------------------------------ true image labels

def among_shown(ovdiff: OVDiff, bank: PrototypeBank, dataset: Dataset) -> Label:
    """OVDiff with ``bank``, of which it keeps of each image the classes that its label map shows; background stays."""
    bank = bank if dataset.has_background else bank.without_background()
    bank = ovdiff.stuff_filter(bank) if ovdiff.profile.filters.stuff else bank
    matcher = for_dataset(ovdiff, dataset).matcher
    return lambda sample: _matched(matcher, sample, lambda shown: bank.restrict(label - 1 for label in shown), dataset)


def _matched(matcher: Matcher, sample: Sample, bank: Callable[[list[int]], PrototypeBank],
             dataset: Dataset) -> np.ndarray:
    """Labels of a sample among those that it shows, ``bank`` giving their prototypes; of one that shows none 0."""
    shown = shown_labels(sample)
    if not shown:
        return np.zeros(sample.labels.shape, np.int64)
    scores, _ = next(matcher.scores([(sample.image, bank(shown))]))
    return np.array([0, *shown])[scores.argmax(0) if dataset.has_background else foreground_labels(scores)]


# ------------------------------------------------------------------ true support

def scenes_of(training: Dataset, size: int) -> list[list[int]]:
    """For each class the first ``size`` scenes of ``training`` that show it (:data:`LEAST`), or as many as there are.
    ``InputError`` names the classes that no scene shows."""
    names = training.vocabulary.names
    chosen: list[list[int]] = [[] for _ in names]
    for index in range(len(training)):
        labels = training.labels(index)
        shares = np.bincount(labels.ravel(), minlength=256)[1 : len(names) + 1] / labels.size
        for of_class in (chosen[c] for c in np.flatnonzero(shares >= LEAST)):
            if len(of_class) < size:
                of_class.append(index)
        if all(len(of_class) == size for of_class in chosen):
            break
    if lacking := [name for name, of_class in zip(names, chosen, strict=True) if not of_class]:
        raise InputError(f"No image of {training.name} ({training.split}) shows {', '.join(lacking)} on {LEAST:.0%} of "
                         "its pixels; choose another --support-split.")
    return chosen


def true_bank(ovdiff: OVDiff, vocabulary: Vocabulary, training: Dataset, chosen: Sequence[Sequence[int]]
              ) -> PrototypeBank:
    """The bank whose support images are the ``chosen`` scenes of each class: its true mask is foreground, all the rest
    background, but for what is ignored."""
    made = []
    for label, (category, indices) in enumerate(zip(vocabulary, chosen, strict=True), 1):
        samples = [training[index] for index in indices]
        objects = [sample.labels == label for sample in samples]
        around = [~np.isin(sample.labels, (label, IGNORE)) for sample in samples]
        pictures = zip((sample.image for sample in samples), objects, around, strict=True)
        made.append(ovdiff.prototypes(*own_support(category, pictures, ovdiff)))
    return PrototypeBank(vocabulary, {name: tuple(one[name] for one in made) for name in made[0]})


# ------------------------------------------------------------------ the feature grid

def true_cells(ovdiff: OVDiff, dataset: Dataset) -> Label:
    """What a perfect classifier of cells reaches: in each window every cell of each extractor's grid gives 1 to the
    class that has most of its pixels and 0 to the others, and the matcher makes a label map of it as of cosines."""
    ovdiff = for_dataset(ovdiff, dataset)
    matching, seed = ovdiff.profile.matching, ovdiff.profile.features.seed

    @cache
    def grid(name: str, side: int) -> tuple[int, int]:
        blank = np.zeros((1, side, side, 3), np.uint8)
        return tuple(ovdiff.extractors[name](blank, np.zeros(1, np.int64)).shape[1:3])

    def predict(sample: Sample) -> np.ndarray:
        image = resize_short_side(sample.image, matching.short_side, matching.resample, matching.long_side)
        classes = np.array([0, *shown_labels(sample)])  # what is ignored counts for none of them
        masks = torch.from_numpy(sample.labels == classes[:, None, None]).float()
        shares = F.adaptive_avg_pool2d(masks, image.shape[:2])
        boxes = [box for _, placed in scales(image.shape[:2], matching) for box in placed]
        # The matcher gives each window a seed of its own, which tells here which one it is.
        windows = dict(zip(window_seeds(seed, sample.image, len(boxes)).tolist(), boxes, strict=True))

        def oracle(name: str, crops: np.ndarray, seeds: np.ndarray) -> list[torch.Tensor]:
            """Unit vectors f32 (h, w, K), one for each window; zero where a cell shows none of the classes."""
            found = []
            for top, left, height, width in (windows[one] for one in seeds.tolist()):
                inside = shares[:, top : top + height, left : left + width]
                most, best = F.adaptive_avg_pool2d(inside, grid(name, crops.shape[1])).max(0)
                found.append(F.one_hot(best, len(classes)).float() * (most > 0)[..., None])
            return found

        extractors = {name: partial(oracle, name) for name in ovdiff.extractors}
        matcher = Matcher(extractors, ovdiff.profile.override({"matching.minimum_score": None}))
        return _matched(matcher, sample, lambda shown: _unit_bank(dataset, shown, ovdiff.extractors), dataset)

    return predict


def _unit_bank(dataset: Dataset, shown: Sequence[int], extractors: Sequence[str]) -> PrototypeBank:
    """Unit vectors as prototypes of the classes ``shown``, and of the background if it is one."""
    units, made = np.eye(len(shown) + 1, dtype=np.float32), []
    for number in range(1, len(units)):
        rows = [0, number] if number == 1 and dataset.has_background else [number]
        zeros = np.zeros(len(rows), np.int32)
        region = np.where(np.array(rows) == 0, "background", "foreground")
        made.append(Prototypes(units[rows], np.full(len(rows), "class"), region, zeros - 1, zeros,
                               np.zeros((0, 0, 0), np.int16)))
    vocabulary = Vocabulary(tuple(dataset.vocabulary.categories[label - 1] for label in shown))
    return PrototypeBank(vocabulary, dict.fromkeys(extractors, tuple(made)))


def training_of(dataset: Dataset, split: str | None = None) -> Dataset:
    """The split of a data set whose scenes serve as true support: ``split``, or the first of train, tune and val that
    it has and that is not measured. Raises as :func:`~ovdiff_lib.workbench.data.datasets.load_dataset`."""
    splits = DATASETS[dataset.name][1]().splits or ("train", "val")  # lists of a folder: what published archives have
    fitting = (one for one in ("train", "tune", "val") if one in splits and one != dataset.split)
    return load_dataset(dataset.name, split=split or next(fitting), folder=dataset.folder)
