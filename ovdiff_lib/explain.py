"""From a pixel back to the support regions that decided it (Sec. 4.4, Fig. 4); why a class is absent (Sec. 3.4)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import KINDS, REGIONS

BELOW, NOT_AMONG_TOP, NOT_BEST = REASONS = "below 1/C", "not among the top eta", "not in the best combined prompt"
"""Why the category pre-filter dropped a class: its probability, its rank, the prompt of several classes."""


def decided_by(segmentation: Segmentation) -> dict[tuple[str, str], int]:
    """How many pixels each sort of prototype decided, by (region, kind), all six; a constant score's are in none."""
    (category, row), counts = segmentation.winner, Counter()
    for i, prototypes in enumerate(segmentation.prototypes):
        deciding = row[category == i]
        counts.update(zip(prototypes.region[deciding].tolist(), prototypes.kind[deciding].tolist(), strict=True))
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


def activated(segmentation: Segmentation, class_name: str, count: int = 3,
              kinds: Sequence[str] = KINDS) -> tuple[Activated, ...]:
    """At most ``count`` prototypes of these ``kinds`` that decided most of ``class_name``, most first (Fig. 4)."""
    names = segmentation.class_names
    if class_name not in names:
        raise InputError(f"The segmentation has no class {class_name!r}; choose one of {', '.join(names)}.")
    category, row = segmentation.winner
    inside = (segmentation.labels == names.index(class_name)) & (category >= 0)
    pairs, pixels = np.unique(segmentation.winner[:, inside], axis=1, return_counts=True)
    found = []
    for c, r in pairs[:, np.argsort(-pixels, kind="stable")].T.tolist():
        prototypes = segmentation.prototypes[c]
        if len(found) < count and prototypes.kind[r] in kinds:
            found.append(Activated(category=segmentation.bank.vocabulary.names[c], **prototypes.origin(r),
                                   pixels=inside & (category == c) & (row == r)))
    return tuple(found)


@dataclass(frozen=True)
class AbsentClass:
    """A queried class that the category pre-filter dropped: CLIP's ``probability`` of it among the queried classes, the
    ``threshold`` 1/C it had to reach, and the ``reason``: :data:`BELOW`, :data:`NOT_AMONG_TOP` or :data:`NOT_BEST`."""

    name: str
    probability: float
    threshold: float
    reason: str


def absent_classes(segmentation: Segmentation, filters: Filters | None = None) -> list[AbsentClass]:
    """The classes that the category pre-filter (Sec. 3.4) dropped, the most probable first; none where it did not run.

    ``filters`` are the settings that the image was segmented with (default: the paper's).
    """
    filters, probabilities = filters or Filters(), segmentation.filter_scores
    judged = [i for i, category in enumerate(segmentation.vocabulary)
              if not (filters.category_keep_stuff and category.kind == "stuff")]
    absent = []
    for place, i in enumerate(sorted(judged, key=lambda i: (-probabilities[i], i))):
        if i not in segmentation.kept:
            # The filter's own comparison, with its slack for rounding.
            low = probabilities[i] < (1 - 1e-5) / len(judged)
            reason = BELOW if low else NOT_BEST if place < filters.category_top else NOT_AMONG_TOP
            name = segmentation.vocabulary.names[i]
            absent.append(AbsentClass(name, float(probabilities[i]), 1 / len(judged), reason))
    return absent
