"""Rows of a table: OVDiff with other settings, without background prototypes at every constant, and rivals.

A constant background score belongs to the scores of a method, so a search tries quantiles of them: of the highest
foreground score at the pixels of the first images of the data set's split ``evaluation.tune``, or where the profile
names none, of the data set itself. The same constants are tried on both. What is reported is the best on the images
measured, as the paper does, which flatters, and of a ``tuned`` row what the constant gives that is best on the split.

A row needs of its bench (:class:`~ovdiff_lib.workbench.evaluation.bench.Bench`) the ``ovdiff(settings, seed)``, the
``seeds``, the shared ``parts`` and ``dataset``, ``quantiles_of`` and ``quantiles``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.filters.stuff import bare
from ovdiff_lib.keys import of_labels
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.baselines import OWN_BACKGROUND
from ovdiff_lib.workbench.baselines.common import Filtered
from ovdiff_lib.workbench.baselines.segmenter import check_proposals, majority_vote
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import Method, above, for_dataset, foreground_labels, label_predictor

LEVELS, SAMPLED = 100, 24
"""How many constant background scores a search tries, and the quantiles of how many images they are."""


@dataclass(frozen=True)
class Row:
    """One row of a table: OVDiff with the profile fields ``settings`` replaced.

    ``paper`` is the row's name in the paper's table ("" = ``label``). ``build(bench, seed, vocabulary)`` gives a bank
    in place of ``OVDiff.build`` (:mod:`~ovdiff_lib.workbench.evaluation.banks`); ``label``, ``settings`` and the
    bench's seeds tell it apart. ``names`` selects the class names given to the networks
    (:data:`~ovdiff_lib.workbench.data.classes.NAMES`). ``seeds`` limits how many seeds are measured. ``tuned``: of a
    search the constant that is best on the split ``evaluation.tune``, not on the images measured.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    build: Callable[[Any, int, Vocabulary], PrototypeBank] | None = None
    names: str = "fixed"
    seeds: int | None = None
    tuned: bool = False

    searches = False  # whether the row may stand for a search

    def needs(self, bench: Any) -> None:
        """``ModelNotAvailable`` or ``ProfileError`` where the row cannot be measured here."""
        ovdiff = bench.ovdiff(self.settings)
        ovdiff.extractors, ovdiff.segmenter  # noqa: B018

    def method(self, bench: Any, seed: int, source: str) -> Method:
        """The method that the row stands for on the data set ``source``."""
        searched = self.searches and bench.dataset(source, self.names).has_background
        # Any constant will do for a search: the background's row of the scores is not read.
        constant = {"matching.background_threshold": 0.0} if searched else {}
        ovdiff = bench.ovdiff({**self.settings, **constant}, seed)
        own = {"build": [self.label, seed, list(bench.seeds)]} if self.build else {}
        tried = {"constants": bench.quantiles_of(source, self.names)} if searched else {}
        key = {"method": "ovdiff", **own, **of_labels(ovdiff.profile), **tried}
        notes: list[str] = []

        def prepare(dataset: Dataset) -> Callable[[Sample], np.ndarray]:
            words = dataset.vocabulary
            bank = self.build(bench, seed, words) if self.build else for_dataset(ovdiff, dataset).build(words)
            if searched:
                bank = bank.without_background()
                return searching(bench, key, source, lambda image: ovdiff.segment(image, bank).scores)
            if ovdiff.profile.filters.stuff and dataset.has_background:
                said = bare(bank, ovdiff.stuff_filter(bank), ovdiff.profile.filters)
                notes.extend(f"Seed {seed}: {sentence}" for sentence in said)
            predict = label_predictor(ovdiff, bank, dataset)
            return lambda sample: predict(sample.image)[None]

        return Method(key, prepare, LEVELS if searched else 1,
                      None if self.build else lambda dataset, one: for_dataset(ovdiff, dataset).build_class(one), notes)


class Searched(Row):
    """OVDiff without background prototypes, at the best constant background score."""

    searches = True


