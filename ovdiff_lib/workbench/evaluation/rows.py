"""Rows of a table: OVDiff with other settings, without background prototypes at every threshold, and rivals.

A row needs of its bench (:class:`~ovdiff_lib.workbench.evaluation.bench.Bench`) the ``ovdiff(settings, seed)`` and the shared ``parts``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.keys import of_labels
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import Method, Sweep, for_dataset, foreground_labels, label_predictor

THRESHOLDS = tuple(round(0.01 * i, 2) for i in range(100))
"""Constant background scores that a search tries."""


@dataclass(frozen=True)
class Row:
    """One row of a table: OVDiff with the profile fields ``settings`` replaced.

    ``label`` is shown; ``paper`` is the row's name in the paper's table ("" = the label). ``build``, a function (bench, seed,
    vocabulary) -> bank, replaces ``OVDiff.build`` (:mod:`~ovdiff_lib.workbench.evaluation.banks`); ``label`` and ``settings`` tell it
    apart. ``names`` selects the class names given to the networks (:data:`~ovdiff_lib.workbench.data.classes.NAMES`). ``seeds`` limits
    how many seeds are measured.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    build: Callable[[Any, int, Vocabulary], PrototypeBank] | None = None
    names: str = "fixed"
    seeds: int | None = None

    def method(self, bench: Any, seed: int) -> Method:
        """The method that the row stands for."""
        ovdiff = bench.ovdiff(self.settings, seed)

        def prepare(dataset: Dataset) -> Callable[[Sample], np.ndarray]:
            predict = label_predictor(ovdiff, self.bank(bench, ovdiff, seed, dataset), dataset)
            return lambda sample: predict(sample.image)[None]

        return Method(self.key(ovdiff, seed), prepare, build=self.builder(ovdiff))

    def needs(self, bench: Any) -> None:
        """``ModelNotAvailable`` or ``ProfileError`` where the row cannot be measured here."""
        ovdiff = bench.ovdiff(self.settings)
        ovdiff.extractors, ovdiff.segmenter  # noqa: B018

    def key(self, ovdiff: OVDiff, seed: int) -> dict[str, Any]:
        made = {"build": [self.label, seed]} if self.build else {}
        return {"method": "ovdiff", **made, **of_labels(ovdiff.profile)}

    def bank(self, bench: Any, ovdiff: OVDiff, seed: int, dataset: Dataset) -> PrototypeBank:
        return (self.build(bench, seed, dataset.vocabulary) if self.build else for_dataset(ovdiff, dataset).build(dataset.vocabulary))

    def builder(self, ovdiff: OVDiff) -> Callable | None:
        return None if self.build else lambda dataset, category: for_dataset(ovdiff, dataset).build_class(category)


@dataclass(frozen=True)
class Searched(Row):
    """OVDiff without background prototypes: the best of :data:`THRESHOLDS` as constant background score, searched on the images it is
    measured on."""

    def method(self, bench: Any, seed: int) -> Method:
        # Any constant will do: the background's row of the scores is not read.
        ovdiff = bench.ovdiff({**self.settings, "matching.background_threshold": 0.0}, seed)

        def prepare(dataset: Dataset) -> Callable[[Sample], Sweep]:
            bank = self.bank(bench, ovdiff, seed, dataset).without_background()
            return lambda sample: Sweep.of(ovdiff.segment(sample.image, bank).scores, THRESHOLDS)

        return Method({**self.key(ovdiff, seed), "thresholds": list(THRESHOLDS)}, prepare, len(THRESHOLDS), self.builder(ovdiff))


@dataclass(frozen=True)
class Rival(Row):
    """The entry ``baseline`` of ``BASELINES``, with its own background or the best constant one, as :class:`Searched`.

    ``filtered``: behind OVDiff's category filter; ``voted``: each proposal of the profile's segmenter then takes its majority label.
    """

    baseline: str = ""
    filtered: bool = False
    voted: bool = False

    def method(self, bench: Any, seed: int) -> Method:
        from ovdiff_lib.workbench.baselines import OWN_BACKGROUND

        ovdiff = bench.ovdiff(self.settings)
        own, variants = self.baseline in OWN_BACKGROUND, 1 if self.baseline in OWN_BACKGROUND else len(THRESHOLDS)
        key = {"method": self.baseline, "filtered": self.filtered, "voted": self.voted, **of_labels(ovdiff.profile, True),
               "baselines": ovdiff.profile.to_dict().get("baselines", {}), **({} if own else {"thresholds": list(THRESHOLDS)})}

        def prepare(dataset: Dataset) -> Callable[[Sample], np.ndarray | Sweep]:
            baseline = self.needs(bench)

            def label(sample: Sample) -> np.ndarray | Sweep:
                scores = baseline.scores(sample.image, dataset.vocabulary)
                if not own:
                    made = Sweep.of(scores, THRESHOLDS)
                else:
                    made = (scores.argmax(0) if dataset.has_background else foreground_labels(scores))[None]
                return self._vote(made, ovdiff, sample, dataset) if self.voted else made

            return label

        return Method(key, prepare, variants)

    def needs(self, bench: Any) -> Any:
        """The baseline. Raises ``ModelNotAvailable`` or ``ProfileError`` where it cannot be measured here."""
        from ovdiff_lib.workbench.baselines.filtered import Filtered

        ovdiff = bench.ovdiff(self.settings)
        baseline = bench.parts.baseline(self.baseline, ovdiff.profile)
        return Filtered(baseline, ovdiff.category_filter) if self.filtered else baseline

    @staticmethod
    def _vote(made: np.ndarray | Sweep, ovdiff: OVDiff, sample: Sample, dataset: Dataset) -> np.ndarray:
        from ovdiff_lib.workbench.baselines.segmenter import majority_vote

        if isinstance(made, Sweep):
            made = made.maps() if dataset.has_background else np.repeat(made.category[None], len(made.thresholds), 0)
        proposals, voted = ovdiff.segmenter.propose(sample.image, ""), []
        for index, one in enumerate(made):  # neighbouring thresholds often make the same map
            same = index and (one == made[index - 1]).all()
            voted.append(voted[-1] if same else majority_vote(one, proposals))
        return np.stack(voted)
