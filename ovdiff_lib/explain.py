"""From a pixel back to the support regions that decided it (Sec. 4.4, Fig. 4), and from a class that is not there to why (Sec. 3.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.profile import Filters
from ovdiff_lib.types import KINDS, REGIONS, PrototypeBank, Prototypes, Segmentation

BELOW, NOT_AMONG_TOP, NOT_BEST = REASONS = "below 1/C", "not among the top eta", "not in the best combined prompt"
NOT_TOLD = f"{NOT_AMONG_TOP} or {NOT_BEST}"
"""Why the category pre-filter dropped a class: its probability, its rank, the prompt of several classes; or one of the latter two."""


@dataclass(frozen=True)
class Explanation:
    """Why a pixel got its label.

    ``class_name`` won with ``score``; ``runner_up`` came second, ``margin`` behind (None if no other class was considered).
    The deciding prototype is row ``index`` of ``extractor``'s prototypes of ``category`` (for background: the category whose support
    images it comes from), of a ``kind`` and ``region``. It was made from the support images ``images`` (most pixels first),
    within ``masks`` bool (len(images), h, w) on the extractor's feature grid. A constant background score has no prototype: these fields
    are None, ``images`` and ``masks`` empty.
    """

    row: int
    column: int
    class_name: str
    score: float
    runner_up: str | None
    margin: float | None
    extractor: str
    category: str | None
    kind: str | None
    region: str | None
    index: int | None
    images: tuple[int, ...]
    masks: np.ndarray

    def __str__(self) -> str:
        second = "" if self.runner_up is None else f", {self.margin:.3f} above {self.runner_up}"
        origin = "a constant background score"
        if self.kind is not None:
            origin = f"a {self.region} {self.kind} prototype of {self.category}, from support images {', '.join(map(str, self.images))}"
        return f"pixel ({self.row}, {self.column}) is {self.class_name} (score {self.score:.3f}{second}): {origin}"


def explain(segmentation: Segmentation, bank: PrototypeBank, row: int, column: int) -> Explanation:
    """Explain the label at (row, column) of a segmentation by the bank that it was matched with.

    ``bank`` is the one given to the matching (after the "stuff" filter), of the whole vocabulary or of the kept categories.
    ``segmentation.winner`` is read as :meth:`ovdiff_lib.matching.Matcher.scores` documents. Raises ``InputError`` for a pixel
    outside the image or a bank that does not fit.
    """
    height, width = segmentation.labels.shape
    if not (0 <= row < height and 0 <= column < width):
        raise InputError(f"The pixel ({row}, {column}) is outside the image; give a row from 0 to {height - 1} and a column from 0 to "
                         f"{width - 1}.")
    label = int(segmentation.labels[row, column])
    bank = _matched(segmentation, bank)
    extractor = bank.extractors[0]
    here = np.s_[row : row + 1, column : column + 1]
    category, index = (int(found[0, 0]) for found in _resolve(segmentation, bank, here))
    runner_up, margin = _second(segmentation, label, row, column)
    common = dict(row=row, column=column, class_name=segmentation.class_names[label], runner_up=runner_up, margin=margin,
                  score=float(segmentation.scores_at(row, column)[label]), extractor=extractor)
    if category < 0:
        return Explanation(**common, category=None, kind=None, region=None, index=None, images=(), masks=np.zeros((0, 0, 0), bool))
    prototypes = bank.prototypes[extractor][category]
    images, masks = origin(prototypes, index)
    return Explanation(**common, category=bank.vocabulary.names[category], kind=str(prototypes.kind[index]),
                       region=str(prototypes.region[index]), index=index, images=images, masks=masks)


def origin(prototypes: Prototypes, index: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Support images that prototype ``index`` was made from, most pixels first, and its pixels in them: bool (len(images), h, w).

    A part prototype comes from the features assigned to its cluster, an instance prototype from the masked features of its image, the
    class prototype from those of all images.
    """
    kind, region = prototypes.kind[index], prototypes.region[index]
    if kind == "part":
        pixels = prototypes.assignment == prototypes.cluster[index]
    else:
        pixels = region_mask(prototypes, str(region))
        if kind == "instance":
            pixels = pixels & (np.arange(len(pixels)) == prototypes.image[index])[:, None, None]
    count = pixels.sum((1, 2))
    images = [int(n) for n in np.argsort(-count, kind="stable") if count[n]]
    return tuple(images), pixels[images]


