"""The result: a label map, its scores, and why each pixel got its label (Sec. 4.4)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ovdiff_lib.categories import BACKGROUND, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import PrototypeBank


@dataclass(frozen=True)
class Explanation:
    """Why a pixel got its label.

    ``class_name`` won with ``score``; ``runner_up`` came second, ``margin`` behind (None if no other class was
    considered). The deciding prototype is row ``index`` of ``extractor``'s prototypes of ``category`` (for background:
    the category whose support images it comes from), of a ``kind`` and ``region``. It was made from the support images
    ``images`` (most pixels first), within ``masks`` bool (len(images), h, w) on the extractor's feature grid. A
    constant background score has no prototype: these fields are None, ``images`` and ``masks`` empty.
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


def explain(segmentation: Segmentation, bank: PrototypeBank | None, row: int, column: int) -> Explanation:
    """Explain the label at (row, column) of a segmentation by the bank that it was matched with.

    ``bank`` is the one given to the matching (after the "stuff" filter), of the whole vocabulary or of the kept
    categories. Raises ``InputError`` for a pixel outside the image or a bank that does not fit.
    """
    height, width = segmentation.labels.shape
    if not (0 <= row < height and 0 <= column < width):
        raise InputError(f"The pixel ({row}, {column}) is outside the image; give a row from 0 to {height - 1} and a column from 0 to "
                         f"{width - 1}.")
    label = int(segmentation.labels[row, column])
    bank = matched_bank(segmentation, bank)
    extractor = bank.extractors[0]
    category, index = map(int, deciding(segmentation, bank, np.s_[row : row + 1, column : column + 1]).ravel())
    runner_up, margin = _second(segmentation, label, row, column)
    common = dict(row=row, column=column, class_name=segmentation.class_names[label], runner_up=runner_up, margin=margin,
                  score=float(segmentation.scores_at(row, column)[label]), extractor=extractor)
    if category < 0:
        return Explanation(**common, category=None, kind=None, region=None, index=None, images=(), masks=np.zeros((0, 0, 0), bool))
    prototypes = bank.prototypes[extractor][category]
    images, masks = prototypes.origin(index)
    return Explanation(**common, category=bank.vocabulary.names[category], kind=str(prototypes.kind[index]),
                       region=str(prototypes.region[index]), index=index, images=images, masks=masks)


def matched_bank(segmentation: Segmentation, bank: PrototypeBank | None) -> PrototypeBank:
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


def deciding(segmentation: Segmentation, bank: PrototypeBank, where: tuple[slice, slice] = np.s_[:, :]) -> np.ndarray:
    """``segmentation.winner`` of the pixels ``where``, once it fits the bank of the kept categories; else
    ``InputError``."""
    rows, labels, winner = bank.prototypes[bank.extractors[0]], segmentation.labels[where], segmentation.winner[:, *where]
    category, row = winner
    for c in np.unique(category[category >= 0]):
        own = category == c
        legal = c < len(rows) and row[own].max() < len(rows[c])
        if not legal or ((rows[c].region[row[own]] == "foreground") != (labels[own] > 0)).any():
            raise InputError("The segmentation names a prototype that the bank does not hold; give the bank that the image was segmented"
                             " with.")
    return winner


def _second(segmentation: Segmentation, label: int, row: int, column: int) -> tuple[str | None, float | None]:
    scores = segmentation.scores_at(row, column)
    first = float(scores[label])
    scores[label] = -np.inf
    second = int(scores.argmax())
    if not np.isfinite(scores[second]):
        return None, None
    return segmentation.class_names[second], first - float(scores[second])


@dataclass(frozen=True)
class Segmentation:
    """A segmented image.

    ``image`` u8 (H, W, 3); ``labels`` i32 (H, W), 0 = background, i + 1 = ``vocabulary.categories[i]``; ``kept_scores``
    f32 (1 + len(kept), H, W) cosine similarities of background and of the categories in ``kept``; ``winner`` i32 (2, H,
    W) (category, row) of the prototype that decided the pixel, ``bank.prototypes[first
    extractor][category].vectors[row]``, -1 where a constant did; ``kept`` indices of the categories the pre-filter
    kept; ``filter_scores`` f32 (C,) its class probabilities; ``bank`` the prototypes it was matched with, after the
    filters: those of the kept categories.
    """

    image: np.ndarray
    labels: np.ndarray
    kept_scores: np.ndarray
    winner: np.ndarray
    vocabulary: Vocabulary
    kept: tuple[int, ...]
    filter_scores: np.ndarray
    bank: PrototypeBank | None = field(default=None, repr=False, compare=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label id, "background" first."""
        return (BACKGROUND, *self.vocabulary.names)

    @property
    def scores(self) -> np.ndarray:
        """Scores of the whole vocabulary, f32 (C + 1, H, W), -inf for categories that the pre-filter dropped; made at
        each call, as large as the vocabulary."""
        full = np.full((len(self.vocabulary) + 1, *self.labels.shape), -np.inf, np.float32)
        full[[0, *(k + 1 for k in self.kept)]] = self.kept_scores
        return full

    def scores_at(self, row: int, column: int) -> np.ndarray:
        """Scores f32 (C + 1,) of one pixel, -inf for categories that the pre-filter dropped."""
        full = np.full(len(self.vocabulary) + 1, -np.inf, np.float32)
        full[[0, *(k + 1 for k in self.kept)]] = self.kept_scores[:, row, column]
        return full

    def overlay(self, alpha: float = 0.6):
        """The image with its labels painted over it and a legend, as a PIL image."""
        from ovdiff_lib.overlay import draw_overlay

        return draw_overlay(self.image, self.labels, self.class_names, alpha)

    def explain(self, row: int, column: int) -> Explanation:
        """Why the pixel at (row, column) got its label (Sec. 4.4)."""
        return explain(self, self.bank, row, column)
