"""Rows of a table as methods: OVDiff with other settings, without background prototypes at every threshold, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.keys import of_labels
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.samples import Dataset
from ovdiff_lib.workbench.evaluation.measure import for_dataset, label_predictor
from ovdiff_lib.workbench.evaluation.study import Method, Sweep

if TYPE_CHECKING:
    from ovdiff_lib.workbench.evaluation.bench import Bench


THRESHOLDS = tuple(round(0.01 * i, 2) for i in range(100))
"""Constant background scores that a search tries."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    ``label`` is shown; ``settings`` are the profile fields in which it differs; ``paper`` is the row's name in the paper's table ("" =
    the label). ``search``: no background prototypes, but the best of :data:`THRESHOLDS` as constant background score, searched on the
    images it is measured on. ``baseline`` names an entry of ``BASELINES`` measured instead of OVDiff, ``filtered`` whether behind
    OVDiff's category filter, ``voted`` whether each proposal of the profile's segmenter then takes its majority label. ``kinds`` is a
    source of thing / stuff labels (:func:`~ovdiff_lib.workbench.data.things.kinds`; default: the data set's own), ``build`` a function (bench,
    seed, vocabulary) -> bank that replaces ``OVDiff.build``, told apart by ``label`` and ``settings``. ``names`` selects the class names
    given to the networks (:data:`~ovdiff_lib.workbench.data.classes.NAMES`). ``seeds`` limits how many seeds are measured.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    search: bool = False
    baseline: str = ""
    filtered: bool = False
    voted: bool = False
    kinds: str = ""
    build: Callable[[Bench, int, Vocabulary], PrototypeBank] | None = None
    names: str = "fixed"
    seeds: int | None = None


def method_of(bench: Bench, row: Row, seed: int) -> Method:
    """The method that a row stands for."""
    if row.baseline:
        return _Baseline(bench, row)
    return (_Search if row.search else _Plain)(bench, row, seed)


@dataclass(frozen=True)
class _Plain:
    """OVDiff as it is."""

    bench: Bench
    row: Row
    seed: int
    variants = 1

    @property
    def ovdiff(self) -> OVDiff:
        return self.bench.ovdiff(self.row.settings, self.seed)

    @property
    def key(self) -> dict[str, Any]:
        made = {"build": [self.row.label, self.seed]} if self.row.build else {}
        return {"method": "ovdiff", "kinds": self.row.kinds, **made, **of_labels(self.ovdiff.profile)}

    def bank(self, dataset: Dataset) -> PrototypeBank:
        from ovdiff_lib.workbench.data.things import with_kinds

        vocabulary = with_kinds(dataset.vocabulary, self.row.kinds, "thing") if self.row.kinds else dataset.vocabulary
        if self.row.build:
            return self.row.build(self.bench, self.seed, vocabulary)
        return for_dataset(self.ovdiff, dataset).build(vocabulary)

    def prepare(self, dataset: Dataset) -> Callable[[np.ndarray], np.ndarray]:
        predict = label_predictor(self.ovdiff, self.bank(dataset), dataset)
        return lambda image: predict(image)[None]


class _Search(_Plain):
    """OVDiff without background prototypes, at every constant background score."""

    variants = len(THRESHOLDS)

    @property
    def ovdiff(self) -> OVDiff:
        # Any constant will do: the background's row of the scores is not read.
        return self.bench.ovdiff({**self.row.settings, "matching.background_threshold": 0.0}, self.seed)

    @property
    def key(self) -> dict[str, Any]:
        return {**super().key, "thresholds": list(THRESHOLDS)}

    def prepare(self, dataset: Dataset) -> Callable[[np.ndarray], np.ndarray]:
        ovdiff, bank = self.ovdiff, self.bank(dataset).without_background()
        return lambda image: at_thresholds(ovdiff.segment(image, bank).scores)


class _Baseline:
    """A baseline, with its own background or the best constant one, behind the filter and by vote where the row asks for it."""

    def __init__(self, bench: Bench, row: Row) -> None:
        self.bench, self.row = bench, row
        self.profile = bench.ovdiff(row.settings).profile

    @property
    def own_background(self) -> bool:
        from ovdiff_lib.workbench.baselines import OWN_BACKGROUND

        return self.row.baseline in OWN_BACKGROUND

    @property
    def variants(self) -> int:
        return 1 if self.own_background else len(THRESHOLDS)

    @property
    def key(self) -> dict[str, Any]:
        key = {"method": self.row.baseline, "filtered": self.row.filtered, "voted": self.row.voted, **of_labels(self.profile, True),
               "baselines": self.profile.to_dict().get("baselines", {})}
        return key if self.own_background else {**key, "thresholds": list(THRESHOLDS)}

    def prepare(self, dataset: Dataset) -> Callable[[np.ndarray], np.ndarray]:
        from ovdiff_lib.workbench.baselines.filtered import Filtered
        from ovdiff_lib.workbench.baselines.segmenter import majority_vote

        ovdiff = self.bench.ovdiff(self.row.settings)
        baseline = self.bench.parts.baseline(self.row.baseline, self.profile)
        if self.row.filtered:
            baseline = Filtered(baseline, ovdiff.category_filter)

        def predict(image: np.ndarray) -> np.ndarray:
            scores = baseline.scores(image, dataset.vocabulary)
            if not self.own_background:
                labels = at_thresholds(scores)
            else:
                labels = (scores.argmax(0) if dataset.has_background else scores[1:].argmax(0) + 1)[None]
            if not self.row.voted:
                return labels
            proposals, voted = ovdiff.segmenter.propose(image, ""), []
            if isinstance(labels, Sweep):
                labels = labels.maps() if dataset.has_background else np.repeat(labels.category[None], self.variants, 0)
            for index, one in enumerate(labels):  # neighbouring thresholds often make the same map
                same = index and (one == labels[index - 1]).all()
                voted.append(voted[-1] if same else majority_vote(one, proposals))
            return np.stack(voted)

        return predict


def at_thresholds(scores: np.ndarray) -> Sweep:
    """Scores f32 (C + 1, H, W) as label maps, one for each of :data:`THRESHOLDS` as constant background score; row 0 is not read."""
    return Sweep(scores[1:].max(0), scores[1:].argmax(0) + 1, THRESHOLDS)