def region_mask(prototypes: Prototypes, region: str) -> np.ndarray:
    """bool (N, h, w): the support features that made the prototypes of ``region``.

    Foreground codes of the assignment are those of the foreground part prototypes, or 0 in a set built without parts. A set whose
    parts were taken away afterwards no longer says which codes are which: ``InputError``.
    """
    codes = prototypes.cluster[(prototypes.kind == "part") & (prototypes.region == "foreground")]
    if not len(codes):
        if len(np.unique(prototypes.assignment[prototypes.assignment >= 0])) > 2:
            raise InputError("The part prototypes were taken out of this bank, so it cannot be explained; set prototypes.kinds and build "
                             "it again.")
        codes = np.zeros(1, np.int32)
    foreground = np.isin(prototypes.assignment, codes)
    return foreground if region == "foreground" else (prototypes.assignment >= 0) & ~foreground


def decided_by(segmentation: Segmentation, bank: PrototypeBank | None = None) -> dict[tuple[str, str], int]:
    """How many pixels each sort of prototype decided, by (region, kind); all six are there, and pixels that a constant background score
    decided are in none.

    ``bank`` as in :func:`explain`; None takes the one that the segmentation keeps. Raises ``InputError`` for one that does not fit.
    """
    bank = _matched(segmentation, bank)
    category, index = _resolve(segmentation, bank, np.s_[:, :])
    counts: Counter[tuple[str, str]] = Counter()
    for i, prototypes in enumerate(bank.prototypes[bank.extractors[0]]):
        rows, pixels = np.unique(index[category == i], return_counts=True)
        for row, number in zip(rows, pixels, strict=True):
            counts[str(prototypes.region[row]), str(prototypes.kind[row])] += int(number)
    return {(region, kind): counts[region, kind] for region in REGIONS for kind in KINDS}


@dataclass(frozen=True)
class Activated:
    """A prototype and what it did in an image: it decided ``pixels`` bool (H, W).

    It is row ``index`` of the prototypes of ``category``, of a ``kind`` and ``region``, and was made from the support images ``images``
    (most pixels first), within ``masks`` bool (len(images), h, w).
    """

    category: str
    kind: str
    region: str
    index: int
    pixels: np.ndarray
    images: tuple[int, ...]
    masks: np.ndarray


def activated(segmentation: Segmentation, class_name: str, count: int = 3, kinds: Sequence[str] = KINDS,
              bank: PrototypeBank | None = None) -> tuple[Activated, ...]:
    """The prototypes that decided most pixels of ``class_name``, most first, at most ``count`` of the given ``kinds`` (Fig. 4, middle).

    Those of "background" come from all kept categories. Empty where the class has no pixel, or none by these kinds. ``bank`` as in
    :func:`decided_by`. Raises ``InputError`` for an unknown class and as :func:`decided_by` does.
    """
    if class_name not in segmentation.class_names:
        raise InputError(f"The segmentation has no class {class_name!r}; choose one of {', '.join(segmentation.class_names)}.")
    bank = _matched(segmentation, bank)
    rows = bank.prototypes[bank.extractors[0]]
    category, index = _resolve(segmentation, bank, np.s_[:, :])
    inside = (segmentation.labels == segmentation.class_names.index(class_name)) & (category >= 0)
    pairs, pixels = np.unique(np.stack([category[inside], index[inside]]), axis=1, return_counts=True)
    found = []
    for i in np.argsort(-pixels, kind="stable"):
        c, row = map(int, pairs[:, i])
        prototypes = rows[c]
        if len(found) < count and prototypes.kind[row] in kinds:
            found.append(Activated(bank.vocabulary.names[c], str(prototypes.kind[row]), str(prototypes.region[row]), row,
                                   inside & (category == c) & (index == row), *origin(prototypes, row)))
    return tuple(found)


