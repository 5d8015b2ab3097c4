"""The result: a label map, its scores, and why each pixel got its label (Sec. 4.4)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ovdiff_lib.categories import BACKGROUND, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.overlay import draw_overlay
from ovdiff_lib.types import PrototypeBank, Prototypes


def label_ids(kept: Sequence[int]) -> np.ndarray:
    """The labels that rows of scores stand for, i32: background, then of each kept category 1 + its place among all."""
    return np.array([0, *(1 + k for k in kept)], np.int32)


@dataclass(frozen=True)
class Explanation:
    """Why a pixel got its label.

    ``class_name`` won with ``score``; ``runner_up`` came second, ``margin`` behind (None if no other class was
    considered). The deciding prototype is row ``index`` of ``extractor``'s prototypes of ``category`` (for background:
    the category whose support images it comes from), of a ``kind`` and ``region``. It was made from the support images
    ``images`` (most pixels first; ``own``: the user's pictures), within ``masks`` bool (len(images), h, w) on the
    extractor's grid. A constant background score has no prototype: these are None, ``images`` and ``masks`` empty.
    """

    row: int
    column: int
    class_name: str
    score: float
    runner_up: str | None
    margin: float | None
    extractor: str
    category: str | None = None
    kind: str | None = None
    region: str | None = None
    index: int | None = None
    images: tuple[int, ...] = ()
    own: bool = False
    masks: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), bool))

    def __str__(self) -> str:
        second = "" if self.runner_up is None else f", {self.margin:.3f} above {self.runner_up}"
        origin = "a constant background score"
        if self.kind is not None:
            images = f"{'own pictures' if self.own else 'support images'} {', '.join(map(str, self.images))}"
            origin = f"a {self.region} {self.kind} prototype of {self.category}, from {images}"
        return f"pixel ({self.row}, {self.column}) is {self.class_name} (score {self.score:.3f}{second}): {origin}"


@dataclass(frozen=True)
class Segmentation:
    """A segmented image.

    ``image`` u8 (H, W, 3); ``labels`` i32 (H, W), 0 = background, i + 1 = ``vocabulary.categories[i]``; ``kept_scores``
    f32 (1 + len(kept), H, W) cosine similarities of background and of the categories in ``kept``; ``winner`` i32 (2, H,
    W) (category, row) of the prototype that decided the pixel, ``prototypes[category].vectors[row]``, -1 where a
    constant did; ``kept`` indices of the categories the pre-filter kept; ``filter_scores`` f32 (C,) its class
    probabilities; ``bank`` the prototypes it was matched with, after the filters: those of the kept categories.
    """

    image: np.ndarray
    labels: np.ndarray
    kept_scores: np.ndarray
    winner: np.ndarray
    vocabulary: Vocabulary
    kept: tuple[int, ...]
    filter_scores: np.ndarray
    bank: PrototypeBank = field(repr=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label id, "background" first."""
        return (BACKGROUND, *self.vocabulary.names)

    @property
    def scores(self) -> np.ndarray:
        """Scores of the whole vocabulary f32 (C + 1, H, W), -inf where the pre-filter dropped it; made at each call."""
        full = np.full((len(self.vocabulary) + 1, *self.labels.shape), -np.inf, np.float32)
        full[label_ids(self.kept)] = self.kept_scores
        return full

    @property
    def prototypes(self) -> tuple[Prototypes, ...]:
        """Those that ``winner`` counts, by kept category: the first extractor's."""
        return self.bank.prototypes[self.bank.extractors[0]]

    def overlay(self):
        """The image with its labels painted over it and a legend, as a PIL image."""
        return draw_overlay(self.image, self.labels, self.class_names)

    def explain(self, row: int, column: int) -> Explanation:
        """Why the pixel at (row, column) got its label (Sec. 4.4). ``InputError`` for a pixel outside the image."""
        height, width = self.labels.shape
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(f"The pixel ({row}, {column}) is outside the image; give a row from 0 to {height - 1} and "
                             f"a column from 0 to {width - 1}.")
        prototypes, label = self.prototypes, int(self.labels[row, column])
        scores = dict(zip(label_ids(self.kept).tolist(), self.kept_scores[:, row, column].tolist(), strict=True))
        score = scores.pop(label)
        second = max(scores, key=scores.get, default=label)
        others = second != label and np.isfinite(scores[second])
        runner_up = (self.class_names[second], score - scores[second]) if others else (None, None)
        told = row, column, self.class_names[label], score, *runner_up, self.bank.extractors[0]
        category, index = map(int, self.winner[:, row, column])
        if category < 0:
            return Explanation(*told)
        of = self.bank.vocabulary.categories[category]
        return Explanation(*told, category=of.name, own=bool(of.pictures), **prototypes[category].origin(index))