@dataclass(frozen=True)
class Rival(Row):
    """The entry ``baseline`` of ``BASELINES``, with its own background or the best constant one, as :class:`Searched`.

    ``filtered``: behind OVDiff's category filter; ``voted``: each proposal of the segmenter takes its majority label.
    """

    seeds: int | None = 1  # it has none of its own
    baseline: str = ""
    filtered: bool = False
    voted: bool = False

    searches = property(lambda self: self.baseline not in OWN_BACKGROUND)

    def needs(self, bench: Any) -> Any:
        """The baseline. Raises ``ModelNotAvailable`` or ``ProfileError`` where it cannot be measured here."""
        ovdiff = bench.ovdiff(self.settings)
        if self.voted:
            check_proposals(ovdiff.profile)
            ovdiff.segmenter  # noqa: B018
        baseline = bench.parts.baseline(self.baseline, ovdiff.profile)
        return Filtered(baseline, ovdiff.category_filter) if self.filtered else baseline

    def method(self, bench: Any, seed: int, source: str) -> Method:
        ovdiff, dataset = bench.ovdiff(self.settings), bench.dataset(source, self.names)
        settings = ovdiff.profile.baselines
        models = OWN_BACKGROUND.get(self.baseline, lambda *_: False)(settings, dataset.vocabulary)
        lacks = dataset.has_background and not models
        constant = settings.constants.get(self.baseline, {}).get(dataset.name) if lacks else None
        searched = lacks and constant is None
        key = {"method": self.baseline, "filtered": self.filtered, "voted": self.voted,
               **of_labels(ovdiff.profile, True), "baselines": ovdiff.profile.to_dict()["baselines"],
               **({"constants": bench.quantiles_of(source, self.names)} if searched else {})}
        notes = [f"The published constant {constant:g} stands for the background."] if constant is not None else []
        if searched and self.baseline in OWN_BACKGROUND:
            notes = ["Its background words are classes here, so a constant stands for it, the best on these images."]

        def prepare(dataset: Dataset) -> Callable[[Sample], np.ndarray]:
            baseline = self.needs(bench)
            if texts := getattr(bench.parts.baseline(self.baseline, ovdiff.profile), "texts", None):
                notes.append(f"Templates for class names: {len(texts.templates)}, first {texts.templates[0]!r}.")

            def score(image: np.ndarray) -> np.ndarray:
                return baseline.scores(image, dataset.vocabulary)

            def label(sample: Sample) -> np.ndarray:
                scores = score(sample.image)
                if constant is not None:
                    return above(scores, [constant])
                return (scores.argmax(0) if dataset.has_background else foreground_labels(scores))[None]

            if searched:
                label = searching(bench, key, source, score)
            if not self.voted:
                return label
            return lambda sample: majority_vote(label(sample), ovdiff.segmenter.propose(sample.image, ""))

        return Method(key, prepare, LEVELS if searched else 1, notes=notes)


def both_readings(rows: Sequence[Row], profile: Profile) -> list[Row]:
    """The rows, and after each that searches a constant the ``tuned`` one, where the profile names a split for it."""
    twice = ([row, replace(row, label=f"{row.label}, constant from {profile.evaluation.tune}", paper="", tuned=True)]
             if row.searches and profile.evaluation.tune else [row] for row in rows)
    return [row for readings in twice for row in readings]


def searching(bench: Any, key: dict[str, Any], source: str,
              score: Callable[[np.ndarray], np.ndarray]) -> Callable[[Sample], np.ndarray]:
    """Label maps i16 (LEVELS, H, W) of a sample, one for each constant that a search tries; ``score`` gives the scores
    of an image, ``key`` tells the method."""
    constants = bench.quantiles(key, source, score)
    return lambda sample: above(score(sample.image), constants)


def quantiles(scores: Iterable[np.ndarray]) -> np.ndarray:
    """f32 (LEVELS,): a constant below every highest foreground score of some images f32 (C + 1, H, W), then quantiles
    of these at equal distances."""
    best = np.concatenate([one[1:].max(0).ravel() for one in scores])
    levels = np.arange(1, LEVELS) / LEVELS
    return np.concatenate([[-np.inf], np.quantile(best, levels, method="inverted_cdf")]).astype(np.float32)
