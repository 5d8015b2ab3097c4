"""The ladder: where the method loses points, with truth (:mod:`.truth`) in place of one part after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ovdiff_lib.code import code_digest
from ovdiff_lib.errors import InputError
from ovdiff_lib.keys import check_profile, of_labels
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.workbench.data.datasets import DATASETS, load_dataset
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation import truth
from ovdiff_lib.workbench.evaluation.measure import Method, for_dataset, image_count, label_predictor, measure
from ovdiff_lib.workbench.tables.intervals import Runs, interval
from ovdiff_lib.workbench.tables.tables import Cell

RUNGS = {"as shipped": ("drawn", "filter"), "true image labels": ("drawn", "true"),
         "true support": ("true", "filter"), "true support and image labels": ("true", "true"),
         "no category filter": ("drawn", "all"), "true support, no category filter": ("true", "all"),
         "true cells": ("true cells", "true")}
"""The rungs: where the prototypes come from, and who says which classes an image can hold."""

COLUMNS = {"mIoU": "none", "mIoU, PAMR": "pamr"}  # each rung is measured with every ``matching.refine``


@dataclass(frozen=True)
class Ladder:
    """What was measured on ``images`` images: ``runs[column][rung]``, what each mIoU was counted from, and how many
    true ``scenes`` the support set of each class holds. ``print`` it."""

    runs: dict[str, dict[str, Runs]]
    images: int
    scenes: tuple[int, ...]

    amount = property(lambda self: " to ".join(map(str, sorted({min(self.scenes), max(self.scenes)}))))
    """How many true scenes a class has: "4 to 9", or "5"."""

    def cells(self) -> list[Cell]:
        """The rungs, and below them what each part costs (:func:`lost`), mIoU in percent with its interval."""
        made = []
        for column, runs in self.runs.items():
            made += [Cell.miou(rung, column, one) for rung, one in runs.items()]
            draws = lost({rung: one.draws for rung, one in runs.items()})
            for part, (points,) in lost({rung: one.values for rung, one in runs.items()}).items():
                low, high = interval(draws[part]) if self.images > 1 else (None, None)
                made.append(Cell(f"lost by {part}", column, points, low=low, high=high))
        return made

    def table(self) -> pd.DataFrame:
        """The numbers of :meth:`cells`, rows by columns."""
        return pd.DataFrame({column: {c.row: c.measured for c in self.cells() if c.column == column}
                             for column in self.runs})

    def __str__(self) -> str:
        return self.table().to_string(float_format="{:.1f}".format)


def lost(miou: Mapping[str, Any]) -> dict[str, Any]:
    """The points that each part costs, of the mIoU of the rungs; they sum to what "as shipped" lacks to 100.

    What support and filter cost depends on which of them is made true first, and is the mean of both orders. "features
    and matching" is what is left when both are true, to a classifier that errs in no cell; "feature grid" is what that
    one lacks: cells and windows are coarser than the label maps.
    """
    base, labels, support, both, *_, cells = miou.values()
    return {"drawings and masks": (support - base + both - labels) / 2,
            "category filter": (labels - base + both - support) / 2,
            "features and matching": cells - both, "feature grid": 100 - cells}


def ladder(ovdiff: OVDiff, dataset: Dataset, training: Dataset, *, folder: str | Path | None = None,
           limit: int | None = None, progress: bool = True) -> Ladder:
    """Measure every rung (:data:`RUNGS`) on the first ``limit`` images of ``dataset``, with scenes of ``training``,
    all its classes on other images, as true support; ``folder`` as for ``measure``. ``InputError`` if it is not so."""
    if (training.folder, training.split) == (dataset.folder, dataset.split):
        raise InputError(f"The split {dataset.split!r} is measured, so its scenes cannot be support; choose another.")
    check_profile(ovdiff.profile)
    images, chosen = image_count(dataset, limit), truth.scenes_of(training, ovdiff.profile.support.size)
    origin = [training.name, training.split, str(training.folder), [[training.ids[i] for i in one] for one in chosen]]
    builder = for_dataset(ovdiff, dataset)
    banks = {"drawn": cache(lambda: builder.build(dataset.vocabulary)),
             "true": cache(lambda: truth.true_bank(builder, dataset.vocabulary, training, chosen))}

    def prepare(one: OVDiff, source: str, classes: str, dataset: Dataset) -> Callable[[Sample], np.ndarray]:
        if classes != "true":
            predict = label_predictor(one, banks[source](), dataset)
            return lambda sample: predict(sample.image)[None]
        cells = source == "true cells"
        label = truth.true_cells(one, dataset) if cells else truth.among_shown(one, banks[source](), dataset)
        return lambda sample: label(sample)[None]

    methods = {}
    for column, refine in COLUMNS.items():
        for rung, (source, classes) in RUNGS.items():
            off = {"filters.category": False} if classes != "filter" else {}
            one = ovdiff.replaced({"matching.refine": refine, **off})
            key = {"ladder": [source, classes], "support": origin if source == "true" else [],
                   **of_labels(one.profile), "ladder's code": code_digest(truth.__name__)}
            methods[column, rung] = Method(key, partial(prepare, one, source, classes))
    found = measure(methods, dataset, folder=folder, limit=limit, progress=progress)
    runs = {column: {rung: Runs.of(dataset.name, [found[column, rung][0].by_image()]) for rung in RUNGS}
            for column in COLUMNS}
    return Ladder(runs, images, tuple(map(len, chosen)))


def training_of(dataset: Dataset, split: str | None = None) -> Dataset:
    """The split of a data set whose scenes serve as true support: ``split``, or the first of train, tune and val that
    it has and that is not measured. Raises as :func:`~ovdiff_lib.workbench.data.datasets.load_dataset`."""
    splits = DATASETS[dataset.name][1]().splits or ("train", "val")  # lists of a folder: what published archives have
    fitting = (one for one in ("train", "tune", "val") if one in splits and one != dataset.split)
    return load_dataset(dataset.name, split=split or next(fitting), folder=dataset.folder)