@dataclass(frozen=True)
class AbsentClass:
    """A queried class that the category pre-filter dropped: CLIP's ``probability`` of it among the queried classes, the ``threshold`` 1/C
    that it had to reach, and the ``reason``: :data:`BELOW`, :data:`NOT_AMONG_TOP`, :data:`NOT_BEST` or :data:`NOT_TOLD`."""

    name: str
    probability: float
    threshold: float
    reason: str


def absent_classes(segmentation: Segmentation, filters: Filters | None = None) -> list[AbsentClass]:
    """The classes that the category pre-filter (Sec. 3.4) dropped, the most probable first; none where it did not run.

    ``filters`` are the settings that the image was segmented with: eta, and whether stuff is judged. Without them every class counts as
    judged, and of one above 1/C that ranks behind all kept ones it cannot be said whether rank or prompt was the reason.
    """
    probabilities, kinds = segmentation.filter_scores, [c.kind for c in segmentation.vocabulary]
    judged = [i for i, kind in enumerate(kinds) if not (filters is not None and filters.category_keep_stuff and kind == "stuff")]
    order = sorted(judged, key=lambda i: (-probabilities[i], i))
    places = {i: place for place, i in enumerate(order)}
    last = max((places[i] for i in segmentation.kept if i in places), default=-1)
    top = last + 1 if filters is None else filters.category_top
    beyond = NOT_TOLD if filters is None else NOT_AMONG_TOP
    absent = []
    for i in order:
        if i not in segmentation.kept:
            # The filter's own comparison, with its slack for rounding.
            low = probabilities[i] < (1 - 1e-5) / len(judged)
            reason = BELOW if low else NOT_BEST if places[i] < top else beyond
            absent.append(AbsentClass(segmentation.vocabulary.names[i], float(probabilities[i]), 1 / len(judged), reason))
    return absent


def _matched(segmentation: Segmentation, bank: PrototypeBank | None) -> PrototypeBank:
    """The prototypes of the kept categories; ``InputError`` for a bank of other classes and where there is none."""
    bank = segmentation.bank if bank is None else bank
    if bank is None:
        raise InputError("This segmentation was made without its prototypes, so it cannot be explained; segment the image with OVDiff.")
    kept = sorted(segmentation.kept)
    if bank.vocabulary.names == segmentation.vocabulary.names:
        return bank.restrict(kept)
    if bank.vocabulary.names != tuple(segmentation.vocabulary.names[i] for i in kept):
        raise InputError("The bank holds other classes than the segmentation; give the bank that the image was segmented with.")
    return bank


def _resolve(segmentation: Segmentation, bank: PrototypeBank, where: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
    """Category in the matched bank and row of the winning prototype of the pixels ``where``, i32 each; -1 where there is none.

    Background's rows are those of all categories, one after the other (:meth:`ovdiff_lib.matching.Matcher.scores`).
    """
    labels, winner = segmentation.labels[where], segmentation.winner[where]
    rows, kept = bank.prototypes[bank.extractors[0]], sorted(segmentation.kept)
    category, index = np.full(labels.shape, -1, np.int32), np.full(labels.shape, -1, np.int32)
    for label in np.unique(labels[winner >= 0]):
        at = (labels == label) & (winner >= 0)
        if label == 0:
            legal = [(i, row) for i, p in enumerate(rows) for row in np.flatnonzero(p.region == "background")]
        else:
            own = kept.index(label - 1)
            legal = [(own, row) if region == "foreground" else (-1, -1) for row, region in enumerate(rows[own].region)]
        table = np.array([*legal, (-1, -1)], np.int32)  # the last stands for all rows beyond
        category[at], index[at] = table[np.minimum(winner[at], len(legal))].T
        if (index[at] < 0).any():
            raise InputError("The segmentation names a prototype that the bank does not hold; give the bank that the image was segmented"
                             " with.")
    return category, index


def _second(segmentation: Segmentation, label: int, row: int, column: int) -> tuple[str | None, float | None]:
    scores = segmentation.scores_at(row, column)
    first = float(scores[label])
    scores[label] = -np.inf
    second = int(scores.argmax())
    if not np.isfinite(scores[second]):
        return None, None
    return segmentation.class_names[second], first - float(scores[second])
