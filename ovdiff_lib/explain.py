"""From a pixel back to the support regions that decided it (Sec. 4.4, Fig. 4), and from a class that is not there to
why (Sec. 3.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.segmentation import Segmentation, deciding, matched_bank
from ovdiff_lib.types import KINDS, REGIONS, PrototypeBank

BELOW, NOT_AMONG_TOP, NOT_BEST = REASONS = "below 1/C", "not among the top eta", "not in the best combined prompt"
NOT_TOLD = f"{NOT_AMONG_TOP} or {NOT_BEST}"
"""Why the category pre-filter dropped a class: its probability, its rank, the prompt of several classes; or one of the
latter two."""


def decided_by(segmentation: Segmentation, bank: PrototypeBank | None = None) -> dict[tuple[str, str], int]:
    """How many pixels each sort of prototype decided, by (region, kind), all six; a constant background score's pixels
    are in none.

    ``bank`` as in :func:`~ovdiff_lib.segmentation.explain`; default: the one that the segmentation keeps.
    """
    bank = matched_bank(segmentation, bank)
    category, index = deciding(segmentation, bank)
    counts: Counter[tuple[str, str]] = Counter()
    for i, prototypes in enumerate(bank.prototypes[bank.extractors[0]]):
        rows, pixels = np.unique(index[category == i], return_counts=True)
        for row, number in zip(rows, pixels, strict=True):
            counts[str(prototypes.region[row]), str(prototypes.kind[row])] += int(number)
    return {(region, kind): counts[region, kind] for region in REGIONS for kind in KINDS}


@dataclass(frozen=True)
class Activated:
    """A prototype and what it did in an image: it decided ``pixels`` bool (H, W).

    It is row ``index`` of the prototypes of ``category``, of a ``kind`` and ``region``, and was made from the support
    images ``images`` (most pixels first), within ``masks`` bool (len(images), h, w).
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
    """The prototypes that decided most pixels of ``class_name``, most first, at most ``count`` of the given ``kinds``
    (Fig. 4, middle)."""
    if class_name not in segmentation.class_names:
        raise InputError(f"The segmentation has no class {class_name!r}; choose one of {', '.join(segmentation.class_names)}.")
    bank = matched_bank(segmentation, bank)
    rows = bank.prototypes[bank.extractors[0]]
    category, index = deciding(segmentation, bank)
    inside = (segmentation.labels == segmentation.class_names.index(class_name)) & (category >= 0)
    pairs, pixels = np.unique(np.stack([category[inside], index[inside]]), axis=1, return_counts=True)
    found = []
    for i in np.argsort(-pixels, kind="stable"):
        c, row = map(int, pairs[:, i])
        prototypes = rows[c]
        if len(found) < count and prototypes.kind[row] in kinds:
            found.append(Activated(bank.vocabulary.names[c], str(prototypes.kind[row]), str(prototypes.region[row]), row,
                                   inside & (category == c) & (index == row), *prototypes.origin(row)))
    return tuple(found)


@dataclass(frozen=True)
class AbsentClass:
    """A queried class that the category pre-filter dropped: CLIP's ``probability`` of it among the queried classes, the
    ``threshold`` 1/C that it had to reach, and the ``reason``: :data:`BELOW`, :data:`NOT_AMONG_TOP`, :data:`NOT_BEST`
    or :data:`NOT_TOLD`."""

    name: str
    probability: float
    threshold: float
    reason: str


def absent_classes(segmentation: Segmentation, filters: Filters | None = None) -> list[AbsentClass]:
    """The classes that the category pre-filter (Sec. 3.4) dropped, the most probable first; none where it did not run.

    ``filters`` are the settings that the image was segmented with: eta, and whether stuff is judged. Without them every
    class counts as judged, and of one above 1/C that ranks behind all kept ones it cannot be said whether rank or
    prompt was the reason.
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
