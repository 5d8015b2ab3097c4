"""Rows of a table: OVDiff with other settings, without background prototypes at every threshold, and rivals.

A row needs of its bench (:class:`~ovdiff_lib.workbench.evaluation.bench.Bench`) the ``ovdiff(settings, seed)``, the
``seeds`` and the shared ``parts``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.filters.stuff import bare
from ovdiff_lib.keys import of_labels
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import Method, above, for_dataset, foreground_labels, label_predictor

THRESHOLDS = tuple(round(0.01 * i, 2) for i in range(100))
"""Constant background scores that a search tries."""


@dataclass(frozen=True)
class Row:
    """One row of a table: OVDiff with the profile fields ``settings`` replaced.

    ``paper`` is the row's name in the paper's table ("" = ``label``). ``build(bench, seed, vocabulary)`` gives a bank
    in place of ``OVDiff.build`` (:mod:`~ovdiff_lib.workbench.evaluation.banks`); ``label``, ``settings`` and the
    bench's seeds tell it apart. ``names`` selects the class names given to the networks
    (:data:`~ovdiff_lib.workbench.data.classes.NAMES`). ``seeds`` limits how many seeds are measured.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    build: Callable[[Any, int, Vocabulary], PrototypeBank] | None = None
    names: str = "fixed"
    seeds: int | None = None

    def needs(self, bench: Any) -> None:
        """``ModelNotAvailable`` or ``ProfileError`` where the row cannot be measured here."""
        ovdiff = bench.ovdiff(self.settings)
        ovdiff.extractors, ovdiff.segmenter  # noqa: B018

    def method(self, bench: Any, seed: int) -> Method:
        """The method that the row stands for."""
        searched = isinstance(self, Searched)
        # Any constant will do for a search: the background's row of the scores is not read.
        constant = {"matching.background_threshold": 0.0} if searched else {}
        ovdiff = bench.ovdiff({**self.settings, **constant}, seed)
        own = {"build": [self.label, seed, list(bench.seeds)]} if self.build else {}
        tried = {"thresholds": list(THRESHOLDS)} if searched else {}

        def prepare(dataset: Dataset) -> Callable[[Sample], np.ndarray]:
            words = dataset.vocabulary
            bank = self.build(bench, seed, words) if self.build else for_dataset(ovdiff, dataset).build(words)
            if searched:
                bank = bank.without_background()
                return lambda sample: at_thresholds(ovdiff.segment(sample.image, bank).scores, dataset)
            if ovdiff.profile.filters.stuff and dataset.has_background:
                notes.extend(bare(bank, ovdiff.stuff_filter(bank)))
            predict = label_predictor(ovdiff, bank, dataset)
            return lambda sample: predict(sample.image)[None]

        notes: list[str] = []
        return Method({"method": "ovdiff", **own, **of_labels(ovdiff.profile), **tried}, prepare,
                      len(THRESHOLDS) if searched else 1,
                      None if self.build else lambda dataset, one: for_dataset(ovdiff, dataset).build_class(one), notes)


class Searched(Row):
    """OVDiff without background prototypes: the best of :data:`THRESHOLDS` as constant background score, searched on
    the images it is measured on."""


@dataclass(frozen=True)
class Rival(Row):
    """The entry ``baseline`` of ``BASELINES``, with its own background or the best constant one, as :class:`Searched`.

    ``filtered``: behind OVDiff's category filter; ``voted``: each proposal of the profile's segmenter then takes its
    majority label.
    """

    baseline: str = ""
    filtered: bool = False
    voted: bool = False

    def needs(self, bench: Any) -> Any:
        """The baseline. Raises ``ModelNotAvailable`` or ``ProfileError`` where it cannot be measured here."""
        from ovdiff_lib.workbench.baselines.common import Filtered

        ovdiff = bench.ovdiff(self.settings)
        baseline = bench.parts.baseline(self.baseline, ovdiff.profile)
        return Filtered(baseline, ovdiff.category_filter) if self.filtered else baseline

    def method(self, bench: Any, seed: int) -> Method:
        from ovdiff_lib.workbench.baselines import OWN_BACKGROUND

        ovdiff, own = bench.ovdiff(self.settings), self.baseline in OWN_BACKGROUND
        key = {"method": self.baseline, "filtered": self.filtered, "voted": self.voted,
               **of_labels(ovdiff.profile, True), "baselines": ovdiff.profile.to_dict()["baselines"],
               **({} if own else {"thresholds": list(THRESHOLDS)})}

        def prepare(dataset: Dataset) -> Callable[[Sample], np.ndarray]:
            baseline = self.needs(bench)

            def label(sample: Sample) -> np.ndarray:
                scores = baseline.scores(sample.image, dataset.vocabulary)
                if own:
                    made = (scores.argmax(0) if dataset.has_background else foreground_labels(scores))[None]
                else:
                    made = at_thresholds(scores, dataset)
                return _voted(made, ovdiff.segmenter.propose(sample.image, "")) if self.voted else made

            return label

        return Method(key, prepare, 1 if own else len(THRESHOLDS))


def at_thresholds(scores: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Label maps i16 (T, H, W) at each of :data:`THRESHOLDS`; where background is no class all are the same."""
    if not dataset.has_background:
        return np.repeat(foreground_labels(scores)[None], len(THRESHOLDS), 0)
    return above(scores, THRESHOLDS)


def _voted(made: np.ndarray, proposals: np.ndarray) -> np.ndarray:
    """Label maps (T, H, W) after a vote in each of a segmenter's proposals bool (M, H, W)."""
    from ovdiff_lib.workbench.baselines.segmenter import majority_vote

    voted = []
    for index, one in enumerate(made):  # neighbouring thresholds often make the same map
        same = index and (one == made[index - 1]).all()
        voted.append(voted[-1] if same else majority_vote(one, proposals))
    return np.stack(voted)
