"""From a pixel back to the support regions that decided it (Fig. 4): every prediction has a prototype, every prototype its pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.types import PrototypeBank, Prototypes, Segmentation


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
    kept = sorted(segmentation.kept)
    if bank.vocabulary.names == segmentation.vocabulary.names:
        bank = bank.restrict(kept)
    elif bank.vocabulary.names != tuple(segmentation.vocabulary.names[i] for i in kept):
        raise InputError("The bank holds other classes than the segmentation; give the bank that the image was segmented with.")
    label, winner = int(segmentation.labels[row, column]), int(segmentation.winner[row, column])
    extractor = bank.extractors[0]
    category, index = _resolve(bank, None if label == 0 else kept.index(label - 1), winner)
    runner_up, margin = _second(segmentation, label, row, column)
    common = dict(row=row, column=column, class_name=segmentation.class_names[label], runner_up=runner_up, margin=margin,
                  score=float(segmentation.scores[label, row, column]), extractor=extractor)
    if category is None:
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


def _resolve(bank: PrototypeBank, category: int | None, winner: int) -> tuple[int | None, int]:
    """Category index and row of the winning prototype; ``category`` None is background, whose rows are those of all categories."""
    rows = bank.prototypes[bank.extractors[0]]
    if winner < 0:
        return None, -1
    if category is not None:
        if winner < len(rows[category]) and rows[category].region[winner] == "foreground":
            return category, winner
    else:
        for i, prototypes in enumerate(rows):
            own = np.flatnonzero(prototypes.region == "background")
            if winner < len(own):
                return i, int(own[winner])
            winner -= len(own)
    raise InputError("The segmentation names a prototype that the bank does not hold; give the bank that the image was segmented with.")


def _second(segmentation: Segmentation, label: int, row: int, column: int) -> tuple[str | None, float | None]:
    scores = segmentation.scores[:, row, column].copy()
    first = float(scores[label])
    scores[label] = -np.inf
    second = int(scores.argmax())
    if not np.isfinite(scores[second]):
        return None, None
    return segmentation.class_names[second], first - float(scores[second])
